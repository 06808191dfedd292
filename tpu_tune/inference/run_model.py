"""Open what a user names, a model or a run directory, for use: a run is its model as it was trained, adapter included."""

from __future__ import annotations

import json
import os

from tpu_tune.checkpoints.vocabulary import open_configured
from tpu_tune.errors import UserError
from tpu_tune.inference.export import adapter_of, full_model, read_run
from tpu_tune.inference.model import Model, load, load_source
from tpu_tune.transforms import QuantizeConfig


def is_run(path: str) -> bool:
    """Whether `path` is a run directory: its config.json is this project's and not a model's."""
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "output_dir" in config and "model_type" not in config


def load_any(
    path: str, dtype: str | None = None, quantize: str | None = None, adapter: str | None = None, before: bool = False
) -> Model:
    """Load a model, or a run's model.

    Args:
      path: run directory, Hugging Face id, local directory or .gguf file.
      dtype: of the activations and plain weights; by default the run's own, float32 of a model.
      quantize: none, int8, int4 or nf4; by default as the run stored its base, none of a model.
      adapter: a PEFT adapter directory; of a run, in place of its own.
      before: of a run, its model as it was before training.

    Raises:
      UserError: nothing usable there, a run that has not finished, or `before` of what is no run.
    """
    if not is_run(path):
        if before:
            raise UserError(f"{path} is no run directory, so it has no model from before its training")
        return load(path, dtype or "float32", quantize, adapter)
    config = read_run(path)
    dtype = dtype or config.model.dtype
    if config.method == "full" and not before:
        return load(full_model(path), dtype, quantize, adapter)
    quantization = QuantizeConfig(**config.quantize) if quantize is None else QuantizeConfig(quantize)
    if before:
        adapter = config.model.adapter or None
    else:
        adapter = adapter or adapter_of(path, config)
    try:
        source = open_configured(config.model)
    except UserError as error:
        raise UserError(f"the model that {path} was trained on cannot be opened: {error}") from None
    return load_source(source, dtype, quantization, adapter)
