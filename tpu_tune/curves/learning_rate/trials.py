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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tpu_tune.data import Batches, Datasets, eval_batches, prefetch
from tpu_tune.training.loop import open_data, same_seeds, total_steps
from tpu_tune.training.optimizers import set_learning_rate
from tpu_tune.training.schedules import make_schedule
from tpu_tune.training.setup import (
    PreparedModel,
    Steps,
    check_settings,
    micro_batch_rows,
    prepare_model,
    prepare_steps,
)
from tpu_tune.training.step import TrainState
from tpu_tune.transforms import sharding

EVAL_BATCHES = 32  # at most, after a short run


@dataclasses.dataclass(frozen=True)
class Trials:
    """What all trial runs share.

    Attributes:
      config: the resolved configuration.
      model: the model, with the weights that every trial begins with.
      steps: the compiled steps of training and evaluation.
      batches: the training batches.
      data: the data; `data.eval` is None if there are no evaluation rows.
      total: number of steps of the full run.
    """

    config: ConfigDict
    model: PreparedModel
    steps: Steps
    batches: Batches
    data: Datasets
    total: int


def open_trials(config: Mapping[str, Any] | ConfigDict) -> Trials:
    """Read the data and the model of a configuration, as `training.loop.train` does; no run directory is touched.

    Raises:
      UserError: whatever `train` would refuse about settings, data and model.
    """
    config = check_settings(config)
    config.seed = config.seed if config.seed != -1 else secrets.randbelow(2**31)
    config.data.data_seed = config.data.data_seed if config.data.data_seed != -1 else secrets.randbelow(2**31)
    config = same_seeds(config)
    mesh = sharding.make_mesh(config.mesh)
    batch_rows, _ = micro_batch_rows(config, mesh)
    data = open_data(config, mesh)
    model = prepare_model(config, mesh)
    batches = Batches(
        data.train,
        batch_rows,
        config.train.gradient_accumulation_steps,
        config.data.data_seed,
        sharding.rows_here(mesh, batch_rows),
    )
    return Trials(config, model, prepare_steps(config, model, None), batches, data, total_steps(config, batches))


def train(trials: Trials, rates: Sequence[float]) -> Iterator[tuple[float, TrainState]]:
    """Train from the start, a step for each of `rates`; yield each step's loss (nats per token) and the state after it.

    A state is valid until the next step, which reuses its memory.
    """
    state = trials.steps.start(trials.model.trainable)
    for rate, batch in zip(rates, prefetch(trials.batches.batch, 0, len(rates)), strict=True):
        state = dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, rate))
        state, metrics = trials.steps.train(state, trials.model.frozen, trials.steps.put_batch(batch, 1))
        yield float(metrics["loss"]), state


def untrained_losses(trials: Trials, steps: int) -> list[float]:
    """Return the untrained model's loss on the batches of the first `steps` steps (nats per token)."""
    losses = []
    for batch in prefetch(trials.batches.batch, 0, steps):
        micro_batches = [{name: array[i] for name, array in batch.items()} for i in range(len(batch["targets"]))]
        losses.append(_mean_loss(trials, trials.model.trainable, micro_batches))
    return losses


def held_out_loss(trials: Trials, state: TrainState) -> float | None:
    """Return the loss on at most `EVAL_BATCHES` batches of evaluation rows (nats per token); None without such rows."""
    if trials.data.eval is None:
        return None
    _, rows = micro_batch_rows(trials.config, trials.model.mesh)
    batches = eval_batches(trials.data.eval, rows, sharding.rows_here(trials.model.mesh, rows))
    return _mean_loss(trials, state.trainable, itertools.islice(batches, EVAL_BATCHES))


def scheduled(trials: Trials, rate: float, steps: int) -> np.ndarray:
    """Return the learning rates of a run of `steps` steps: the whole schedule, compressed, with its peak at `rate`."""
    train = trials.config.train
    warmup = math.ceil(train.warmup_steps * min(1, steps / trials.total))
    schedule = make_schedule(
        train.lr_scheduler_type, rate, steps, warmup, train.warmup_ratio, **train.lr_scheduler_kwargs
    )
    return np.asarray(jax.vmap(schedule)(np.arange(steps)), float)


def _mean_loss(trials: Trials, trainable: Mapping[str, Any], batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    loss, count = 0.0, 0
    for batch in batches:
        sums = trials.steps.evaluate(trainable, trials.model.frozen, trials.steps.put_batch(batch, 0))
        loss, count = loss + float(sums["loss"]), count + int(sums["num_targets"])
    return loss / max(count, 1)
