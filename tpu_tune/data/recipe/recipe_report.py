"""One HTML page that says what a recipe did: rows in and out of each stage, every figure, pictures, sample rows.

The page needs nothing from outside: pictures are inside it, there is no script, and all text from the data is escaped.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpu_tune.data.recipe.stages import Done
from tpu_tune.data.streams import Skipped, aside, read_json_lines

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1rem; display: block; overflow-x: auto } th, td { border: 1px solid #ccc; padding: .25rem .6rem;
vertical-align: top; text-align: left } th { white-space: nowrap } td.number { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f5f5f5; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere } img { max-width: 100% }
summary { cursor: pointer } h2 { border-bottom: 1px solid #ccc; margin-top: 2rem } .quiet { color: #666 }
"""
_MOST_TEXT = 1500  # characters of one sample row


def write_report(path: Path, title: str, stages: Sequence[Done], samples: int = 3) -> None:
    """Write the page of a recipe's finished stages.

    Args:
      samples: rows shown of each stage that writes JSON Lines.

    Raises:
      UserError: the file cannot be written.
    """
    body = [f"<h1>{html.escape(title)}</h1>", _overview(stages)]
    for number, stage in enumerate(stages, start=1):
        body.append(_section(number, stage, samples))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )
    with aside(path) as temporary:
        # Half a surrogate pair in a row is no character: it is shown as the replacement mark.
        temporary.write_bytes(page.encode("utf-8", "replace"))


def _overview(stages: Sequence[Done]) -> str:
    rows = []
    for stage in stages:
        size = sum(Path(name).stat().st_size for name in stage.outputs)
        rows.append(
            [
                stage.name,
                stage.report.get("rows_in", ""),
                stage.report.get("rows_out", ""),
                f"{size / 1e6:,.1f} MB",
                f"{stage.seconds:,.1f} s",
            ]
        )
    return _grid(["stage", "rows in", "rows out", "on disk", "took"], rows)


def _section(number: int, stage: Done, samples: int) -> str:
    parts = [f"<h2>{number}. {html.escape(stage.name)}</h2>"]
    if stage.parameters:
        told = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in stage.parameters.items())
        parts.append(f'<p class="quiet">{html.escape(told)}</p>')
    parts.append(_value(stage.report))
    for picture in sorted(stage.folder.glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="{html.escape(picture.name)}" src="data:image/png;base64,{data}"></p>')
    for name in stage.outputs:
        rows = _samples(name, samples)
        if rows:
            shown = "\n\n".join(_cut(json.dumps(row, ensure_ascii=False, indent=1)) for row in rows)
            head = f"first rows of {Path(name).name}"
            parts.append(f"<details><summary>{html.escape(head)}</summary><pre>{html.escape(shown)}</pre></details>")
    return "\n".join(parts)


def _samples(name: str, count: int) -> list[dict[str, Any]]:
    if not name.endswith((".jsonl", ".jsonl.gz")):
        return []
    rows = []
    for _, row in read_json_lines(name, Skipped(allowed=True)):
        if len(rows) == count:
            break
        rows.append(row)
    return rows


def _value(value: Any) -> str:
    """A report's value as HTML: objects and lists of objects as tables, numbers with thousands separated."""
    if isinstance(value, Mapping):
        cells = [f"<tr><th>{html.escape(str(key))}</th><td>{_value(item)}</td></tr>" for key, item in value.items()]
        return f"<table>{''.join(cells)}</table>" if cells else '<span class="quiet">none</span>'
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) for item in value):
            keys = list(dict.fromkeys(key for item in value for key in item))
            return _grid(keys, [[item.get(key, "") for key in keys] for item in value])
        return "<br>".join(_value(item) for item in value) or '<span class="quiet">none</span>'
    if isinstance(value, bool) or value is None:
        return html.escape(json.dumps(value))
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return html.escape(_cut(str(value)))


def _grid(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in heads)
    lines = []
    for row in rows:
        cells = "".join(f"<td{_number(cell)}>{_value(cell)}</td>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _number(cell: Any) -> str:
    return ' class="number"' if isinstance(cell, int | float) and not isinstance(cell, bool) else ""


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} [...{len(text) - _MOST_TEXT:,} characters more]"
