"""The training step: one jitted function of (state, frozen weights, batch).

    micro-batches -> sum of losses / weight of the whole window -> gradients of the small tree
    -> clip by global norm -> optimizer -> new state, or the old one where something was not finite

Dividing by the window's weight (of cross-entropy, its target tokens), counted over all devices and micro-batches, makes
accumulation exact for rows of any length (transformers pull request 34191). The step knows `combine`, an objective and
an optax optimizer; the optimizer never sees a frozen leaf.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tpu_tune.models import Architecture, Decoder, Execution, apply_head, encode
from tpu_tune.models.experts import load_balancing_loss
from tpu_tune.training import loss_scale as scaling
from tpu_tune.training import neftune
from tpu_tune.training.objectives import Batch, Head, Objective, Sums, mean
from tpu_tune.training.optimizers import clip_by_global_norm
from tpu_tune.transforms import Method

SEGMENTS = ("segment_ids", "encoder_segment_ids")  # 0 where padding
STEP_METRICS = ("loss", "weight", "grad_norm", "learning_rate", "num_tokens", "finite", "failures")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "updates", "failures", "trainable", "opt_state", "loss_scale"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; a checkpoint is this and the data position that follows from `step`.

    Attributes:
      step: steps taken, int32; it decides the data and the dropout of the next one.
      updates: steps whose update was applied, int32; it decides the learning rate.
      failures: steps in a row whose loss or gradient was not finite, int32; float16 overflows do not count.
      trainable: the trained leaves by path, float32.
      opt_state: the optimizer's state, over `trainable` only.
      loss_scale: the dynamic loss scale under float16, else None.
    """

    step: Int[Array, ""]
    updates: Int[Array, ""]
    failures: Int[Array, ""]
    trainable: dict[str, Array]
    opt_state: Any
    loss_scale: scaling.LossScale | None


@dataclasses.dataclass(frozen=True)
class ModelLoss:
    """The loss as a function of the trained leaves: the model, its method and the objective; static in the jitted step.

    Attributes:
      architecture: the model's facts.
      execution: dtype, attention, remat and sharding hooks.
      method: what the model is made of while it is trained.
      objective: what is minimized.
      neftune_alpha: strength of the noise on the embeddings; 0 for none.
      router_aux_loss_coef: weight of the experts' load-balancing loss, for each micro-batch by itself as transformers
        has it. It is the metric `router_aux_loss` whatever its weight, and not in the loss of evaluations.
    """

    architecture: Architecture
    execution: Execution
    method: Method
    objective: Objective
    neftune_alpha: float = 0.0
    router_aux_loss_coef: float = 0.0

    def __call__(
        self, trainable: Mapping[str, Array], frozen: Mapping[str, Any], batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], Sums]:
        """Return the objective's summed loss and metrics of one micro-batch of (rows, tokens) arrays.

        `key` is the micro-batch's, for dropout and noise; None where nothing is random, as in evaluation.
        """
        params = self.method.combine(trainable, frozen, key)
        arch, run = self.architecture, self.execution
        encoded = None
        if arch.encoder:
            ids, segments = batch["encoder_ids"], batch["encoder_segment_ids"]
            encoded = encode(arch, params, run, ids, segments, self._noise(key, 1, segments))
        model = Decoder(arch, params, run)
        noise = self._noise(key, 2, batch["segment_ids"])
        hidden, _, load = model.hidden_and_load(
            batch["input_ids"], batch["positions"], batch["segment_ids"], encoder_output=encoded, on_embeddings=noise
        )
        head = Head(functools.partial(apply_head, arch), model.head_leaves())
        loss, sums = self.objective(head, hidden, batch)
        if load is None or not arch.experts.has_balance:
            return loss, sums
        weight = jnp.ravel(self.objective.weight(batch))[0].astype(jnp.float32)  # of several parts, the first's
        balance = load_balancing_loss(load, arch.experts.per_token) * weight
        if self.router_aux_loss_coef:
            first = jnp.ravel(loss).at[0].add(self.router_aux_loss_coef * balance)
            loss = first.reshape(jnp.shape(loss))
        return loss, {**sums, "router_aux_loss": (balance, weight)}

    def _noise(self, key: Array | None, number: int, segment_ids: Array) -> Callable[[Array], Array] | None:
        if key is None or not self.neftune_alpha:
            return None
        return neftune.noise(jax.random.fold_in(key, number), self.neftune_alpha, segment_ids)


def init_state(trainable: Mapping[str, Array], optimizer: optax.GradientTransformation, float16: bool) -> TrainState:
    """Return the state before the first step; jit it with output shardings to build it in place."""
    zero = jnp.int32(0)
    scale = scaling.init() if float16 else None
    return TrainState(zero, zero, zero, dict(trainable), optimizer.init(dict(trainable)), scale)


