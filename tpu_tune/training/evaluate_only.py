"""`evaluate_only(config)`: the evaluation of a run without the run; nothing is trained and nothing written.

settings -> mesh -> data -> model -> one pass over the held-out rows. A finished run in `output_dir` is what is
evaluated; without one, the model as it is before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import huggingface_write
from tpu_tune.errors import UserError
from tpu_tune.training import distributed, run_directory
from tpu_tune.training.evaluation import evaluate
from tpu_tune.training.loop import PRINT, open_data, same_seeds
from tpu_tune.training.setup import check_settings, micro_batch_rows, prepare_evaluation, prepare_model
from tpu_tune.transforms import sharding


def evaluate_only(config: Mapping[str, Any] | ConfigDict, say: Callable[[str], None] = PRINT) -> dict[str, Any]:
    """Return the metrics of `evaluation.evaluate` over the rows that a run of this configuration holds out.

    Args:
      config: the configuration; `output_dir` is read and not written, `data.train` may be empty where `data.eval` is given.
      say: receives the few lines meant for the user.

    Returns:
      The metrics, and `evaluated`: the directory of the trained result, or `model.path`.

    Raises:
      UserError: anything the user can mend, or no rows to evaluate on.
    """
    say = say if jax.process_index() == 0 else lambda line: None
    config, found, notes = distributed.together("settings", lambda: _settings(config))
    for note in notes:
        say(note)
    mesh = sharding.make_mesh(config.mesh)
    eval_rows = micro_batch_rows(config, mesh)[1]
    config = same_seeds(config)
    data = distributed.together("data", lambda: open_data(config, mesh))
    if data.eval is None:
        raise UserError("there are no rows to evaluate on; give data.eval, or a data.eval_ratio above 0")
    model = prepare_model(config, mesh)
    say(f"evaluating {found}: {len(data.eval)} rows of {data.eval.width} tokens; nothing is trained")
    steps = prepare_evaluation(config, model)
    mine = sharding.rows_here(mesh, eval_rows)
    metrics = evaluate(steps, model.trainable, model.frozen, data.eval, eval_rows, mine)
    say(
        f"eval_loss {metrics['eval_loss']:.4f}, perplexity {metrics['eval_perplexity']:.2f}, "
        f"accuracy {metrics['eval_token_accuracy']:.1%} over {metrics['eval_num_tokens']:,} target tokens"
    )
    return {"evaluated": found, **metrics}


def _settings(config: Mapping[str, Any] | ConfigDict) -> tuple[ConfigDict, str, list[str]]:
    """Return the configuration with the run's seeds and result in it, what is evaluated, and what to say."""
    config = configuration.from_dict(config)
    config.data.train = config.data.train or config.data.eval
    config, notes = run_directory.with_seeds(check_settings(config))  # the held-out rows go by the seed
    result = run_directory.path(config.output_dir, "adapter" if config.method == "lora" else "model")
    if not huggingface_write.is_whole(result):
        return config, config.model.path, notes
    if config.method == "lora":
        config.model.adapter = result
    else:
        config.model.path, config.model.add_special_tokens = result, []
    return config, result, notes
