"""The run that a path belongs to, and how its rows asked: a model is asked in the form that it was taught in."""

from __future__ import annotations

import os
from typing import Any

from tpu_tune.checkpoints.prompts import taught_as
from tpu_tune.checkpoints.run_directory import RunDirectory


def run_of(path: str | None) -> RunDirectory | None:
    """Return the run that a path names, or whose `adapter` or `model` it names; None where there is none."""
    if not path:
        return None
    path = os.fspath(path).rstrip("/")
    places = [path, os.path.dirname(path)] if os.path.basename(path) in ("adapter", "model") else [path]
    return next((run for run in map(RunDirectory, places) if run.exists()), None)


def prompts_of(run: RunDirectory) -> dict[str, Any]:
    """Return how a run's rows asked, as the fields of `Model`: BOS, the template's variables, the form."""
    data = run.config().data
    return {
        "always_bos": data.add_bos_token == "always",
        "chat_template_kwargs": dict(data.chat_template_kwargs),
        "taught": taught_as((run.summary().get("data") or {}).get("train")),
    }
