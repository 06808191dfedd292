"""The training command of a bash script, found by reading: variables are expanded, and nothing is executed.

The parser understands what the guide's listings contain: `export VAR="..."`, `$VAR` and `${VAR}`, quotes, comments,
lines that end in a backslash, `$@`. A command substitution is an error, because its value is known only by running it.
A script, and the values of all variables in a line, have at most a million characters, and the words of a script's
commands and variables ten million.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from tpu_tune.errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.S)
LONGEST_SCRIPT = LONGEST_LINE = 1_000_000  # characters; a kernel takes about as much for all words of a command
LONGEST_WORDS = 10_000_000
_EXPORTS = ("export", "declare", "readonly", "local")


def read_script(path: str, environ: Mapping[str, str] = os.environ) -> tuple[list[str], dict[str, str], list[str]]:
    """Read a bash script's one training command.

    Args:
      path: the file.
      environ: values of variables that the script does not set itself.

    Returns:
      (words of the command, variables that the script sets, other commands, which are not run).

    Raises:
      UserError: the file cannot be read, has no training command or several, or one that only a shell can evaluate.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(LONGEST_SCRIPT + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(text) > LONGEST_SCRIPT:
        raise UserError(f"{path}: more than {LONGEST_SCRIPT:,} characters, so it is not the script of a command")
    variables: dict[str, str] = {}
    commands: list[list[str]] = []
    others: list[str] = []
    length = 0
    for number, line in _lines(text):
        where = f"{path}:{number}"
        is_training = bool(re.search(r"--(model[_-]name[_-]or[_-]path|output[_-]dir|train[_-]file|dataset)\b", line))
        try:
            words = _words(line, {**environ, **variables}, where)
        except UserError:
            if is_training or _ASSIGNMENT.match(line.removeprefix("export ").strip()):
                raise
            others.append(line.strip())  # a condition or a loop, which is not run anyway
            continue
        length += sum(map(len, words))
        if length > LONGEST_WORDS:
            raise UserError(f"{where}: with its variables the script grows to more than {LONGEST_WORDS:,} characters")
        if words and words[0] in _EXPORTS:
            words = words[1:]
        if words and all(_ASSIGNMENT.fullmatch(word) for word in words):
            variables.update(_ASSIGNMENT.fullmatch(word).groups() for word in words)
        elif is_training:
            commands.append(words)
        elif words:
            others.append(" ".join(words))
    if len(commands) != 1:
        count = f"{len(commands)} training commands" if commands else "no command with --model_name_or_path"
        raise UserError(f"{path} has {count}; give the flags themselves: tpu-tune hf --model_name_or_path ...")
    return commands[0], variables, others


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the lines, those that end in a backslash joined, each with the number of its first line."""
    lines, unfinished, first = [], "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        first = first if unfinished else number
        if line.rstrip().endswith("\\") and not line.lstrip().startswith("#"):
            unfinished += line.rstrip()[:-1] + " "
            continue
        lines.append((first, unfinished + line))
        unfinished = ""
    return [*lines, (first, unfinished)] if unfinished else lines


def _words(line: str, variables: Mapping[str, str], where: str) -> list[str]:
    """Split a line into words as bash does, with variables expanded."""
    words: list[str] = []
    word, quote, started, index, grown = "", "", False, 0, 0
    while index < len(line):
        letter = line[index]
        if quote == "'":
            quote, word = ("", word) if letter == "'" else (quote, word + letter)
        elif letter == "'" and not quote:
            quote, started = "'", True
        elif line.startswith('"$@"', index) and not quote:
            index += 3
        elif letter == '"':
            quote, started = ("" if quote else '"'), True
        elif letter == "\\" and index + 1 < len(line):
            index += 1
            keep = quote and line[index] not in '"\\$`'
            word, started = word + ("\\" if keep else "") + line[index], True
        elif letter == "`" or line.startswith("$(", index):
            raise UserError(f"{where}: a command substitution, and the script is not run; write its value instead")
        elif letter == "$" and (variable := _VARIABLE.match(line, index)):
            name = variable[1] or variable[2]
            if name not in variables:
                raise UserError(
                    f"{where}: ${name} is not set; write {name}=... before it, or set it in the environment"
                )
            value = variables[name]
            grown += len(value)
            if grown > LONGEST_LINE:
                raise UserError(
                    f"{where}: with its variables it grows to more than {LONGEST_LINE:,} characters; write the values "
                    "themselves"
                )
            if quote:
                word, started = word + value, True
            else:  # bash splits a value without quotes
                pieces = value.split()
                for piece in pieces[:-1]:
                    words.append(word + piece)
                    word = ""
                word, started = word + (pieces[-1] if pieces else ""), started or bool(pieces)
            index = variable.end() - 1
        elif line.startswith(("$@", "$*", "${@}"), index):
            index += 3 if line.startswith("${@}", index) else 1
            started = started and bool(word)
        elif letter.isspace() and not quote:
            if started:
                words.append(word)
            word, started = "", False
        elif letter == "#" and not quote and not started:
            break
        elif letter in ";|&<>" and not quote:
            raise UserError(f"{where}: '{letter}' needs a shell; put the command and its flags alone on their line")
        else:
            word, started = word + letter, True
        index += 1
    if quote:
        raise UserError(f"{where}: a quote is not closed")
    return [*words, word] if started else words
