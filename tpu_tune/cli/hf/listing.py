"""What `tpu-tune hf` prints and writes of a translation."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tpu_tune import config as configuration
from tpu_tune.cli.hf.flags import ALIASES, FLAGS
from tpu_tune.cli.hf.translate import Translation
from tpu_tune.cli.hf.words import Given
from tpu_tune.errors import UserError


def lines(asked: Translation, given: Given, others: Sequence[str]) -> Iterator[str]:
    """Yield what is said before a run begins: configuration, notes, and what means nothing here."""
    if given.launcher:
        yield f"not needed: {given.launcher} (one command trains on every device that jax finds)"
    for command in others:
        yield f"not run: {command}"
    yield f"{len(given.values)} flags make this configuration (what differs from the defaults):"
    for key, value in changed(asked.config).items():
        yield "  " + shlex.quote(f"--config.{key}={value if isinstance(value, str) else json.dumps(value)}")
    if asked.notes:
        yield "to know:"
    for note in asked.notes:
        yield f"  {note}"
    if asked.ignored:
        yield "accepted, and without meaning here:"
    for name, why in asked.ignored.items():
        yield f"  {name}: {why}"


def as_json(asked: Translation) -> dict[str, Any]:
    """Return the same as JSON."""
    return {
        "config": changed(asked.config),
        "notes": asked.notes,
        "ignored": asked.ignored,
        "train": asked.train,
        "max_memory_bytes": asked.max_memory,
    }


def changed(config: Any) -> dict[str, Any]:
    """Return the dotted keys that differ from the defaults."""
    before = dict(configuration.flatten(configuration.default()))
    return {key: value for key, value in configuration.flatten(config) if value != before[key]}


def write_config(config: Any, path: str) -> None:
    """Write a config file that `tpu-tune train --config` takes.

    Raises:
      UserError: it cannot be written.
    """
    settings = "".join(f"    config.{key} = {value!r}\n" for key, value in changed(config).items())
    text = (
        '"""Written by `tpu-tune hf` from a script\'s flags."""\n\nfrom tpu_tune.config import default\n\n\n'
        f"def get_config():\n    config = default()\n{settings}    return config\n"
    )
    try:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def all_flags() -> Iterator[str]:
    """Yield every flag and what becomes of it."""
    words = {"used": "translated with others", "key": "", "ignored": "no meaning here: ", "refused": "error: "}
    for name in sorted(FLAGS, key=str.lower):
        flag = FLAGS[name]
        other = [alias for alias, own in ALIASES.items() if own == name]
        about = flag.key or words[flag.action] + flag.why
        yield f"--{name}" + (f" (also {', '.join('--' + alias for alias in other)})" if other else "")
        yield textwrap.fill(about, 116, initial_indent="    ", subsequent_indent="    ")
