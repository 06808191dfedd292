"""Load what a user names, a model or a run directory.

A run is its model as it was trained, with its adapter, its chat template, and prompts that begin as its rows did.
"""

from __future__ import annotations

import dataclasses
import logging

from ml_collections import ConfigDict

from tpu_tune.checkpoints.adapter_base import base_of_adapter
from tpu_tune.checkpoints.chat_template import read_text, template_of, with_template_of
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.vocabulary import open_configured
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.inference.model import Model, load, load_source
from tpu_tune.inference.taught import prompts_of, run_of
from tpu_tune.transforms import QuantizeConfig

logger = logging.getLogger(__name__)


def load_any(
    path: str, dtype: str | None = None, quantize: str | None = None, adapter: str | None = None, before: bool = False
) -> Model:
    """Load a model, or a run's model; each may be in a bucket.

    Args:
      path: run directory, Hugging Face id, model directory or .gguf file.
      dtype: the dtype of activations and plain weights; by default the run's own, float32 for a model.
      quantize: none, int8, int4 or nf4; by default as the run stored its base, none of a model.
      adapter: a PEFT adapter directory; of a run, in place of its own.
      before: load a run's model as it was before training.

    Raises:
      UserError: nothing usable there, a run that has not finished, or `before` of what is no run.
    """
    run = RunDirectory(path)
    if not run.exists():
        if before:
            raise UserError(f"{path} is no run directory, so it has no model from before its training")
        taught_by = run_of(adapter or path)
        model = load(path, dtype or "float32", quantize, adapter)
        return dataclasses.replace(model, **prompts_of(taught_by)) if taught_by else model
    config = run.config()
    model = _load_run(run, config, dtype or config.model.dtype, quantize, adapter, before)
    return dataclasses.replace(model, **prompts_of(run_of(adapter) or run))


def _load_run(
    run: RunDirectory, config: ConfigDict, dtype: str, quantize: str | None, adapter: str | None, before: bool
) -> Model:
    """Load a run's model: see `load_any`."""
    if config.method != "lora" and not before:
        return load(run.finished_result("full"), dtype, quantize, adapter)
    quantization = QuantizeConfig(**config.quantize) if quantize is None else QuantizeConfig(quantize)
    source = open_base(run, config)
    if before:
        adapter = config.model.adapter or None
    elif adapter:
        source = base_of_adapter(with_template_of(source, adapter), adapter)
    else:
        adapter = run.finished_result(config.method)
    return load_source(source, dtype, quantization, adapter)


def open_base(run: RunDirectory, config: ConfigDict) -> WeightSource:
    """Open the model that a run was trained on, with the tokens that it added and the chat template that it used.

    The template stands beside the run's result; where that has none, it is what the configuration says.

    Raises:
      UserError: it is not where it was.
    """
    template = template_of(run.result(config.method))
    if not template:
        try:
            template = read_text(config.data.chat_template)
        except UserError as error:  # of a run from before results carried it
            logger.warning("%s: %s; going on with the chat template of its base", run.path, error)
    try:
        return open_configured(config.model, template)
    except UserError as error:
        raise UserError(f"the model that {run.path} was trained on cannot be opened: {error}") from None
