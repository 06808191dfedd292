"""Attention over a row whose tokens are cut over the mesh axis `sequence`.

Each device holds the queries, keys and values of its own tokens. Keys and values go round the ring of devices, and
every device adds what its queries see of them; in the backward pass their gradients travel with them and arrive home
complete (Liu et al. 2023, "Ring attention", arXiv:2310.01889). No device ever holds a whole row's keys. The compiler
for v2-8 counts 118 MB of scratch for 64 heads of 128 at 2,048 tokens (32,768: 1,478 MB), forward and backward; gathered
keys and values took 244 MB (3,086 MB), and with 8 key heads about as much as the ring.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tpu_tune.kernels.blockwise import BLOCK, Blocks, backward, delta_of, forward, in_blocks, joined, no_gradient
from tpu_tune.kernels.layout import TokenLayout, with_sinks
from tpu_tune.kernels.mesh import SEQUENCE, on_each_device


def ring(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    layout: TokenLayout,
    window: int | None,
    scale: float,
    mesh: Mesh,
    cap: float | None = None,
    block: int = BLOCK,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H D"]:
    """Return self-attention as `attention.reference` does; see there for the arguments.

    Args:
      mesh: the devices; T divides over the axis `sequence`.
      block: number of tokens in a block, on each device.
    """

    def local(q: Array, k: Array, v: Array, index: Array, segments: Array) -> tuple[Array, Array]:
        local_layout = dataclasses.replace(
            layout, query_index=index, key_index=index, query_segments=segments, key_segments=segments
        )
        blocks, cut_up = in_blocks(q, k, v, local_layout, window, scale, cap, block, layout.causal)
        out, normaliser = joined(*_ring(_Ring(mesh.shape[SEQUENCE], q.shape[1], blocks), *cut_up), q.shape[1])
        return out, normaliser[..., None]

    run = on_each_device(local, mesh, q.shape[2], k.shape[2])
    out, normaliser = run(q, k, v, layout.query_index, layout.query_segments)
    return with_sinks(out, normaliser[..., 0], sinks)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The static facts: how many devices, the tokens on each, and how these are cut into blocks."""

    devices: int
    tokens: int
    blocks: Blocks

    def offset(self, step: Array) -> Array:
        """Return how far this device's queries stand behind the keys that it holds at a step, in tokens."""
        device = jax.lax.axis_index(SEQUENCE)
        return (device - (device - step) % self.devices) * self.tokens

    def onward(self, parts: Any) -> Any:
        """Hand parts to the next device."""
        pairs = [(device, (device + 1) % self.devices) for device in range(self.devices)]
        return jax.lax.ppermute(parts, SEQUENCE, pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(way: _Ring, q: Array, k: Array, v: Array, where: tuple[Array, ...]) -> tuple[Array, Array]:
    return _ring_forward(way, q, k, v, where)[0]


def _ring_forward(
    way: _Ring, q: Array, k: Array, v: Array, where: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple]:
    def one_step(carry: tuple, step: Array) -> tuple[tuple, None]:
        out, normaliser, keys, values, key_layout = carry
        part, more = forward(way.blocks, q, keys, values, (*where[:2], *key_layout), jnp.float32, way.offset(step))
        total = jnp.logaddexp(normaliser, more)
        out = out * _weights(normaliser - total) + part * _weights(more - total)
        return (out, total, *way.onward((keys, values, key_layout))), None

    nothing = jnp.full((q.shape[0], q.shape[1], *q.shape[3:5], q.shape[2]), -1e30, jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), nothing, k, v, where[2:])
    (out, normaliser, *_), _ = jax.lax.scan(one_step, start, jnp.arange(way.devices))
    out = out.astype(v.dtype)
    return (out, normaliser), (q, k, v, where, out, normaliser)


def _weights(logs: Array) -> Array:
    """Turn logarithms (blocks, B, K, G, block) into weights of results, (blocks, B, block, K, G, 1)."""
    return jnp.moveaxis(jnp.exp(logs), 4, 2)[..., None]


def _ring_backward(way: _Ring, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    q, k, v, where, out, normaliser = residuals
    g, delta = gradients[0], delta_of(out, *gradients)

    def one_step(carry: tuple, step: Array) -> tuple[tuple, None]:
        to_q, to_k, to_v, keys, values, key_layout = carry
        to_q, more_k, more_v = backward(
            way.blocks,
            q,
            keys,
            values,
            (*where[:2], *key_layout),
            g,
            normaliser,
            delta,
            to_q,
            jnp.float32,
            way.offset(step),
        )
        return (to_q, *way.onward((to_k + more_k, to_v + more_v, keys, values, key_layout))), None

    zeros = jnp.zeros(k.shape, jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), zeros, zeros, k, v, where[2:])
    (to_q, to_k, to_v, *_), _ = jax.lax.scan(one_step, start, jnp.arange(way.devices))
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), no_gradient(where)


_ring.defvjp(_ring_forward, _ring_backward)
