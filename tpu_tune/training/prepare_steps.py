"""From a model on its devices to the jitted functions of a run: optimizer, schedule, training step, evaluation.

Nothing is compiled here: jax does that at the first call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from tpu_tune.checkpoints.run_checkpoints import average_of
from tpu_tune.kernels import gpu
from tpu_tune.training import offload, plateau
from tpu_tune.training.execution import execution, loss_chunk
from tpu_tune.training.head_objectives import HEADS
from tpu_tune.training.objectives import OBJECTIVES, Objective, Sums
from tpu_tune.training.optimizers import is_schedule_free, make_optimizer
from tpu_tune.training.preference import LogProbs
from tpu_tune.training.prepare_model import PreparedModel, abstract_leaf, put
from tpu_tune.training.schedules import configured_schedule
from tpu_tune.training.step import ModelLoss, TrainState, init_state, make_eval_step, make_train_step
from tpu_tune.transforms import sharding


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The functions that evaluating needs; see `Steps`."""

    evaluate: Callable[..., Sums]
    objective: Objective
    put_batch: Callable[[Mapping[str, np.ndarray], int], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Steps:
    """The jitted functions of a run.

    Attributes:
      train: (state, frozen, batch) -> (state, metrics); the state is donated.
      evaluate: (trainable, frozen, batch) -> (sum, weight) of `loss` and of each metric.
      objective: what is minimized.
      initial_state: a fresh state, sharded; shapes only where the model is.
      averaged: state -> the same with the weights to be evaluated, shown and kept, which a schedule-free optimizer does
        not train; else the state itself.
      start: trainable leaves -> a fresh state, sharded, in buffers of its own.
      put_batch: NumPy batch -> arrays on the mesh; takes the number of leading axes before (rows, tokens).
    """

    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., Sums]
    objective: Objective
    initial_state: TrainState
    averaged: Callable[[TrainState], TrainState]
    start: Callable[[Mapping[str, Any]], TrainState]
    put_batch: Callable[[Mapping[str, np.ndarray], int], dict[str, jax.Array]]


def prepare_steps(config: ConfigDict, model: PreparedModel, total_steps: int | None) -> Steps:
    """Build optimizer, schedule and the jitted steps.

    Args:
      config: the whole configuration.
      model: from `prepare_model`.
      total_steps: the schedule's length. None: no schedule, as under reduce_lr_on_plateau; the learning rate is a value
        in the optimizer's state (`optimizers.set_learning_rate`).
    """
    specs = model.specs
    is_pure = total_steps is not None and config.train.lr_scheduler_type != plateau.NAME
    schedule = configured_schedule(config.train, total_steps) if is_pure else None
    optimizer = make_optimizer(config.train, schedule, specs)
    model_loss = _model_loss(config, model, config.train.per_device_train_batch_size)
    model_loss = dataclasses.replace(model_loss, router_aux_loss_coef=router_aux_loss_coef(config, model))
    random = model.method.is_random or config.train.neftune_noise_alpha > 0
    key = jax.random.fold_in(jax.random.key(config.seed), 1) if random else None
    start = functools.partial(init_state, optimizer=optimizer, float16=config.model.dtype == "float16")
    shapes = jax.eval_shape(start, model.trainable)
    shardings = state_shardings(shapes, model)
    update_in_parts = None
    if config.train.optim_offload:
        waiting = offload.waits(shapes.opt_state, specs)
        shardings = dataclasses.replace(shardings, opt_state=offload.to_host(shardings.opt_state, waiting))
        update_in_parts = functools.partial(offload.update_each, shardings=shardings.opt_state, specs=specs)
    step = make_train_step(model_loss, optimizer, schedule, config.train.max_grad_norm, key, update_in_parts)
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in model.trainable.values())
    start = jax.jit(start, out_shardings=shardings)
    state = jax.tree.map(abstract_leaf, shapes, shardings) if abstract else start(model.trainable)
    evaluation = prepare_evaluation(config, model)
    options = gpu.COMPILER_OPTIONS if model.mesh.devices.flat[0].platform in ("gpu", "cuda") else None
    return Steps(
        train=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options),
        evaluate=evaluation.evaluate,
        objective=evaluation.objective,
        initial_state=state,
        averaged=_averaging(shardings) if is_schedule_free(config.train) else lambda state: state,
        start=start,
        put_batch=evaluation.put_batch,
    )


