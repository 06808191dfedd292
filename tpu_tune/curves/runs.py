"""Read what a run has left behind, for its curves: metrics, configuration, summary and sample answers.

Nothing is written here, and nothing has to be whole: a metrics file that a kill has cut in the middle of a line loses
that line in the picture and not in the file, and says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import RunDirectory, one_line_error, read_json_lines
from tpu_tune.checkpoints.run_values import SUMMARY, config_kinds, without_odd
from tpu_tune.curves.diagnosis import Diagnosis, diagnose
from tpu_tune.errors import UserError


@dataclass(frozen=True)
class CurveRun:
    """A run as its curves need it.

    Attributes:
      name: to call it by; the last part of its path.
      path: as given: a run directory, or a metrics file.
      metrics: the whole rows of metrics.jsonl, in the file's order.
      config: of config.json, {} without one.
      summary: of summary.json, {} without one: the data's counts, the model's size, memory, steps.
      samples: of samples.jsonl: `prompt`, `before`, `after`.
      saved_steps: of the checkpoints that are there.
      notes: what could not be read.
    """

    name: str
    path: str
    metrics: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    saved_steps: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def diagnosis(self) -> Diagnosis:
        """Judge it: see `diagnose`."""
        vocab_size, total = self.summary.get("vocab_size"), self.summary.get("total_steps")
        best = bool(self.config.get("train", {}).get("load_best_model_at_end"))
        return diagnose(self.metrics, self.saved_steps, vocab_size, total, best)


def read_runs(paths: Sequence[str | os.PathLike]) -> list[CurveRun]:
    """Read several runs; those that are called the same are named by their whole paths.

    Raises:
      UserError: as `read_run`.
    """
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [CurveRun(**{**vars(r), "name": r.path}) if names.count(r.name) > 1 else r for r in runs]


def read_run(path: str | os.PathLike) -> CurveRun:
    """Read a run directory (or a metrics.jsonl alone), in a bucket or on a disk.

    Raises:
      UserError: it is not there, or holds no metrics; one line that says which.
    """
    path = os.fspath(path).rstrip("/") or "/"
    with one_line_error(path):
        if not storage.exists(path):
            raise UserError(f"{path}: there is no such run directory")
        run = RunDirectory(path) if storage.is_dir(path) else None
    file = run.file("metrics.jsonl") if run else path
    metrics = read_json_lines(file)
    if metrics is None:
        raise UserError(f"{path}: no metrics.jsonl in it; name a run's output_dir (a run writes it at its first step)")
    if not any("loss" in row or "eval_loss" in row for row in metrics.rows):
        raise UserError(f"{file}: holds no row with a loss" + (f" ({metrics.notes[0]})" if metrics.notes else ""))
    name, notes = os.path.basename(storage.absolute(path)), list(metrics.notes)
    if run is None:
        return CurveRun(name, path, metrics.rows, notes=notes)
    recorded: dict[str, dict[str, Any]] = {}
    for key in ("config", "summary"):
        try:
            content = run.read_json(f"{key}.json") or {}
            recorded[key], odd = without_odd(content, config_kinds() if key == "config" else SUMMARY)
            notes += [f"{key}.json: {one}" for one in odd]
        except UserError:
            notes.append(f"{key}.json cannot be read and was left out")
    samples = read_json_lines(run.file("samples.jsonl"))
    return CurveRun(
        name,
        path,
        metrics.rows,
        recorded.get("config", {}),
        recorded.get("summary", {}),
        _pairs(samples.rows if samples else []),
        run.saved_steps(),
        [*notes, *(samples.notes if samples else [])],
    )


def _pairs(samples: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Answers of step 0 and of the last step to the same prompts."""
    answers: dict[str, dict[int, str]] = {}
    for row in samples:
        if all(key in row for key in ("step", "prompt", "answer")) and isinstance(row["step"], int):
            answers.setdefault(str(row["prompt"]), {})[int(row["step"])] = str(row["answer"])
    return [
        {"prompt": prompt, "before": found.get(0, ""), "after": found[max(found)] if max(found) > 0 else ""}
        for prompt, found in answers.items()
    ]
