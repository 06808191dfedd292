"""`evaluate_only(config)`: the evaluation of a run without the run; nothing is trained and nothing written.

A finished run in `output_dir` is what is evaluated; without one, the model as it is before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.training import evaluation, run_start
from tpu_tune.training.loop import PRINT
from tpu_tune.training.opening import open_session
from tpu_tune.training.prepare_steps import prepare_evaluation


def evaluate_only(config: Mapping[str, Any] | ConfigDict, say: Callable[[str], None] = PRINT) -> dict[str, Any]:
    """Return the metrics of `evaluation.evaluate` over the rows that a run of this configuration holds out.

    Args:
      config: the configuration; `output_dir` is read and not written, `data.train` may be empty where `data.eval` is
        given.
      say: receives the few lines meant for the user.

    Returns:
      The metrics, and `evaluated`: the directory of the trained result, or `model.path`.

    Raises:
      UserError: anything the user can mend, or no rows to evaluate on.
    """
    say = say if jax.process_index() == 0 else lambda line: None
    session = open_session(config, _find_result, say, evaluate_only=True)
    config, rows = session.config, session.data.eval
    result = RunDirectory(config.output_dir).result(config.method)
    evaluated = result if result == config.model.adapter else config.model.path
    say(f"evaluating {evaluated}: {len(rows)} rows of {rows.width} tokens; nothing is trained")
    steps = prepare_evaluation(config, session.model)
    metrics, unit = evaluation.evaluate(steps, session.model.trainable, session), steps.objective.unit
    say(f"{evaluation.describe(metrics)} over {metrics[f'eval_num_{unit}']:,} {unit}")
    return {"evaluated": evaluated, **metrics}


def _find_result(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Return a configuration with its run's seeds, and with its run's result as the model where there is one."""
    config, notes = run_start.with_seeds(config)  # the held-out rows go by the seed
    result = RunDirectory(config.output_dir).result(config.method)
    if storage.is_complete(result):
        if config.method == "lora":
            config.model.adapter = result
        else:
            config.model.path, config.model.add_special_tokens = result, []
    return config, notes
