"""From parsed arguments to a step's options."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any


def same_names(options_class: type, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that are fields of a dataclass of options."""
    names = [field.name for field in dataclasses.fields(options_class)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def add_as(group: Any) -> None:
    """Add `--as` to a parser or a group of its arguments."""
    group.add_argument(
        "--as",
        dest="as_format",
        choices=("messages",),
        default="",
        help="write all rows as messages: pairs as a user's and an assistant's turn, a text as the assistant's words",
    )
