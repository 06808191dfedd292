"""Load what a user names, a model or a run directory.

A run is its model as it was trained, with its adapter, its chat template, and prompts that begin as its rows did.
"""

from __future__ import annotations

import dataclasses
import functools

from ml_collections import ConfigDict

from tpu_tune.checkpoints.adapter_base import base_of_adapter
from tpu_tune.checkpoints.chat_template import with_template_of
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model, load, load_source
from tpu_tune.inference.run_result import Step, open_base, read_own_adapter, result_of, trained_over
from tpu_tune.inference.taught import prompts_of, run_of
from tpu_tune.transforms import QuantizeConfig


def load_any(
    path: str,
    dtype: str | None = None,
    quantize: str | None = None,
    adapter: str | None = None,
    before: bool = False,
    step: Step = None,
    over: Model | None = None,
) -> Model:
    """Load a model, or a run's model; each may be in a bucket.

    Args:
      path: run directory, Hugging Face id, model directory or .gguf file.
      dtype: the dtype of activations and plain weights; by default the run's own, float32 for a model.
      quantize: none, int8, int4, nf4 or mxfp4; by default as the run stored its base, none of a model.
      adapter: a PEFT adapter directory, or a run that has trained one; of a run, in place of its own.
      before: load a run's model as it was before training.
      step: a checkpoint of the run (of `adapter`'s, where only that is one): its step, `last` or `best`. By default
        what the run ended with; of one that has not ended its last checkpoint, or its best under
        `train.load_best_model_at_end`, which is said aloud.
      over: a model without an adapter whose weights are used where they are the same, see `load`.

    Raises:
      UserError: nothing usable there, a run without result or checkpoint, or `before` or `step` of what is no run.
    """
    run = RunDirectory(path)
    is_run = run.exists()
    taught_by = run_of(adapter or path) or (run if is_run else None)
    if adapter and RunDirectory(adapter).exists():
        adapter, step = _adapter_of(RunDirectory(adapter), None if is_run else step), step if is_run else None
    if not is_run and (before or step is not None):
        what = "model from before its training" if before else f"checkpoint of step {step}"
        raise UserError(f"{path} is no run directory, so it has no {what}")
    if step is not None and (before or adapter):
        raise UserError(f"step {step} is a checkpoint of the run, which {'--base' if before else '--adapter'} replaces")
    if is_run:
        config = run.config()
        model = _load_run(run, config, dtype or config.model.dtype, quantize, adapter, before, step, over)
    else:
        model = load(path, dtype or "float32", quantize, adapter, over)
    return dataclasses.replace(model, **prompts_of(taught_by)) if taught_by else model


def _load_run(
    run: RunDirectory,
    config: ConfigDict,
    dtype: str,
    quantize: str | None,
    adapter: str | None,
    before: bool,
    step: Step,
    over: Model | None,
) -> Model:
    """Load a run's model: see `load_any`."""
    if config.method != "lora" and not before:
        return load(result_of(run, config, step), dtype, quantize, adapter, over)
    quantization = QuantizeConfig(**config.quantize) if quantize is None else QuantizeConfig(quantize)
    trained = None if before or adapter else result_of(run, config, step)
    source = open_base(run, config)
    as_in_training = quantize is None
    if as_in_training:
        source = trained_over(run, config, source, bool(trained))
    if adapter:
        source = base_of_adapter(with_template_of(source, adapter), adapter)
    chosen = adapter or trained or config.model.adapter or None
    read = functools.partial(read_own_adapter, run, config) if trained and as_in_training else None
    return load_source(source, dtype, quantization, chosen, read, over)


def _adapter_of(run: RunDirectory, step: Step) -> str:
    """Return the directory of the adapter that a run has trained."""
    config = run.config()
    if config.method != "lora":
        raise UserError(f"{run.path} trained every weight, so it has no adapter; give it as the model")
    return result_of(run, config, step)
