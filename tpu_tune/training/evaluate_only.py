"""`evaluate_only(config)`: the evaluation of a run without the run; nothing is trained and nothing written.

What the run in `output_dir` has trained is what is evaluated; without one, the model as it is before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import counted
from tpu_tune.inference.run_result import Step, find_step, result_of
from tpu_tune.training import evaluation, run_start
from tpu_tune.training.loop import PRINT
from tpu_tune.training.opening import open_session
from tpu_tune.training.prepare_steps import prepare_evaluation


def evaluate_only(
    config: Mapping[str, Any] | ConfigDict, say: Callable[[str], None] = PRINT, step: Step = None
) -> dict[str, Any]:
    """Return the metrics of `evaluation.evaluate` over the rows that a run of this configuration holds out.

    Args:
      config: the configuration; `output_dir` is read and not written, `data.train` may be empty where `data.eval` is
        given.
      say: receives the few lines meant for the user.
      step: a checkpoint's (see `run_result.find_step`); by default what the run ended with, or where it has not ended
        its last checkpoint.

    Returns:
      The metrics, and `evaluated`: the trained result or the checkpoint, or `model.path`.

    Raises:
      UserError: anything the user can mend, or no rows to evaluate on.
    """
    say = say if jax.process_index() == 0 else lambda line: None
    found: list[str] = []
    session = open_session(config, lambda new: _find_result(new, step, found), say, evaluate_only=True)
    config, rows = session.config, session.data.eval
    evaluated = found[0] if found else config.model.path
    say(f"evaluating {evaluated}: {counted(len(rows), 'row')} of {counted(rows.width, 'token')}; nothing is trained")
    steps = prepare_evaluation(config, session.model)
    metrics, unit = evaluation.evaluate(steps, session.model.trainable, session), steps.objective.unit
    say(f"{evaluation.describe(metrics)} over {metrics[f'eval_num_{unit}']:,} {unit}")
    return {"evaluated": evaluated, **metrics}


def _find_result(config: ConfigDict, step: Step, found: list[str]) -> tuple[ConfigDict, list[str]]:
    """Return a configuration with its run's seeds, and with what its run has trained as the model where there is any.

    What that is called is put into `found`.
    """
    config, notes = run_start.with_seeds(config)  # the held-out rows go by the seed
    run = RunDirectory(config.output_dir)
    if step is None and not run.has_result(config.method) and not run.saved_steps():
        return config, notes
    chosen = find_step(run, config, step)
    found.append(run.result(config.method) if chosen is None else run.file("checkpoints", str(chosen)))
    result = result_of(run, config, chosen)
    if config.method == "lora":
        config.model.adapter = result
    else:
        config.model.path, config.model.add_special_tokens = result, []
    return config, notes
