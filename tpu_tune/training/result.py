"""The result of a run, written at its end: a PEFT adapter, or a Hugging Face model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.inference.run_result import says_how_taught, write_trained
from tpu_tune.training import distributed
from tpu_tune.training.prepare_model import PreparedModel
from tpu_tune.training.step import TrainState
from tpu_tune.transforms import Targets


def write_result(config: ConfigDict, model: PreparedModel, state: TrainState, directory: str) -> None:
    """Write `adapter/` or `model/` from process 0; every process has to call this.

    Raises:
      UserError: it cannot be written, or a weight is not finite.
    """
    if not bool(_all_finite(state.trainable)):
        raise UserError(
            f"the trained weights are not finite, so {directory} is not written: the last updates were too large. "
            "In another output_dir, lower train.learning_rate"
        )
    trainable = jax.tree.map(distributed.full_array, state.trainable)
    frozen = _frozen_parts(model)
    if jax.process_index() != 0:
        return
    source = says_how_taught(model.source, RunDirectory(config.output_dir))
    write_trained(directory, config, model.method, trainable, frozen, source, model.architecture)


@jax.jit
def _all_finite(leaves: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(leaves)] or [jnp.bool_(True)]).all()


def _frozen_parts(model: PreparedModel) -> dict[str, Any]:
    """Return the frozen leaves that a result is written with, which several processes have to gather.

    Beside an adapter these are an adapted embedding or head; a merged model takes all.
    """
    if jax.process_count() == 1:
        return model.frozen
    paths = sorted(model.frozen)
    if isinstance(model.method, Targets):
        adapted = {f"{target.module.tied_to or target.module.path}.weight" for target in model.method.adapted}
        ends = {
            module.weight for module in model.architecture.modules() if module.kind == "embedding" or module.is_head
        }
        paths = sorted(adapted & ends & model.frozen.keys())
    return {path: jax.tree.map(distributed.full_array, model.frozen[path]) for path in paths}