def make_train_step(
    model_loss: ModelLoss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    max_grad_norm: float,
    random_key: Array | None,
    update_in_parts: Callable[..., tuple[Any, Any]] | None = None,
) -> Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, dict[str, Array]]]:
    """Return the step function, to be jitted with the state donated.

    Without a schedule the learning rate is the one in the optimizer's state (`optimizers.make_optimizer`).
    `update_in_parts(update, gradients, optimizer state, weights, finite)` updates one part of the tree after the other
    where the optimizer's state waits in host memory (`offload.update_each`).

    The batch's arrays are (accumulation, rows, tokens). The metrics are float32 scalars: the objective's own, and
    `STEP_METRICS`: `loss` (of the window), `weight` (what it was divided by; the first part of several), `grad_norm`
    (before clipping), `learning_rate` (of this update), `num_tokens` (padding not counted), `finite` (1 where the
    update was applied), `failures` (steps in a row without one).
    """
    objective = model_loss.objective

    def step(state: TrainState, frozen: Mapping[str, Any], batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        weight = jnp.sum(jax.vmap(objective.weight)(batch), axis=0)
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale
        factor = scale / jnp.where(weight == 0, 1, weight).astype(jnp.float32)
        key = None if random_key is None else jax.random.fold_in(random_key, state.step)

        def scaled_loss(
            trainable: Mapping[str, Array], micro: Batch, number: Array
        ) -> tuple[Array, tuple[Array, Sums]]:
            micro_key = None if key is None else jax.random.fold_in(key, number)
            loss, sums = model_loss(trainable, frozen, micro, micro_key)
            return jnp.sum(loss * factor), (loss, sums)

        grad = jax.grad(scaled_loss, has_aux=True)
        grads, loss, sums = _accumulate(grad, state.trainable, batch, jnp.zeros_like(factor))
        if state.loss_scale is not None:
            grads = jax.tree.map(lambda leaf: leaf / scale, grads)
        grads, norm = clip_by_global_norm(grads, max_grad_norm)
        loss = mean(loss, weight)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new_state = _update(state, grads, finite, optimizer, update_in_parts)
        rate = optax.tree.get(state.opt_state, "learning_rate") if schedule is None else schedule(state.updates)
        metrics = {
            "loss": loss,
            "weight": weight.reshape(-1)[0],
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": sum(jnp.sum(batch[name] > 0) for name in SEGMENTS if name in batch),
            "finite": finite.astype(jnp.float32),
            "failures": new_state.failures,
        }
        if clash := metrics.keys() & sums.keys():
            raise ValueError(f"{type(objective).__name__} names a metric as the step does: {', '.join(sorted(clash))}")
        return new_state, metrics | {name: mean(*pair) for name, pair in sums.items()}

    return step


def _accumulate(
    grad: Callable[..., tuple[Any, Any]], trainable: Mapping[str, Array], batch: Batch, no_loss: Array
) -> tuple:
    """Return the sums over a window's micro-batches: gradients, loss, and the objective's metrics.

    Args:
      grad: (trainable, micro-batch, its number) -> (gradients, (loss, metrics)).
      trainable: the trained leaves.
      batch: arrays of (accumulation, rows, tokens).
      no_loss: zero, of the shape of the loss.
    """
    count = len(batch["input_ids"])
    if count == 1:
        grads, (loss, sums) = grad(trainable, jax.tree.map(lambda array: array[0], batch), jnp.int32(0))
        return grads, loss, sums

    def add(totals: Any, numbered: tuple[Batch, Array]) -> tuple[Any, Sums]:
        grads, (loss, sums) = grad(trainable, *numbered)
        return jax.tree.map(jnp.add, totals, (grads, loss)), sums

    zeros = (jax.tree.map(jnp.zeros_like, trainable), no_loss)
    (grads, loss), sums = jax.lax.scan(add, zeros, (batch, jnp.arange(count)))
    return grads, loss, jax.tree.map(lambda each: jnp.sum(each, 0), sums)


def _update(
    state: TrainState,
    grads: Mapping[str, Array],
    finite: Array,
    optimizer: optax.GradientTransformation,
    update_in_parts: Callable[..., tuple[Any, Any]] | None,
) -> TrainState:
    def update(grads: Any, opt_state: Any, trainable: Any) -> tuple[Any, Any]:
        updates, new_state = optimizer.update(grads, opt_state, trainable)
        new = optax.apply_updates(trainable, updates), new_state
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (trainable, opt_state))

    trees = grads, state.opt_state, state.trainable
    trainable, opt_state = update(*trees) if update_in_parts is None else update_in_parts(update, *trees, finite)
    loss_scale = None if state.loss_scale is None else scaling.update(state.loss_scale, finite)
    # A float16 overflow is the loss scale looking for its value, not a failure, until it can shrink no further.
    is_search = False if state.loss_scale is None else state.loss_scale.scale > 1.0
    return TrainState(
        step=state.step + 1,
        updates=state.updates + finite.astype(jnp.int32),
        failures=jnp.where(finite | is_search, 0, state.failures + 1),
        trainable=trainable,
        opt_state=opt_state,
        loss_scale=loss_scale,
    )


def make_eval_step(model_loss: ModelLoss) -> Callable[[Mapping[str, Array], Mapping[str, Any], Batch], Sums]:
    """Return a function (trainable, frozen, batch of (rows, tokens)) -> (sum, weight) of `loss` and each metric."""

    def step(trainable: Mapping[str, Array], frozen: Mapping[str, Any], batch: Batch) -> Sums:
        loss, sums = model_loss(trainable, frozen, batch, None)
        return {"loss": (loss, model_loss.objective.weight(batch)), **sums}

    return step
