"""Cross-entropy over chunks of tokens: the full logits never exist, in the forward pass or in the gradient.

At small models and large vocabularies the logits are the largest array of a training step. Here each chunk's logits
are made, reduced and turned into gradients at once: what the forward pass keeps is the gradient with respect to the
hidden states, as large as these, so the backward pass multiplies by one number and recomputes nothing. Tokens that are
not trained on (prompts, padding) are moved behind the others, and their chunks skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IGNORED = -100  # Hugging Face's label for "no loss here"


def token_losses(
    logits: Float[Array, "*N V"], targets: Int[Array, "*N"]
) -> tuple[Float[Array, "*N"], Bool[Array, "*N"]]:
    """Return each token's cross-entropy (float32, 0 if the target is `IGNORED`), and whether it is the first guess."""
    logits = logits.astype(jnp.float32)
    counted = targets != IGNORED
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    total = largest + jnp.log(jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
    return jnp.where(counted, total - chosen, 0.0), counted & (chosen >= largest)


def chunked_cross_entropy(
    head: Callable[[Any, Float[Array, "B t D"]], Float[Array, "B t V"]],
    weights: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Return the summed cross-entropy (float32) and the number of right first guesses.

    Args:
      head: pure function (weights, hidden states) -> logits.
      weights: pytree of the head's parameters; only those that are differentiated cost a gradient.
      hidden: the last hidden states.
      targets: the next token's id, or `IGNORED`.
      chunk: tokens of each row whose logits exist at one time; rows stay apart, because they live on different devices.
    """
    hidden, targets, _ = _in_chunks(hidden, targets, chunk)

    def chunk_loss(weights: Any, hidden: Array, targets: Array) -> tuple[Array, Array]:
        losses, right = token_losses(head(weights, hidden), targets)
        return jnp.sum(losses), jnp.sum(right)

    return _sum_of_chunks(chunk_loss, weights, hidden, targets)


def token_log_probs(
    head: Callable[[Any, Float[Array, "B t D"]], Float[Array, "B t V"]],
    weights: Any,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """Return each target's log-probability (float32, 0 if the target is `IGNORED`), to be differentiated.

    Arguments as `chunked_cross_entropy`. What the loss will make of each token is not known yet when a chunk's logits
    exist, so the backward pass makes them once more, again a chunk at a time.
    """
    chunks = _in_chunks(hidden, targets, chunk)

    @jax.checkpoint
    def log_probs(weights: Any, hidden: Array, targets: Array) -> Array:
        def counted() -> Array:
            return -token_losses(head(weights, hidden), targets)[0]

        return jax.lax.cond(jnp.any(targets != IGNORED), counted, lambda: jnp.zeros(targets.shape, jnp.float32))

    _, found = jax.lax.scan(lambda carry, one: (carry, log_probs(weights, *one)), None, chunks[:2])
    found = jnp.moveaxis(found, 0, 1).reshape(targets.shape[0], -1)[:, : targets.shape[1]]
    return jnp.take_along_axis(found, jnp.argsort(chunks[2], axis=1), axis=1)


def _in_chunks(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Return (chunks, B, chunk, D) hidden states, (chunks, B, chunk) targets, and the (B, T) order they are in."""
    batch, length, _ = hidden.shape
    chunk = min(chunk, length)
    # Tokens that are trained on come first in each row: the chunks behind them cost nothing. Of chats that is most.
    order = jnp.argsort(targets == IGNORED, axis=1, stable=True)
    targets = jnp.take_along_axis(targets, order, axis=1)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    short = -length % chunk
    hidden = jnp.pad(hidden, [(0, 0), (0, short), (0, 0)]).reshape(batch, -1, chunk, hidden.shape[-1])
    targets = jnp.pad(targets, [(0, 0), (0, short)], constant_values=IGNORED).reshape(batch, -1, chunk)
    return jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0), order


def _sum_of_chunks(chunk_loss: Callable, weights: Any, hidden: Array, targets: Array) -> tuple[Array, Array]:
    leaves, structure = jax.tree.flatten(weights)

    @jax.custom_vjp
    def total(leaves: list[Array], hidden: Array) -> tuple[Array, Array]:
        def add_chunk(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            def counted(carry: tuple[Array, Array]) -> tuple[Array, Array]:
                loss, right = chunk_loss(structure.unflatten(leaves), *chunk)
                return carry[0] + loss, carry[1] + right

            return jax.lax.cond(jnp.any(chunk[1] != IGNORED), counted, lambda carry: carry, carry), None

        return jax.lax.scan(add_chunk, (jnp.float32(0), jnp.int32(0)), (hidden, targets))[0]

    def forward(leaves: list[Any], hidden: Any) -> tuple[tuple[Array, Array], tuple[list[Array | None], Array]]:
        is_trained = [leaf.perturbed for leaf in leaves]  # frozen leaves get no gradient at all
        values = [leaf.value for leaf in leaves]
        trained = [value for value, flag in zip(values, is_trained, strict=True) if flag]

        def with_trained(trained: list[Array]) -> Any:
            source = iter(trained)
            merged = [next(source) if flag else value for value, flag in zip(values, is_trained, strict=True)]
            return structure.unflatten(merged)

        def add_chunk(carry: tuple, chunk: tuple[Array, Array]) -> tuple[tuple, Array]:
            rows, targets = chunk

            def counted(carry: tuple) -> tuple[tuple, Array]:
                loss, vjp, right = jax.vjp(
                    lambda trained, rows: chunk_loss(with_trained(trained), rows, targets), trained, rows, has_aux=True
                )
                trained_grads, row_grads = vjp(jnp.ones_like(loss))
                sums = [total + grad.astype(jnp.float32) for total, grad in zip(carry[2], trained_grads, strict=True)]
                return (carry[0] + loss, carry[1] + right, sums), row_grads

            return jax.lax.cond(
                jnp.any(targets != IGNORED), counted, lambda carry: (carry, jnp.zeros_like(rows)), carry
            )

        start = (jnp.float32(0), jnp.int32(0), [jnp.zeros(leaf.shape, jnp.float32) for leaf in trained])
        (loss, right, sums), row_grads = jax.lax.scan(add_chunk, start, (hidden.value, targets))
        source = iter(sums)
        grads = [next(source) if flag else None for flag in is_trained]
        return (loss, right), (grads, row_grads)

    def backward(residuals: tuple[list[Array | None], Array], cotangent: tuple[Array, Any]) -> tuple[list, Array]:
        grads, row_grads = residuals
        factor = cotangent[0]
        scaled = [
            None if grad is None else (factor * grad).astype(leaf.dtype)
            for grad, leaf in zip(grads, leaves, strict=True)
        ]
        return scaled, (factor * row_grads.astype(jnp.float32)).astype(row_grads.dtype)

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(leaves, hidden)
