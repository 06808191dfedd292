"""`evaluate_only(config)`: the loss of a configuration's model on its evaluation data, without a step of training.

What Hugging Face's scripts do under `--do_eval` alone. Model, data, mask and mesh are the training's; no optimizer is
made, no run directory is opened, nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.data import load_data
from tpu_tune.errors import UserError
from tpu_tune.training import distributed
from tpu_tune.training.evaluation import evaluate
from tpu_tune.training.execution import execution, loss_chunk
from tpu_tune.training.setup import Steps, check_settings, micro_batch_rows, open_model, prepare_model, put
from tpu_tune.training.step import Problem, make_eval_step
from tpu_tune.transforms import sharding


def evaluate_only(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Return the metrics of a configuration's model, adapter included, on its evaluation rows.

    Args:
      config: as for training; `data.train` may be empty where `data.eval` is given.

    Returns:
      What `evaluation.evaluate` returns: `eval_loss`, `eval_perplexity`, `eval_token_accuracy`, `eval_num_tokens`,
      `eval_runtime`.

    Raises:
      UserError: as in training, or no evaluation rows.
    """
    config = configuration.from_dict(config).copy_and_resolve_references()
    config.data.train = config.data.train or config.data.eval
    config = check_settings(config)
    mesh = sharding.make_mesh(config.mesh)
    rows = micro_batch_rows(config, mesh)[1]

    def read() -> Any:
        source, arch = open_model(config)
        start_token = arch.start_token if arch.encoder else None
        data = load_data(config, source.load_tokenizer(), arch.vocab_size, start_token)
        if data.eval is None:
            raise UserError("there are no rows to evaluate on; set data.eval, or data.eval_ratio above 0")
        return data.eval

    held_out = distributed.together("data", read)
    model = prepare_model(config, mesh)
    arch, each = model.architecture, config.train.per_device_eval_batch_size
    run = execution(config, arch, mesh, model.shardings, each)
    problem = Problem(arch, run, model.targets, loss_chunk(config, arch.vocab_size, each))
    home = NamedSharding(mesh, sharding.batch_spec(0))

    def put_batch(batch: Mapping[str, np.ndarray], leading: int) -> dict[str, jax.Array]:
        return {name: put(array, home) for name, array in batch.items()}

    steps = Steps(None, jax.jit(make_eval_step(problem)), None, put_batch)  # nothing is trained, so no state either
    return evaluate(steps, model.trainable, model.frozen, held_out, rows, sharding.rows_here(mesh, rows))
