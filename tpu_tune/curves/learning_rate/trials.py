"""Short runs at many learning rates, one after another, with the model, the data and the step of a configuration.

The model is read once and the step compiled once: the rate is a value in the optimizer's state
(`training.optimizers.set_learning_rate`), and every run begins with the same weights, a fresh optimizer, the same rows
in the same order and the same dropout. Nothing is written, and `output_dir` is not touched.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tpu_tune.data import prefetch
from tpu_tune.training.evaluation import sum_batches
from tpu_tune.training.objectives import mean
from tpu_tune.training.opening import Session, open_session
from tpu_tune.training.optimizers import set_learning_rate
from tpu_tune.training.prepare_steps import Steps, prepare_steps
from tpu_tune.training.schedules import configured_schedule
from tpu_tune.training.step import TrainState

EVAL_BATCHES = 32  # at most, after a short run


@dataclasses.dataclass(frozen=True)
class Trials:
    """What all trial runs share.

    Attributes:
      session: the run's configuration, data and model, whose weights every trial begins with.
      steps: the compiled steps of training and evaluation.
    """

    session: Session
    steps: Steps

    @property
    def total(self) -> int:
        """Number of steps of the full run."""
        return self.session.length.total_steps


def open_trials(config: Mapping[str, Any] | ConfigDict) -> Trials:
    """Read the data and the model of a configuration, as `training.loop.train` does; no run directory is touched.

    Raises:
      UserError: whatever `train` would refuse about settings, data and model.
    """
    session = open_session(config, _draw_seeds)
    return Trials(session, prepare_steps(session.config, session.model, None))


def _draw_seeds(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    config.seed = config.seed if config.seed != -1 else secrets.randbelow(2**31)
    config.data.data_seed = config.data.data_seed if config.data.data_seed != -1 else secrets.randbelow(2**31)
    return config, []


def train(trials: Trials, rates: Sequence[float]) -> Iterator[tuple[float, TrainState]]:
    """Train from the start, a step for each of `rates`; yield each step's loss (nats per token) and the state after it.

    A state is valid until the next step, which reuses its memory.
    """
    state = trials.steps.start(trials.session.model.trainable)
    for rate, batch in zip(rates, prefetch(trials.session.batches.batch, 0, len(rates)), strict=True):
        state = dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, rate))
        state, metrics = trials.steps.train(state, trials.session.model.frozen, trials.steps.put_batch(batch, 1))
        yield float(metrics["loss"]), state


def untrained_losses(trials: Trials, steps: int, done: Callable[[int], None] = lambda count: None) -> list[float]:
    """Return the untrained model's loss on the batches of the first `steps` steps (nats per token).

    `done` is called after each step with their number so far.
    """
    losses = []
    for batch in prefetch(trials.session.batches.batch, 0, steps):
        micro_batches = [{name: array[i] for name, array in batch.items()} for i in range(len(batch["input_ids"]))]
        losses.append(_mean_loss(trials, trials.session.model.trainable, micro_batches))
        done(len(losses))
    return losses


def held_out_loss(trials: Trials, state: TrainState) -> float | None:
    """Return the loss on at most `EVAL_BATCHES` batches of evaluation rows (nats per token); None without such rows."""
    if trials.session.data.eval is None:
        return None
    return _mean_loss(
        trials, trials.steps.averaged(state).trainable, itertools.islice(trials.session.eval_batches(), EVAL_BATCHES)
    )


def scheduled(trials: Trials, rate: float, steps: int) -> np.ndarray:
    """Return the learning rates of a run of `steps` steps: the whole schedule, compressed, with its peak at `rate`."""
    train = trials.session.config.train
    warmup = math.ceil(train.warmup_steps * min(1, steps / trials.total))
    schedule = configured_schedule(ConfigDict({**train, "learning_rate": rate, "warmup_steps": warmup}), steps)
    return np.asarray(jax.vmap(schedule)(np.arange(steps)), float)


def _mean_loss(trials: Trials, trainable: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    return mean(*sum_batches(trials.steps, trainable, trials.session.model.frozen, batches)["loss"])
