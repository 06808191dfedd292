"""Which words and characters of a text a tokenizer breaks into many tokens: a sign that it was made for other text.

A word is what stands between blanks, without punctuation around it, as the tokenizer sees it after a blank.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

_MOST_WORDS = 500_000  # different words held; where there are more, those seen once are forgotten
_LISTED = 10
_WORD = re.compile(r"[^\W\d_](?:[\w'’-]{0,38}\w)?")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Breakage:
    """Counts words and characters; `figures` tokenizes each distinct one once."""

    def __init__(self) -> None:
        self.words: Counter[str] = Counter()
        self.characters: Counter[str] = Counter()
        self.word_count = 0

    def read(self, text: str) -> None:
        """Count the words, and the characters beyond ASCII, of a text."""
        found = _WORD.findall(text)
        self.word_count += len(found)
        self.words.update(found)
        if not text.isascii():
            self.characters.update(character for character in text if character > "\x7f")
        if len(self.words) > _MOST_WORDS:
            self.words = Counter({word: count for word, count in self.words.items() if count > 1})

    def figures(self, tokenizer: Any, ids: np.ndarray) -> dict[str, Any]:
        """Say what is broken most.

        Args:
          ids: (vocabulary,) how often each token occurs in the whole text.

        Returns:
          `words`; `tokens_per_word`; `unknown_tokens`; `byte_tokens`, pieces of a character, of all tokens;
          `broken_words` and `broken_characters`, those with most tokens a character (words of several tokens, then by
          how often they occur), each as `text`, `count` and `tokens`.
        """
        words = list(self.words)
        cut = _cut(tokenizer, words)
        spent = sum(self.words[word] * len(tokens) for word, tokens in zip(words, cut, strict=True))
        counted = max(1, sum(self.words.values()))
        characters = list(self.characters)
        return {
            "words": self.word_count,
            "tokens_per_word": round(spent / counted, 3),
            "unknown_tokens": _unknown(tokenizer, ids),
            "byte_tokens": _bytes(tokenizer, ids),
            "broken_words": _worst(tokenizer, words, cut, self.words),
            "broken_characters": _worst(tokenizer, characters, _cut(tokenizer, characters), self.characters),
        }


def _cut(tokenizer: Any, words: list[str]) -> list[list[int]]:
    """The tokens of each word behind a blank."""
    if not words:
        return []
    before = "a "
    encoded = tokenizer(
        [before + word for word in words], add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast
    )
    if not tokenizer.is_fast:
        skip = len(tokenizer(before.strip(), add_special_tokens=False)["input_ids"])
        return [ids[skip:] for ids in encoded["input_ids"]]
    return [
        [token for token, (_, end) in zip(ids, offsets, strict=True) if end > len(before)]
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _worst(tokenizer: Any, texts: list[str], cut: list[list[int]], counts: Counter) -> list[dict[str, Any]]:
    several = [(text, ids) for text, ids in zip(texts, cut, strict=True) if len(ids) > 1]
    several.sort(key=lambda item: (-len(item[1]) / len(item[0]), -counts[item[0]], item[0]))
    return [
        {"text": text, "count": counts[text], "tokens": [_show(tokenizer, token) for token in ids]}
        for text, ids in several[:_LISTED]
    ]


def _show(tokenizer: Any, token: int) -> str:
    """A token as text; where it is only part of a character, as the vocabulary writes it."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text or not text.strip() else text.strip()


def _unknown(tokenizer: Any, ids: np.ndarray) -> int:
    unknown = tokenizer.unk_token_id
    # GPT-2 and its kin name their end of text so, and know every byte.
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id) or unknown >= len(ids):
        return 0
    return int(ids[unknown])


def _bytes(tokenizer: Any, ids: np.ndarray) -> int:
    used = np.flatnonzero(ids).tolist()
    names = tokenizer.convert_ids_to_tokens(used)
    texts = tokenizer.batch_decode([[token] for token in used], clean_up_tokenization_spaces=False)
    return sum(
        int(ids[token])
        for token, name, text in zip(used, names, texts, strict=True)
        if _BYTE.fullmatch(name or "") or "\ufffd" in text
    )
