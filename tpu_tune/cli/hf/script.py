"""The training command of a bash script, found by reading: assignments are expanded, and nothing is executed.

What the guide's listings are made of is understood: `export VAR="..."`, `$VAR` and `${VAR}`, quotes, comments, lines that
end in a backslash, `$@`. A command substitution is an error, because knowing its value would mean running it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from tpu_tune.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
_EXPORTS = ("export", "declare", "readonly", "local")


def read_script(path: str, environ: Mapping[str, str] = os.environ) -> tuple[list[str], dict[str, str], list[str]]:
    """Read a bash script's one training command.

    Args:
      path: the file.
      environ: for variables that the script does not set.

    Returns:
      (words of the command, variables that the script sets, other commands, which are not run).

    Raises:
      UserError: the file cannot be read, holds no training command or several, or what only a shell can evaluate.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    variables: dict[str, str] = {}
    found: list[list[str]] = []
    others: list[str] = []
    for number, line in _lines(text):
        where = f"{path}:{number}"
        is_training = bool(re.search(r"--(model[_-]name[_-]or[_-]path|output[_-]dir|train[_-]file|dataset)\b", line))
        try:
            words = _words(line, {**environ, **variables}, where)
        except UserError:
            if is_training or _ASSIGNMENT.match(line.removeprefix("export ").strip()):
                raise
            others.append(line.strip())  # a condition, a loop: it is not run anyway
            continue
        if words and words[0] in _EXPORTS:
            words = words[1:]
        if words and all(_ASSIGNMENT.fullmatch(word) for word in words):
            variables.update(_ASSIGNMENT.fullmatch(word).groups() for word in words)
        elif is_training:
            found.append(words)
        elif words:
            others.append(" ".join(words))
    if len(found) != 1:
        what = "holds no command with --model_name_or_path" if not found else f"holds {len(found)} training commands"
        raise UserError(f"{path} {what}; give the flags themselves: tpu-tune hf --model_name_or_path ...")
    return found[0], variables, others


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the logical lines with the numbers of their first lines."""
    lines, held, first = [], "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        first = first if held else number
        if line.rstrip().endswith("\\") and not line.lstrip().startswith("#"):
            held += line.rstrip()[:-1] + " "
            continue
        lines.append((first, held + line))
        held = ""
    return [*lines, (first, held)] if held else lines


def _words(line: str, variables: Mapping[str, str], where: str) -> list[str]:
    """Split a line into words as bash does, with variables in place."""
    words: list[str] = []
    word, quote, started, at = "", "", False, 0
    while at < len(line):
        letter = line[at]
        if quote == "'":
            quote, word = ("", word) if letter == "'" else (quote, word + letter)
        elif letter == "'" and not quote:
            quote, started = "'", True
        elif line.startswith('"$@"', at) and not quote:
            at += 3
        elif letter == '"':
            quote, started = ("" if quote else '"'), True
        elif letter == "\\" and at + 1 < len(line):
            at += 1
            keep = quote and line[at] not in '"\\$`'
            word, started = word + ("\\" if keep else "") + line[at], True
        elif letter == "`" or line.startswith("$(", at):
            raise UserError(f"{where}: a command substitution, and nothing of a script is run; write its value there")
        elif letter == "$" and (variable := _VARIABLE.match(line, at)):
            name = variable[1] or variable[2]
            if name not in variables:
                raise UserError(
                    f"{where}: ${name} is not set; write {name}=... before it, or set it in the environment"
                )
            value = variables[name]
            if quote:
                word, started = word + value, True
            else:  # bash splits what stands without quotes
                parts = value.split()
                for part in parts[:-1]:
                    words.append(word + part)
                    word = ""
                word, started = word + (parts[-1] if parts else ""), started or bool(parts)
            at = variable.end() - 1
        elif line.startswith(("$@", "$*", "${@}"), at):
            at += 3 if line.startswith("${@}", at) else 1
            started = started and bool(word)
        elif letter.isspace() and not quote:
            if started:
                words.append(word)
            word, started = "", False
        elif letter == "#" and not quote and not started:
            break
        elif letter in ";|&<>" and not quote:
            raise UserError(f"{where}: '{letter}' is for a shell; leave the command and its flags alone on their line")
        else:
            word, started = word + letter, True
        at += 1
    if quote:
        raise UserError(f"{where}: a quote is not closed")
    return [*words, word] if started else words