def _averaging(shardings: TrainState) -> Callable[[TrainState], TrainState]:
    """Return `Steps.averaged` for a schedule-free optimizer, whose z may wait in host memory."""
    homes = shardings.trainable

    @functools.partial(jax.jit, out_shardings=homes)
    def average(y: Mapping[str, Any], z: Mapping[str, Any], b1: Any) -> dict[str, Any]:
        return average_of(y, {path: jax.device_put(z[path], homes[path]) for path in z}, b1)

    def averaged(state: TrainState) -> TrainState:
        return dataclasses.replace(state, trainable=average(state.trainable, state.opt_state.z, state.opt_state.b1))

    return averaged


def prepare_evaluation(config: ConfigDict, model: PreparedModel) -> Evaluation:
    """Build the jitted evaluation alone, without the optimizer and its state."""
    model_loss = _model_loss(config, model, config.train.per_device_eval_batch_size)
    put_batch = functools.partial(_put_batch, model.mesh)
    return Evaluation(jax.jit(make_eval_step(model_loss)), model_loss.objective, put_batch)


def prepare_scoring(config: ConfigDict, model: PreparedModel) -> Callable[[Mapping[str, np.ndarray]], jax.Array]:
    """Build a function from a NumPy batch of evaluation's size to each document's log-probability, (rows, slots).

    Every process gets all of them.
    """
    model_loss = _model_loss(config, model, config.train.per_device_eval_batch_size)
    model_loss = dataclasses.replace(model_loss, objective=LogProbs(model_loss.objective.chunk))
    replicated = NamedSharding(model.mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=replicated)
    def score(trainable: Mapping[str, Any], frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        return model_loss(trainable, frozen, batch, None)[0]

    return lambda batch: score(model.trainable, model.frozen, _put_batch(model.mesh, batch, 0))


def _model_loss(config: ConfigDict, model: PreparedModel, rows: int) -> ModelLoss:
    run = execution(config, model.architecture, model.mesh, model.shardings, rows)
    arch = model.architecture
    chunk = loss_chunk(config, arch.num_labels or arch.vocab_size, rows)
    make = OBJECTIVES[config.objective.name] if config.head.name == "lm" else HEADS[config.head.name]
    objective = make(config, chunk)
    return ModelLoss(model.architecture, run, model.method, objective, config.train.neftune_noise_alpha)


def router_aux_loss_coef(config: ConfigDict, model: PreparedModel) -> float:
    """Return the weight of the load-balancing loss in training: as set, else the model's own; none under adapters."""
    experts, asked = model.architecture.experts, config.objective.router_aux_loss_coef
    if experts is None or asked >= 0:
        return max(asked, 0.0)
    return experts.balance if config.method == "full" else 0.0


def state_shardings(shapes: TrainState, model: PreparedModel) -> TrainState:
    """Return the sharding of every leaf of a state: an optimizer's moment lives where its parameter lives."""
    trainable = {path: leaf.sharding for path, leaf in model.trainable.items()}
    replicated = NamedSharding(model.mesh, PartitionSpec())

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for entry in reversed(path):
            name = getattr(entry, "key", None)
            if name in trainable and leaf.shape == model.trainable[name].shape:
                return trainable[name]
        return replicated

    return jax.tree_util.tree_map_with_path(leaf_sharding, shapes)


def _put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], leading: int) -> dict[str, jax.Array]:
    tokens = NamedSharding(mesh, sharding.batch_spec(leading))
    documents = NamedSharding(mesh, sharding.document_spec(leading))
    homes = {name: documents if name.startswith("document_") else tokens for name in batch}
    return {name: put(array, homes[name]) for name, array in batch.items()}
