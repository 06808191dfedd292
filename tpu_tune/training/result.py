"""The result of a run, written at its end: a PEFT adapter, or a Hugging Face model."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_tune.checkpoints import huggingface_write, peft
from tpu_tune.training import distributed
from tpu_tune.training.prepare_model import PreparedModel
from tpu_tune.training.step import TrainState


def write_result(config: ConfigDict, model: PreparedModel, state: TrainState, directory: str) -> None:
    """Write `adapter/` or `model/` from process 0; every process has to call this.

    Raises:
      UserError: it cannot be written.
    """
    trainable = jax.tree.map(distributed.full_array, state.trainable)
    ends = _frozen_ends(model)
    if jax.process_index() != 0:
        return
    if model.targets is not None:
        peft.write_adapter(
            directory, trainable, model.targets, model.architecture, config.model.path, ends, model.source
        )
    else:
        huggingface_write.write_model(directory, trainable, model.source, model.architecture)


def _frozen_ends(model: PreparedModel) -> dict[str, Any]:
    """Return the frozen leaves that an adapter is written with: an adapted embedding or head stands beside its adapter.

    One process holds all leaves in full anyway; of several, only these are gathered.
    """
    if jax.process_count() == 1 or model.targets is None:
        return model.frozen
    adapted = {f"{target.module.tied_to or target.module.path}.weight" for target in model.targets.adapted}
    ends = {
        f"{module.path}.weight"
        for module in model.architecture.modules()
        if module.kind == "embedding" or module.is_head
    }
    paths = sorted(adapted & ends & model.frozen.keys())
    return {path: jax.tree.map(distributed.full_array, model.frozen[path]) for path in paths}
