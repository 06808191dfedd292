"""The training step: one jitted function of (state, frozen weights, batch).

    micro-batches -> sum of cross-entropies / target tokens of the whole window -> gradients of the small tree
    -> clip by global norm -> optimizer -> new state, or the old one where something was not finite

Dividing by the window's target tokens, counted over all devices and micro-batches, makes accumulation exact for rows
of any length (transformers pull request 34191). The step knows `combine`, a loss and an optax optimizer; the
optimizer never sees a frozen leaf.
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

from tpu_tune.kernels.cross_entropy import IGNORED, chunked_cross_entropy
from tpu_tune.models import Architecture, Decoder, Execution, apply_head, encode
from tpu_tune.training import loss_scale as scaling
from tpu_tune.training import neftune
from tpu_tune.training.optimizers import clip_by_global_norm
from tpu_tune.transforms import Targets, combine

Batch = Mapping[str, Int[Array, "..."]]
SEGMENTS = ("segment_ids", "encoder_segment_ids")  # what says which tokens are not padding


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
      trainable: flat tree of float32 leaves.
      opt_state: the optimizer's, over `trainable` only.
      loss_scale: under float16, else None.
    """

    step: Int[Array, ""]
    updates: Int[Array, ""]
    failures: Int[Array, ""]
    trainable: dict[str, Array]
    opt_state: Any
    loss_scale: scaling.LossScale | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is trained and how its loss is computed; static in the jitted step.

    Attributes:
      architecture: of the model.
      execution: dtype, attention, remat and sharding hooks.
      targets: of LoRA; None trains everything.
      loss_chunk: tokens of each row whose logits exist at one time.
      neftune_alpha: of the noise on the embeddings; 0 for none.
    """

    architecture: Architecture
    execution: Execution
    targets: Targets | None
    loss_chunk: int
    neftune_alpha: float = 0.0

    def loss(
        self, trainable: Mapping[str, Array], frozen: Mapping[str, Any], batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Return (summed cross-entropy, right first guesses) of one micro-batch of (rows, tokens) arrays.

        `key` is the micro-batch's, for dropout and noise; None where nothing is random, as in evaluation.
        """
        params = combine(trainable, frozen, self.targets, key)
        arch, run = self.architecture, self.execution
        memory = None
        if arch.encoder:
            memory = encode(
                arch,
                params,
                run,
                batch["encoder_ids"],
                batch["encoder_segment_ids"],
                self._noise(key, 1, batch["encoder_segment_ids"]),
            )
        model = Decoder(arch, params, run)
        noisy = self._noise(key, 2, batch["segment_ids"])
        hidden, _ = model.hidden(
            batch["input_ids"], batch["positions"], batch["segment_ids"], memory=memory, on_embeddings=noisy
        )
        head = functools.partial(apply_head, arch)
        return chunked_cross_entropy(head, model.head_leaves(), hidden, batch["targets"], self.loss_chunk)

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
    problem: Problem,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    max_grad_norm: float,
    random_key: Array | None,
    in_parts: Callable[..., tuple[Any, Any]] | None = None,
) -> Callable[[TrainState, Mapping[str, Any], Batch], tuple[TrainState, dict[str, Array]]]:
    """Return the step function, to be jitted with the state donated.

    Without a schedule the learning rate is the one in the optimizer's state (`optimizers.make_optimizer`).
    `in_parts(update, gradients, optimizer state, weights, finite)` updates one part of the tree after the other where the
    optimizer's state waits in host memory (`offload.update_each`).

    The batch's arrays are (accumulation, rows, tokens). The metrics are float32 scalars: `loss` (mean over the
    window's target tokens), `grad_norm` (before clipping), `learning_rate` (of this update), `num_targets`,
    `num_tokens` (padding not counted), `accuracy`, `finite` (1 where the update was applied).
    """

    def step(state: TrainState, frozen: Mapping[str, Any], batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        num_targets = jnp.sum(batch["targets"] != IGNORED)
        scale = jnp.float32(1) if state.loss_scale is None else state.loss_scale.scale
        factor = scale / jnp.maximum(num_targets, 1).astype(jnp.float32)
        key = None if random_key is None else jax.random.fold_in(random_key, state.step)

        def scaled_loss(
            trainable: Mapping[str, Array], micro: Batch, number: Array
        ) -> tuple[Array, tuple[Array, Array]]:
            micro_key = None if key is None else jax.random.fold_in(key, number)
            loss, right = problem.loss(trainable, frozen, micro, micro_key)
            return loss * factor, (loss, right)

        grad = jax.grad(scaled_loss, has_aux=True)

        def accumulate(sums: Any, numbered: tuple[Batch, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, grad(state.trainable, *numbered)), None

        count = batch["targets"].shape[0]
        if count == 1:
            sums = grad(state.trainable, jax.tree.map(lambda part: part[0], batch), jnp.int32(0))
        else:
            zeros = (jax.tree.map(jnp.zeros_like, state.trainable), (jnp.float32(0), jnp.int32(0)))
            sums, _ = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(count)))
        grads, (loss_sum, right) = sums
        if state.loss_scale is not None:
            grads = jax.tree.map(lambda leaf: leaf / scale, grads)
        grads, norm = clip_by_global_norm(grads, max_grad_norm)
        loss = loss_sum / jnp.maximum(num_targets, 1)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new_state = _update(state, grads, finite, optimizer, in_parts)
        rate = optax.tree.get(state.opt_state, "learning_rate") if schedule is None else schedule(state.updates)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "num_targets": num_targets,
            "num_tokens": sum(jnp.sum(batch[name] > 0) for name in SEGMENTS if name in batch),
            "accuracy": right / jnp.maximum(num_targets, 1),
            "finite": finite.astype(jnp.float32),
            "failures": new_state.failures,
        }
        return new_state, metrics

    return step


def _update(
    state: TrainState,
    grads: Mapping[str, Array],
    finite: Array,
    optimizer: optax.GradientTransformation,
    in_parts: Callable[..., tuple[Any, Any]] | None,
) -> TrainState:
    def update(grads: Any, opt_state: Any, trainable: Any) -> tuple[Any, Any]:
        updates, new_state = optimizer.update(grads, opt_state, trainable)
        new = optax.apply_updates(trainable, updates), new_state
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, (trainable, opt_state))

    given = grads, state.opt_state, state.trainable
    trainable, opt_state = update(*given) if in_parts is None else in_parts(update, *given, finite)
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


def make_eval_step(problem: Problem) -> Callable[[Mapping[str, Array], Mapping[str, Any], Batch], dict[str, Array]]:
    """Return a function (trainable, frozen, batch of (rows, tokens)) -> sums: `loss`, `right`, `num_targets`."""

    def step(trainable: Mapping[str, Array], frozen: Mapping[str, Any], batch: Batch) -> dict[str, Array]:
        loss, right = problem.loss(trainable, frozen, batch, None)
        return {"loss": loss, "right": right, "num_targets": jnp.sum(batch["targets"] != IGNORED)}

    return step
