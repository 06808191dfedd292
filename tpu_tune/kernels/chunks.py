"""A function of each token alone, over chunks of tokens: what it holds on the way exists for one chunk at a time.

A layer's MLP needs two or three arrays of (tokens, intermediate), its projections a dropped copy of their input each:
at long contexts that is most of a training step's memory. `over_tokens` runs such a function chunk by chunk and keeps
its inputs for the backward pass, which computes each chunk again. Weights that are trained gather their gradient in
float32, whatever they are stored in. Dropout's keys become one a token (`token_keys`), so that a mask does not depend
on how the tokens are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def token_keys(key: Array, index: Int[Array, " t"]) -> Array:
    """Return one PRNG key a token, by its index in the row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def piece(length: int, chunk: int) -> int:
    """Return the tokens of a chunk: at most `chunk`, and a divisor of `length` where that is not much smaller."""
    count = -(-length // chunk)
    even = next((number for number in range(count, min(2 * count, length) + 1) if length % number == 0), count)
    return -(-length // even)


def over_tokens(function: Callable[[Any, Any], Any], weights: Any, tokens: Any, chunk: int, shards: int = 1) -> Any:
    """Return function(weights, tokens), computed over chunks of tokens.

    Args:
      function: pure function (weights, tokens) from arrays (B, t, ...) to arrays (B, t, ...), each token's result from
        that token and the weights alone. Scalar PRNG keys among the weights reach it as one a token, (t,).
      weights: pytree of what all tokens share.
      tokens: pytree of floating (B, T, ...) arrays.
      chunk: tokens of each row and shard that are worked on at one time; 0, or as many as there are: all of them.
      shards: devices that share a row; each works on a chunk of its own tokens.
    """
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    local = length // shards
    if not chunk or chunk >= local:
        return function(weights, tokens)
    size = piece(local, chunk)
    count = -(-local // size)
    leaves, structure = jax.tree.flatten(weights)

    def part(tree: Any, number: Array) -> Any:
        """Take one chunk out of (B, shards, local, ...) arrays, as (B, t, ...)."""

        def one(x: Array) -> Array:
            x = jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=2)
            return x.reshape(batch, shards * size, *x.shape[3:])

        return jax.tree.map(one, tree)

    def put(out: Any, chunk_out: Any, number: Array) -> Any:
        def one(x: Array, new: Array) -> Array:
            new = new.reshape(batch, shards, size, *new.shape[2:])
            return jax.lax.dynamic_update_slice_in_dim(x, new, number * size, axis=2)

        return jax.tree.map(one, out, chunk_out)

    def cut(x: Array) -> Array:
        x = x.reshape(batch, shards, local, *x.shape[2:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, count * size - local)] + [(0, 0)] * (x.ndim - 3))

    def joined(x: Array) -> Array:
        return x[:, :, :local].reshape(batch, length, *x.shape[3:])

    def empty(like: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros((batch, shards, count * size, *x.shape[2:]), x.dtype), like)

    def built(leaves: list[Any], number: Array) -> Any:
        index = jnp.arange(shards)[:, None] * local + number * size + jnp.arange(size)
        keyed = [token_keys(leaf, index.reshape(-1)) if _is_key(leaf) else leaf for leaf in leaves]
        return structure.unflatten(keyed)

    @jax.custom_vjp
    def mapped(leaves: list[Any], tokens: Any) -> Any:
        def add_chunk(number: Array, out: Any) -> Any:
            return put(out, function(built(leaves, number), part(tokens, number)), number)

        like = jax.eval_shape(lambda: function(built(leaves, 0), part(tokens, 0)))
        return jax.lax.fori_loop(0, count, add_chunk, empty(like))

    def forward(leaves: list[Any], tokens: Any) -> tuple[Any, tuple[list[Any], Any]]:
        primal = jax.custom_derivatives.custom_vjp_primal_tree_values
        trained = [leaf.perturbed for leaf in leaves]  # frozen leaves get no gradient at all
        leaves, tokens = primal(leaves), primal(tokens)
        moving = [leaf if is_trained else None for leaf, is_trained in zip(leaves, trained, strict=True)]
        fixed = [None if is_trained else leaf for leaf, is_trained in zip(leaves, trained, strict=True)]
        return mapped(leaves, tokens), (moving, fixed, tokens)

    def backward(residuals: tuple[list[Any], list[Any], Any], cotangents: Any) -> tuple[list[Any], Any]:
        moving, fixed, tokens = residuals
        cotangents = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)

        def add_chunk(number: Array, carry: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
            sums, back = carry

            def chunk_of(moving: list[Any], tokens: Any) -> Any:
                leaves = [old if new is None else new for new, old in zip(moving, fixed, strict=True)]
                return function(built(leaves, number), tokens)

            _, pull = jax.vjp(chunk_of, moving, part(tokens, number))
            grads, chunk_back = pull(part(cotangents, number))
            sums = jax.tree.map(lambda total, grad: total + grad.astype(jnp.float32), sums, grads)
            return sums, put(back, chunk_back, number)

        start = (
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), moving),
            jax.tree.map(jnp.zeros_like, tokens),
        )
        sums, back = jax.lax.fori_loop(0, count, add_chunk, start)
        return jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, moving), back

    mapped.defvjp(forward, backward, symbolic_zeros=True)
    return jax.tree.map(joined, mapped(leaves, jax.tree.map(cut, tokens)))


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.ndim == 0


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.SymbolicZero)


def _instantiated(leaf: Any) -> Array:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf
