"""From an answer's tokens to what the API returns: text, log-probabilities, usage, whole or in chunks of a stream."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from tpu_tune.inference.pieces import Pieces
from tpu_tune.inference.serving.asked import Asked
from tpu_tune.inference.serving.engine import News, Token

_BYTE = re.compile("<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True)
class Spelled:
    """A token with its log-probability, and how it is written.

    Attributes:
      content: its bytes.
      logprob: of the model at temperature 1.
      tops: the likeliest tokens in its place, (bytes, log-probability) each.
      offset: characters of the answer before it.
    """

    content: bytes
    logprob: float
    tops: tuple[tuple[bytes, float], ...] = ()
    offset: int = 0

    @property
    def text(self) -> str:
        """Its text; a part of a character is a replacement character."""
        return self.content.decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class Part:
    """What has come of an answer since the last part."""

    text: str = ""
    tokens: tuple[Spelled, ...] = ()
    finish: str | None = None


class Answer:
    """One answer as its tokens come.

    Args:
      tokenizer: the model's.
      stops: texts that end it.
      tops: see `Asked`.

    Attributes:
      finish: why it ended, "stop" or "length"; None before that.
      count: its tokens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), tops: int | None = None):
        self.finish: str | None = None
        self.count = 0
        self._tokenizer, self._tops = tokenizer, tops
        self._pieces = Pieces(tokenizer, stops)
        self._one_by_one = bool(stops) or tops is not None
        self._held: list[Spelled] = []  # tokens of text that is held back

    def take(self, news: News) -> Part:
        """Return what news of the answer's job add to it."""
        text = ""
        groups = [[token] for token in news.tokens] if self._one_by_one else [list(news.tokens)]
        for group in groups:
            if self._tops is not None:
                self._held.append(self._spelled(group[0]))
            self.count += len(group)
            text += self._pieces.add([token.id for token in group])
            if self._pieces.stopped:
                self.finish = "stop"
                break
        else:
            if news.ended:
                text += self._pieces.rest()
                self.finish = news.ended
        length = self._pieces.length
        # Of an answer that was stopped, tokens from the stop on are dropped; otherwise all come at the end.
        ready = [token for token in self._held if token.offset < length or (self.finish and not self._pieces.stopped)]
        self._held = self._held[len(ready) :]
        return Part(text, tuple(ready), self.finish)

    def _spelled(self, token: Token) -> Spelled:
        before = len(self._tokenizer.decode(self._pieces.ids, skip_special_tokens=True))
        tops = tuple((token_bytes(self._tokenizer, one), logprob) for one, logprob in token.tops)
        return Spelled(token_bytes(self._tokenizer, token.id), token.logprob, tops, before)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes that a token stands for; of a special token those of its name."""
    name = tokenizer.convert_ids_to_tokens(token)
    if name is None:  # a row of the embedding that is no token's
        return b""
    if token not in tokenizer.added_tokens_decoder:
        letters = _letters() if _is_byte_level(tokenizer) else None
        if letters:
            return bytes(letters[letter] for letter in name if letter in letters)
        if found := _BYTE.fullmatch(name):
            return bytes.fromhex(found[1])
    return name.replace("▁", " ").encode()


@functools.cache
def _letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


@functools.lru_cache(maxsize=8)
def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and "ByteLevel" in repr(backend.decoder)


class Writer:
    """Puts the parts of a request's answers into the API's objects.

    Args:
      asked: the request.
      chat: whether it is a chat, or a completion.
    """

    def __init__(self, asked: Asked, chat: bool):
        self.asked, self.chat = asked, chat
        self._id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def whole(self, parts: Sequence[Sequence[Part]], count: int) -> dict[str, Any]:
        """Return the object of all answers, of each one's parts in order; `count`: their tokens."""
        choices = [self._choice(place, _joined(of_answer)) for place, of_answer in enumerate(parts)]
        return self._object("", choices) | {"usage": self.usage(count)}

    def chunk(self, place: int, part: Part, first: bool) -> dict[str, Any]:
        """Return a stream's chunk with a part of one answer; `first`: it is that answer's first one."""
        return self._object(".chunk", [self._choice(place, part, first)], streamed=True)

    def last_chunk(self, count: int) -> dict[str, Any]:
        """Return a stream's chunk with the usage."""
        return self._object(".chunk", [], streamed=True) | {"usage": self.usage(count)}

    def usage(self, count: int) -> dict[str, int]:
        """Return the number of tokens."""
        prompt = sum(map(len, self.asked.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}

    def _object(self, suffix: str, choices: list[Any], streamed: bool = False) -> dict[str, Any]:
        kind = "chat.completion" + suffix if self.chat else "text_completion"
        usage = {"usage": None} if streamed and self.asked.usage else {}
        made = {"id": self._id, "object": kind, "created": self._created, "model": self.asked.model}
        return made | {"choices": choices} | usage

    def _choice(self, place: int, part: Part, first: bool | None = None) -> dict[str, Any]:
        """`first` is None for a whole answer."""
        shown = None
        if self.asked.tops is not None:
            shown = _chat_logprobs(part.tokens) if self.chat else _completion_logprobs(part.tokens)
        rest = {"index": place, "logprobs": shown, "finish_reason": part.finish}
        if not self.chat:
            before = self.asked.texts[place // self.asked.choices] if first is not False else ""
            return {"text": before + part.text} | rest
        said = {"content": part.text}
        if first is None:
            return {"message": {"role": "assistant"} | said | {"refusal": None}} | rest
        return {"delta": ({"role": "assistant"} if first else {}) | said} | rest


def event(content: Any) -> bytes:
    """Return an event of a stream (SSE)."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _joined(parts: Sequence[Part]) -> Part:
    tokens = tuple(token for part in parts for token in part.tokens)
    return Part("".join(part.text for part in parts), tokens, parts[-1].finish)


def _chat_logprobs(tokens: Sequence[Spelled]) -> dict[str, Any]:
    def one(token: Spelled) -> dict[str, Any]:
        return {"token": token.text, "logprob": token.logprob, "bytes": list(token.content)}

    tops = [[one(Spelled(*top)) for top in token.tops] for token in tokens]
    content = [one(token) | {"top_logprobs": top} for token, top in zip(tokens, tops, strict=True)]
    return {"content": content, "refusal": None}


def _completion_logprobs(tokens: Sequence[Spelled]) -> dict[str, Any]:
    tops = [{Spelled(*top).text: top[1] for top in token.tops} for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": [token.offset for token in tokens],
    }
