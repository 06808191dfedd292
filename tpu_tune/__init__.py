"""tpu_tune: fine-tune an open language model with JAX on a TPU, a GPU or a CPU, with the same code.

run = tpu_tune.train(tpu_tune.config.from_file("configs/quickstart.py"))
model = tpu_tune.load(run.output_dir)
model.generate(["What is AI?"])
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tpu_tune.errors import UserError

if TYPE_CHECKING:  # what takes time is imported where it is used, so that the program has its handler of Ctrl-C first
    from ml_collections import ConfigDict

    from tpu_tune import config
    from tpu_tune.inference import Model
    from tpu_tune.training.loop import Run

__version__ = "0.1.0"
__all__ = ["UserError", "config", "load", "plan", "train"]


def __getattr__(name: str) -> Any:
    if name != "config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("tpu_tune.config")


def load(
    path: str,
    dtype: str = "float32",
    quantize: str | None = None,
    adapter: str | None = None,
    step: int | str | None = None,
) -> Model:
    """Load a model, or what a run has trained: see `tpu_tune.inference.load`.

    Args:
      path: run directory, Hugging Face id, model directory or .gguf file, local or gs://.
      dtype: of activations and plain weights: float32, bfloat16 or float16.
      quantize: none, int8, int4, nf4 or mxfp4; by default as the run stored its base, none of a model.
      adapter: a PEFT adapter directory, or a run that has trained one; of a run, in place of its own.
      step: a checkpoint of the run: its step, "last" or "best"; by default what the run ended with, or, where it has
        not ended, its last checkpoint (the best under `train.load_best_model_at_end`).
    """
    from tpu_tune.inference import load as load_model

    return load_model(path, dtype, quantize, adapter, step=step)


def plan(config: ConfigDict | Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return what a job needs of a device, by the device's own compiler where it is installed.

    See `tpu_tune.planning.plan`.

    Args:
      config: a `ConfigDict` from `tpu_tune.config`, or nested dicts of what differs from the defaults. Neither weights
        nor data need to be there; `model.path` may name a published model, such as llama-7b.
      device: such as v5e-1, v3-8, rtx4090, "h100 x2".

    Returns:
      The figures that `tpu-tune plan --json` prints.
    """
    from tpu_tune.planning import plan as plan_job

    return plan_job(config, device)


def train(config: ConfigDict | Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> Run:
    """Train by a configuration, draw its curves and judge them on the way: see `tpu_tune.training.loop.train`.

    `curves.png` grows and a line says how it goes after every evaluation, and another where the learning rate looks
    wrong; `report.html` is written at the end.

    Args:
      config: a `ConfigDict` from `tpu_tune.config`, or nested dicts of what differs from the defaults.
      facts: what else the run's `summary.json` is to hold.

    Returns:
      The run: `run.metrics` (rows of metrics.jsonl), `run.output_dir`, `run.result_dir`, `run.status`.
    """
    import jax

    from tpu_tune.config import from_dict
    from tpu_tune.curves.callbacks import on_evaluate, on_train_end
    from tpu_tune.training.loop import PRINT
    from tpu_tune.training.loop import train as train_loop

    config = from_dict(config)
    run = train_loop(config, on_eval=on_evaluate(config.output_dir), facts=facts)
    if run.status != "already finished" and jax.process_index() == 0:
        for line in on_train_end(config.output_dir):
            PRINT(line)
    return run
