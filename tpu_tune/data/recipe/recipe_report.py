"""One HTML page that says what a recipe did: rows in and out of each stage, every figure, pictures, sample rows.

The page needs nothing from outside: pictures are inside it, and there is no script.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_tune.data.html_report import render
from tpu_tune.data.recipe.stages import Done
from tpu_tune.data.streams import Skipped, aside, read_json_lines

_MOST_TEXT = 1500  # characters of one sample row


@dataclass(frozen=True)
class _Grid:
    """A list of objects as a table: their keys, and a row of values for each."""

    head: list[str]
    rows: list[list[Any]]


def write_report(path: Path, title: str, stages: Sequence[Done], samples: int = 3) -> None:
    """Write the page of a recipe's finished stages.

    Args:
      samples: rows shown of each stage that writes JSON Lines.

    Raises:
      UserError: the file cannot be written.
    """
    page = render(
        "tpu_tune.data",
        "recipe_report.html",
        title=title,
        overview=[_overview(stage) for stage in stages],
        stages=[_stage(stage, samples) for stage in stages],
        as_grid=_as_grid,
        plain=_plain,
    )
    with aside(path) as temporary:
        # Half a surrogate pair in a row is no character: it is shown as the replacement mark.
        temporary.write_bytes(page.encode("utf-8", "replace"))


def _overview(stage: Done) -> list[Any]:
    size = sum(Path(name).stat().st_size for name in stage.outputs)
    rows_in, rows_out = (stage.report.get(key, "") for key in ("rows_in", "rows_out"))
    return [stage.name, rows_in, rows_out, f"{size / 1e6:,.1f} MB", f"{stage.seconds:,.1f} s"]


def _stage(stage: Done, samples: int) -> dict[str, Any]:
    parameters = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in stage.parameters.items())
    return {
        "name": stage.name,
        "parameters": " ".join(parameters),
        "report": stage.report,
        "pictures": [
            (picture.name, base64.b64encode(picture.read_bytes()).decode())
            for picture in sorted(stage.folder.glob("*.png"))
        ],
        "samples": [(Path(name).name, rows) for name in stage.outputs if (rows := _samples(name, samples))],
    }


def _samples(name: str, count: int) -> str:
    """The first rows of a file of JSON Lines as text; empty for other files."""
    if not name.endswith((".jsonl", ".jsonl.gz")):
        return ""
    rows = []
    for _, row in read_json_lines(name, Skipped(allowed=True)):
        if len(rows) == count:
            break
        rows.append(_cut(json.dumps(row, ensure_ascii=False, indent=1)))
    return "\n\n".join(rows)


def _as_grid(value: Any) -> _Grid | None:
    """The table of a list of objects; None for any other value."""
    if not (isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value)):
        return None
    keys = list(dict.fromkeys(key for item in value for key in item))
    return _Grid(keys, [[item.get(key, "") for key in keys] for item in value])


def _plain(value: Any) -> str:
    """A text, or a number with its thousands separated."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} [...{len(text) - _MOST_TEXT:,} characters more]"
