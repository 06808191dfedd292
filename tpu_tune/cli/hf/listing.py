"""The output of `tpu-tune hf`: a translation as text, as JSON and as a config file, and the list of all flags."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.cli.hf.command_line import ScriptFlags
from tpu_tune.cli.hf.flags import ALIASES, FLAGS
from tpu_tune.cli.hf.translate import Translation
from tpu_tune.errors import UserError


def lines(translation: Translation, flags: ScriptFlags, other_commands: Sequence[str]) -> Iterator[str]:
    """Yield the lines that are printed before a run: the configuration, notes, and the flags without effect."""
    if flags.launcher:
        yield f"not needed: {flags.launcher} (one command trains on every device that jax finds)"
    for command in other_commands:
        yield f"not run: {command}"
    yield f"{len(flags.values)} flags make this configuration (what differs from the defaults):"
    for key, value in changed(translation.config).items():
        yield "  " + shlex.quote(f"--config.{key}={value if isinstance(value, str) else json.dumps(value)}")
    if translation.notes:
        yield "notes:"
    for note in translation.notes:
        yield f"  {note}"
    if translation.ignored:
        yield "accepted, but without effect:"
    for name, why in translation.ignored.items():
        yield f"  {name}: {why}"


def as_json(translation: Translation) -> dict[str, Any]:
    """Return a translation as plain values for JSON."""
    return {
        "config": changed(translation.config),
        "notes": translation.notes,
        "ignored": translation.ignored,
        "train": translation.train,
        "max_memory_bytes": translation.max_memory,
    }


def changed(config: Any) -> dict[str, Any]:
    """Return the dotted keys that differ from the defaults, with their values."""
    default = dict(configuration.flatten(configuration.default()))
    return {key: value for key, value in configuration.flatten(config) if value != default[key]}


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
        storage.write_bytes(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def all_flags() -> Iterator[str]:
    """Yield every flag and what it is translated to."""
    actions = {"used": "translated together with others", "ignored": "no effect: ", "refused": "error: "}
    for name in sorted(FLAGS, key=str.lower):
        flag = FLAGS[name]
        aliases = [f"--{alias}" for alias, original in ALIASES.items() if original == name]
        yield f"--{name}" + (f" (also {', '.join(aliases)})" if aliases else "")
        yield textwrap.fill(
            flag.key or actions[flag.action] + flag.why, 116, initial_indent="    ", subsequent_indent="    "
        )
