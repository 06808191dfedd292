"""A script's command line as {flag: value}, read as Hugging Face's own parser reads it.

Flags have dashes or underscores, may be cut short where only one flag begins like that (`--use_auth`), and their values
follow as `--flag value` or `--flag=value`; a switch stands alone or has `true`, `True`, `no` and the like; of a
repeated flag the last value counts. A launcher before the flags
(`accelerate launch ./train.py`) is removed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from tpu_tune.checkpoints import json_text
from tpu_tune.cli.hf.flags import ALIASES, FLAGS, Flag
from tpu_tune.errors import UserError

_TRUE, _FALSE = ("true", "t", "yes", "y", "1", "on"), ("false", "f", "no", "n", "0", "off")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.S)
_UNSET = ("None", "null")  # values that leave the flag unset


@dataclasses.dataclass(frozen=True)
class ScriptFlags:
    """The flags of a command line.

    Attributes:
      values: value of each flag, by its name with underscores, aliases resolved.
      spellings: each flag as the user wrote it, such as `--lora-r`, by the same names.
      launcher: the words before the flags, in one line; "" if there are none.
      environ: variables set on the command line itself: `WANDB_PROJECT=x python ...`.
      notes: remarks of `translate` for the user, one line each.
    """

    values: dict[str, Any]
    spellings: dict[str, str]
    launcher: str = ""
    environ: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a flag's value, or the default if it is not given."""
        return self.values.get(name, default)

    def spelled(self, name: str) -> str:
        """Return a flag as the user wrote it."""
        return self.spellings.get(name, f"--{name}")

    def note(self, text: str) -> None:
        """Add a remark for the user."""
        self.notes.append(text)


def parse(words: Sequence[str]) -> ScriptFlags:
    """Read a command line.

    Raises:
      UserError: an unknown flag (the nearest is named), a value that is missing or of the wrong kind, or a stray word.
    """
    environ, launcher, words = _split_launcher(list(words))
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}
    unknown: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not _is_flag(word):
            if unknown:  # it may be an unknown flag's value
                continue
            raise UserError(f"'{word}' is not a flag, but one was expected{_after(words, index)}")
        spelling, equals, joined = word.partition("=")
        known = _find_flag(spelling)
        if known is None:
            unknown.append(spelling.removeprefix("--"))
            continue
        name, flag, negative = known
        arguments = [joined] if equals else []
        while not equals and index < len(words) and not _is_flag(words[index]) and _takes_more(flag, arguments):
            arguments.append(words[index])
            index += 1
        value = _value(flag, spelling, arguments)
        if value is None:
            values.pop(name, None)
        else:
            values[name], spellings[name] = (not value if negative else value), spelling
    if unknown:
        raise UserError(_unknown(unknown))
    return ScriptFlags(values, spellings, launcher, environ)


def _is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _takes_more(flag: Flag, arguments: Sequence[str]) -> bool:
    """Return whether the flag takes another argument: a list takes any number, all others at most one."""
    return flag.kind is list or not arguments


def _find_flag(spelling: str) -> tuple[str, Flag, bool] | None:
    """Return the flag's name without alias, the flag, and whether it is a switch with `--no_` before its name."""
    plain = spelling.removeprefix("--").replace("-", "_")
    for alias, negative in ((plain, False), (plain.removeprefix("no_"), True)):
        name = ALIASES.get(alias, alias)
        if name not in FLAGS:  # max_memory_mb
            name = next((known for known in FLAGS if known.lower() == name.lower()), name)
        flag = FLAGS.get(name)
        if flag is not None and (not negative or flag.kind is bool):
            return name, flag, negative
    begun = {ALIASES.get(name, name) for name in (*FLAGS, *ALIASES) if plain and name.startswith(plain)}
    return (name := begun.pop(), FLAGS[name], False) if len(begun) == 1 else None


def _unknown(names: Sequence[str]) -> str:
    known = {name.lower(): name for name in (*FLAGS, *ALIASES)}
    listed = []
    for name in names:
        near = difflib.get_close_matches(name.replace("-", "_").lower(), known, 1, 0.6)
        listed.append(f"--{name}" + (f" (did you mean --{known[near[0]]}?)" if near else ""))
    return f"unknown flag{'s' if len(listed) > 1 else ''} {', '.join(listed)}; `tpu-tune hf --flags` lists all"


def _after(words: Sequence[str], index: int) -> str:
    before = next((word for word in reversed(words[: index - 1]) if _is_flag(word)), "")
    return f", after {before}" if before else ""


def _value(flag: Flag, spelling: str, arguments: Sequence[str]) -> Any:
    if flag.kind is bool and not arguments:
        return True
    if not arguments:
        if flag.action == "ignored":
            return ""
        raise UserError(f"{spelling} needs a value")
    text = arguments[0]
    if text in _UNSET or (flag.kind in (bool, int, float) and text.lower() == "none"):
        return None
    if flag.kind is list:
        return [part.strip() for word in arguments for part in word.split(",") if part.strip()]
    if flag.kind is bool:
        if text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        raise UserError(f"{spelling} is '{text}'; it must be true or false")
    if flag.kind is dict:
        return _json(spelling, text)
    if flag.kind not in (int, float):
        return text
    try:
        number = float(text)
        if not math.isfinite(number) or (flag.kind is int and number != int(number)):
            raise ValueError
        return flag.kind(number)
    except (ValueError, OverflowError):
        kind = "a whole number" if flag.kind is int else "a number"
        raise UserError(f"{spelling} is '{text}'; it must be {kind}") from None


def _json(spelling: str, text: str) -> dict[str, Any]:
    try:
        value = json_text.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{spelling} is {text!r}, which is not JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise UserError(f"{spelling} is {text!r}; it must be a JSON object")
    return value


def _split_launcher(words: list[str]) -> tuple[dict[str, str], str, list[str]]:
    """Return the variables before a command, its launcher (`accelerate launch train.py`), and the flags."""
    environ = {}
    while words and _ASSIGNMENT.fullmatch(words[0]):
        name, _, value = words.pop(0).partition("=")
        environ[name] = value
    if not words or _is_flag(words[0]):
        return environ, "", words
    end = _script_end(words)
    if end is None:  # the guide's `python --model_name_or_path ...`, which lacks the script's name
        end = next((index for index, word in enumerate(words) if _is_flag(word)), len(words))
    return environ, " ".join(words[:end]), words[end:]


def _script_end(words: Sequence[str]) -> int | None:
    """Return the index after the script's name, where its flags begin; None if no word is a script."""
    for index, word in enumerate(words):
        if word.endswith(".py"):
            return index + 1
        if word == "-m" and index + 1 < len(words) and not words[index + 1].startswith("-"):
            if not words[index + 1].startswith(("torch.distributed", "accelerate.", "deepspeed")):
                return index + 2
        if "/" in word and index and not words[index - 1].startswith("-") and not word.startswith("-"):
            return index + 1
    return None
