"""Phrases that mark a row as noise: the named lists, and how a phrase is looked for.

A phrase matches whatever its case, with any run of white space (line breaks, Markdown's * and _ too) between its words,
with straight or curly apostrophes and quotes, with any hyphen, with or without its commas, and as whole words only.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from tpu_tune.errors import UserError

# The Novice's LLM Training Guide, "Minimizing the noise".
GUIDE = ("As an AI language model", "harmful or offensive content", "trained by OpenAI")

# What assistants say when they refuse or speak about themselves. Several words each, so that a story in which somebody
# says "I cannot" stays; a dialogue between people can still hold one of them ("I'm sorry, but I can't come").
REFUSALS = (
    "as a language model",
    "as a large language model",
    "as an AI assistant",
    "as an AI chatbot",
    "as an AI model",
    "as an artificial intelligence",
    "as an AI, I",
    "as an AI developed by",
    "as an AI created by",
    "I am an AI language model",
    "I'm an AI language model",
    "I am only an AI",
    "I'm just an AI",
    "I'm only a language model",
    "I am a large language model",
    "I'm a large language model",
    "being an AI language model",
    "developed by OpenAI",
    "created by OpenAI",
    "OpenAI's content policy",
    "OpenAI's use case policy",
    "OpenAI's usage policies",
    "developed by Anthropic",
    "created by Anthropic",
    "trained by Google",
    "my knowledge cutoff",
    "my knowledge cut-off",
    "as of my last knowledge update",
    "as of my last training",
    "my training data only goes",
    "I do not have personal opinions",
    "I don't have personal opinions",
    "I do not have personal beliefs",
    "I don't have personal beliefs",
    "I do not have personal experiences",
    "I don't have personal experiences",
    "I don't have the ability to feel",
    "I do not have feelings or emotions",
    "I don't have feelings or emotions",
    "I do not have access to real-time",
    "I don't have access to real-time",
    "I cannot browse the internet",
    "I can't browse the internet",
    "I'm sorry, but I cannot",
    "I'm sorry, but I can't",
    "I am sorry, but I cannot",
    "I am sorry, but I can't",
    "I'm sorry, I cannot",
    "I'm sorry, I can't assist",
    "I'm sorry, but as an AI",
    "I apologize, but I cannot",
    "I apologize, but I can't",
    "I apologise, but I cannot",
    "I cannot fulfill that request",
    "I cannot fulfill this request",
    "I can't fulfill that request",
    "I can't fulfill this request",
    "I cannot fulfil your request",
    "I cannot fulfill your request",
    "I can't fulfill your request",
    "I cannot comply with",
    "I cannot assist with that",
    "I can't assist with that",
    "I cannot assist you with",
    "I cannot provide assistance with",
    "I cannot help with that request",
    "I can't help with that request",
    "I am not able to assist with",
    "I'm not able to assist with",
    "I am unable to assist with",
    "I'm unable to assist with",
    "I am unable to fulfill",
    "I'm unable to fulfill",
    "I am not programmed to",
    "I'm not programmed to",
    "I am programmed to",
    "my programming does not allow",
    "my programming prohibits",
    "it is not appropriate for me to",
    "it would not be appropriate for me to",
    "goes against my programming",
    "against my ethical guidelines",
    "promote harmful or illegal",
    "engage in illegal or unethical",
    "illegal or unethical activities",
)

# Single words that lists going about drop rows for. They also drop every honest text about ethics, law or the company.
SINGLE_WORDS = (
    "OpenAI",
    "ChatGPT",
    "Anthropic",
    "unethical",
    "ethical",
    "ethically",
    "ethics",
    "inappropriate",
    "offensive",
    "harmful",
    "illegal",
    "biased",
    "bias",
    "discriminatory",
    "stereotypes",
    "inclusive",
    "inclusivity",
    "responsibly",
    "sensitive",
    "controversial",
)

LISTS = {"guide": GUIDE, "refusals": REFUSALS, "single-words": SINGLE_WORDS}

_SEPARATOR = r"[\s*_\u200b\u00ad]+"
_LOOKALIKES = ("'’‘ʼ′`´＇", '"“”„‟«»＂', "-‐‑‒–—")


@dataclass(frozen=True)
class Phrase:
    """One phrase to look for.

    Attributes:
      text: as it was written; names it in reports.
      anchor: its longest word in small letters: a text without it cannot hold the phrase, which is quick to see.
      pattern: finds the phrase.
    """

    text: str
    anchor: str
    pattern: re.Pattern[str]


def compile_phrase(text: str) -> Phrase:
    """Make what finds `text`, as the module says.

    Raises:
      UserError: the phrase is empty.
    """
    words = unicodedata.normalize("NFC", text).split()
    if not words:
        raise UserError("a phrase to look for is empty; remove it")
    pattern = _SEPARATOR.join("".join(map(_character, word)) for word in words)
    # "was an AI language model" does not hold "as an AI language model".
    before = r"(?<!\w)" if words[0][0].isalnum() else ""
    after = r"(?!\w)" if words[-1][-1].isalnum() else ""
    anchor = max(re.findall(r"\w+", " ".join(words).lower()), key=len, default="")
    return Phrase(" ".join(words), anchor, re.compile(before + pattern + after, re.IGNORECASE))


def _character(character: str) -> str:
    if character == ",":
        return ",?"
    alike = next((group for group in _LOOKALIKES if character in group), "")
    return f"[{re.escape(alike)}]" if alike else re.escape(character)


def read_phrases(path: str | os.PathLike) -> tuple[str, ...]:
    """Read a list of phrases, one a line; empty lines and lines that begin with # are comments.

    Raises:
      UserError: the file cannot be read, is not UTF-8 or holds no phrase.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8; save the file as UTF-8") from error
    phrases = tuple(line for line in lines if line and not line.startswith("#"))
    if not phrases:
        raise UserError(f"{path}: holds no phrase; write one a line")
    return phrases


def compile_lists(names: Sequence[str], more: Sequence[str] = ()) -> tuple[Phrase, ...]:
    """The phrases of the named lists (keys of `LISTS`), then `more`, none twice.

    Raises:
      UserError: a list is unknown, or a phrase empty.
    """
    unknown = [name for name in names if name not in LISTS]
    if unknown:
        raise UserError(f"there is no list of phrases '{unknown[0]}'; known: {', '.join(LISTS)}")
    texts = [text for name in names for text in LISTS[name]] + list(more)
    phrases = {phrase.pattern.pattern.lower(): phrase for phrase in reversed([compile_phrase(text) for text in texts])}
    return tuple(reversed(phrases.values()))
