"""A script's command line into {flag: value}, as Hugging Face's own parser reads it.

Dashes or underscores, `--flag value` or `--flag=value`, a bare flag or `true`/`True`/`no` for what is a switch, the last
of two when a flag stands twice. What a script has before its flags (`accelerate launch ./train.py`) is taken off.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from tpu_tune.cli.hf.flags import ALIASES, FLAGS, Flag
from tpu_tune.errors import UserError

_TRUE, _FALSE = ("true", "t", "yes", "y", "1", "on"), ("false", "f", "no", "n", "0", "off")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.S)
_NOTHING = ("None", "null")  # a value that leaves the flag unset


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command line says.

    Attributes:
      values: flag (with underscores, after `ALIASES`) -> value.
      written: flag -> as it was written, with dashes before it.
      launcher: what stood before the flags, in one line; "" for nothing.
      environ: variables set on the command line itself, `WANDB_PROJECT=x python ...`.
      notes: what `translate` has to say of the flags, one line each.
    """

    values: dict[str, Any]
    written: dict[str, str]
    launcher: str = ""
    environ: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a flag's value, or the default where it is not given."""
        return self.values.get(name, default)

    def said(self, name: str) -> str:
        """Return a flag as it was written."""
        return self.written.get(name, f"--{name}")

    def note(self, text: str) -> None:
        """Say a line aloud."""
        self.notes.append(text)


def parse(words: Sequence[str]) -> Given:
    """Read a command line.

    Raises:
      UserError: an unknown flag (the nearest is named), a value that is missing or of the wrong kind, or a stray word.
    """
    environ, launcher, words = _without_launcher(list(words))
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    unknown: list[str] = []
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not _is_flag(word):
            if unknown:  # it may be an unknown flag's value
                continue
            raise UserError(f"'{word}' stands where a flag was expected" + _behind(words, place))
        name, equals, joined = word.removeprefix("--").partition("=")
        found = _known(name)
        if found is None:
            unknown.append(name)
            continue
        name, flag, negative = found
        follows = [joined] if equals else []
        while not equals and place < len(words) and not _is_flag(words[place]) and _wants(flag, follows):
            follows.append(words[place])
            place += 1
        spelled = word.partition("=")[0]
        value = _value(flag, spelled, follows)
        if value is None:
            values.pop(name, None)
        else:
            values[name], written[name] = (not value if negative else value), spelled
    if unknown:
        raise UserError(_unknown(unknown))
    return Given(values, written, launcher, environ)


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _wants(flag: Flag, already: Sequence[str]) -> bool:
    """Whether the next word may be the flag's; a switch takes one if it is there."""
    return flag.kind is list or not already


def _known(name: str) -> tuple[str, Flag, bool] | None:
    """Return the flag's own name, the flag, and whether `--no_` stood before a switch's name."""
    plain = name.replace("-", "_")
    for given, negative in ((plain, False), (plain.removeprefix("no_"), True)):
        own = ALIASES.get(given, given)
        flag = FLAGS.get(own)
        if flag is None:  # max_memory_mb
            own = next((known for known in FLAGS if known.lower() == own.lower()), own)
            flag = FLAGS.get(own)
        if flag is not None and (not negative or flag.kind is bool):
            return own, flag, negative
    return None


def _unknown(names: Sequence[str]) -> str:
    known = {name.lower(): name for name in (*FLAGS, *ALIASES)}
    said = []
    for name in names:
        near = difflib.get_close_matches(name.replace("-", "_").lower(), known, 1, 0.6)
        said.append(f"--{name}" + (f" (did you mean --{known[near[0]]}?)" if near else ""))
    return f"unknown flag{'s' if len(said) > 1 else ''} {', '.join(said)}; `tpu-tune hf --flags` lists all"


def _behind(words: Sequence[str], place: int) -> str:
    before = next((word for word in reversed(words[: place - 1]) if _is_flag(word)), "")
    return f", behind {before}" if before else ""


def _value(flag: Flag, spelled: str, follows: Sequence[str]) -> Any:
    if flag.kind is bool and not follows:
        return True
    if not follows:
        if flag.action == "ignored":
            return ""
        raise UserError(f"{spelled} needs a value")
    text = follows[0]
    if text in _NOTHING or (flag.kind in (bool, int, float) and text.lower() == "none"):
        return None
    if flag.kind is list:
        return [part.strip() for word in follows for part in word.split(",") if part.strip()]
    if flag.kind is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        raise UserError(f"{spelled} is '{text}'; it must be true or false")
    if flag.kind is dict:
        return _json(spelled, text)
    try:
        number = float(text) if flag.kind in (int, float) else text
        return int(number) if flag.kind is int and number == int(number) else _held(flag, number)
    except (ValueError, OverflowError):
        kind = "a whole number" if flag.kind is int else "a number"
        raise UserError(f"{spelled} is '{text}'; it must be {kind}") from None


def _held(flag: Flag, number: Any) -> Any:
    if flag.kind is int:
        raise ValueError
    return number


def _json(spelled: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{spelled} is {text!r}, which is not JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise UserError(f"{spelled} is {text!r}; it must be a JSON object")
    return value


def _without_launcher(words: list[str]) -> tuple[dict[str, str], str, list[str]]:
    """Split off what stands before a script's flags: variables, `python`, `accelerate launch` and the script's name."""
    environ = {}
    while words and _ASSIGNMENT.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    if not words or _is_flag(words[0]):
        return environ, "", words
    end = _script(words)
    if end is None:  # the guide's `python --model_name_or_path ...`, whose script's name is lost
        end = next((at for at, word in enumerate(words) if _is_flag(word)), len(words))
    return environ, " ".join(words[:end]), words[end:]


def _script(words: Sequence[str]) -> int | None:
    """Return the place behind the script, whose own flags begin there."""
    for at, word in enumerate(words):
        if word.endswith(".py"):
            return at + 1
        if word == "-m" and at + 1 < len(words) and not words[at + 1].startswith("-"):
            if not words[at + 1].startswith(("torch.distributed", "accelerate.", "deepspeed")):
                return at + 2
        if "/" in word and at and not words[at - 1].startswith("-") and not word.startswith("-"):
            return at + 1
    return None
