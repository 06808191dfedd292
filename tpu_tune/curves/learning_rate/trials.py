"""Short runs of a configuration's own model, data and step at many learning rates, one after the other.

The model is read once and the step compiled once: the rate is a value in the optimizer's state
(`training.optimizers.set_learning_rate`), and every run begins with the same weights, a fresh optimizer, the same rows
in the same order and the same dropout. Nothing is written: `output_dir` is neither made nor looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from tpu_tune.training.schedules import make_schedule
from tpu_tune.training.step import TrainState

EVAL_BATCHES = 32  # at most, after a short run


@dataclasses.dataclass(frozen=True)
class Trials:
    """What every trial run shares.

    Attributes:
      session: the run's configuration, data and model; every trial begins with its weights.
      steps: the run's own jitted functions, but for the learning rate.
    """

    session: Session
    steps: Steps

    @property
    def total(self) -> int:
        """Steps of the run itself."""
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
    """Train from the start, a step for each of `rates`; yield each step's loss (nats a token) and the state after it.

    The state is good until the next one is asked for.
    """
    state = trials.steps.start(trials.session.model.trainable)
    for rate, batch in zip(rates, prefetch(trials.session.batches.batch, 0, len(rates)), strict=True):
        state = dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, rate))
        state, metrics = trials.steps.train(state, trials.session.model.frozen, trials.steps.put_batch(batch, 1))
        yield float(metrics["loss"]), state


def untrained_losses(trials: Trials, steps: int) -> list[float]:
    """Return the untouched model's loss on the batches of the first `steps` steps (nats a token)."""
    found = []
    for batch in prefetch(trials.session.batches.batch, 0, steps):
        micros = [{name: array[number] for name, array in batch.items()} for number in range(len(batch["input_ids"]))]
        found.append(_mean_loss(trials, trials.session.model.trainable, micros))
    return found


def held_out_loss(trials: Trials, state: TrainState) -> float | None:
    """Return the loss on the run's evaluation rows (nats a token), `EVAL_BATCHES` at most; None where it has none."""
    if trials.session.data.eval is None:
        return None
    return _mean_loss(trials, state.trainable, itertools.islice(trials.session.eval_batches(), EVAL_BATCHES))


def scheduled(trials: Trials, rate: float, steps: int) -> np.ndarray:
    """Return the learning rates of a run of `steps` steps: the schedule with its peak at `rate`, shortened to them."""
    train = trials.session.config.train
    warmup = math.ceil(train.warmup_steps * min(1, steps / trials.total))
    schedule = make_schedule(
        train.lr_scheduler_type, rate, steps, warmup, train.warmup_ratio, **train.lr_scheduler_kwargs
    )
    return np.asarray(jax.vmap(schedule)(np.arange(steps)), float)


def _mean_loss(trials: Trials, trainable: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    return mean(*sum_batches(trials.steps, trainable, trials.session.model.frozen, batches)["loss"])
