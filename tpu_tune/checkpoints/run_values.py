"""What a run's own files may hold: they may have been edited, or written by an older program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.models.values import NOTHING, OBJECT, TEXT, Kind, number, shown, whole

LARGEST = 1e100  # of a row's numbers; float32, in which they are computed, ends at 3.4e38
_STEP = whole(0, 2**53)
_NUMBER = number() | NOTHING
_COUNT = whole(0, 2**63) | NOTHING
_ROW = {
    **dict.fromkeys(
        ("loss", "eval_loss", "eval_perplexity", "token_accuracy", "eval_token_accuracy", "epoch", "learning_rate",
         "grad_norm", "tokens_per_second", "eval_runtime"),
        _NUMBER,
    ),
    **dict.fromkeys(("num_tokens", "skipped_steps"), _NUMBER),
}  # fmt: skip
SUMMARY: dict[str, Kind] = {
    **dict.fromkeys(("model", "family", "devices"), TEXT | NOTHING),
    **dict.fromkeys(
        ("vocab_size", "trainable_parameters", "rows_per_step", "steps_per_epoch", "parameters", "total_steps",
         "result_step", "device_peak_bytes", "host_peak_bytes"),
        _COUNT,
    ),
    "data": Kind("an object of objects", lambda value: OBJECT.holds(value) and all(map(OBJECT.holds, value.values()))),
}  # fmt: skip


def metrics_row(row: Any) -> dict[str, Any] | None:
    """Return a row of metrics.jsonl that can be drawn and compared; None where it has no step, or text for a number.

    Numbers that are not finite, or over LARGEST, become None, as the run itself writes them.
    """
    if not isinstance(row, dict) or not _STEP.holds(row.get("step")):
        return None
    row = {key: None if _is_endless(value) else value for key, value in row.items()}
    return row if all(kind.holds(row[key]) for key, kind in _ROW.items() if key in row) else None


def _is_endless(value: Any) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return True
    return isinstance(value, int | float) and abs(value) > LARGEST


def config_kinds() -> dict[str, Kind]:
    """What the sections of a config.json hold: each is an object."""
    return {key: OBJECT for key, value in configuration.default().items() if isinstance(value, ConfigDict)}


def without_odd(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> tuple[dict[str, Any], list[str]]:
    """Return values without those that are of another kind, and a sentence for each of these."""
    odd = [key for key, kind in kinds.items() if key in values and not kind.holds(values[key])]
    said = [f"'{key}' is {shown(values[key])}, not {kinds[key].words}, and was left out" for key in odd]
    return {key: value for key, value in values.items() if key not in odd}, said
