"""Attention with grouped heads, segments and sliding windows: which implementation runs, and the plain one.

`reference` holds all scores at once. `blockwise.py` holds those of two blocks, on any device; `splash.py` is the kernel
for newer TPUs. Scores with a learned bias go through `rematerialised`, which lets JAX derive the bias's gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tpu_tune.errors import UserError
from tpu_tune.kernels.blockwise import BLOCK, blockwise
from tpu_tune.kernels.places import Bias, Places, soft_cap
from tpu_tune.kernels.splash import splash

_AUTO_LIMIT = 2048  # longest key sequence for which `auto` holds all scores


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    places: Places,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    bias: Bias | None = None,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention; H is a multiple of K (grouped heads), scores and softmax are float32.

    Args:
      places: where queries and keys stand; where there are as many of both and attention is causal, they are one row
        from its beginning.
      window: each query sees so many keys, its own place included; None for all.
      scale: of the scores; D ** -0.5 by default.
      cap: soft limit of the scores, see `soft_cap`.
      bias: added to the scores, by place.
      implementation: auto | reference | blockwise | splash; what splash cannot do (a cache, a bias, an encoder, rows
        cut over `sequence`) goes to auto.
      mesh: for kernels that run on each device's part; None on one device.

    Raises:
      UserError: an unknown implementation.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "splash":
        whole = mesh is None or mesh.shape["sequence"] == 1
        if bias is None and places.causal and q.shape[1] == k.shape[1] and whole:
            return splash(q, k, v, places.query_segments, window, scale, cap, mesh)
        implementation = "auto"
    implementation = chosen(implementation, q.shape[1], k.shape[1])
    if implementation == "reference":
        return reference(q, k, v, places, window, scale, cap, bias)
    if implementation == "blockwise":
        if bias is not None:
            return rematerialised(q, k, v, places, window, scale, bias, cap)
        return blockwise(q, k, v, places, window, scale, cap=cap)
    raise UserError(f"model.attention is '{implementation}'; it must be auto, reference, blockwise or splash")


def for_device(implementation: str, device: Any) -> str:
    """Return the implementation to use on a device: what is asked for, or the best where that is auto.

    Args:
      implementation: as in `attention`.
      device: of the mesh, there or of a topology.

    Raises:
      UserError: splash on what it is not for.
    """
    kind = device.device_kind
    has_splash = device.platform == "tpu" and not kind.startswith(("TPU v2", "TPU v3"))
    if implementation == "splash" and not has_splash:
        raise UserError(f"model.attention=splash needs a TPU v4 or later, and this is {kind}; leave it at auto")
    return "splash" if implementation == "auto" and has_splash else implementation


def chosen(implementation: str, queries: int, keys: int) -> str:
    """Return the implementation that a name stands for: what `auto` takes for so many queries and keys, or itself."""
    if implementation != "auto":
        return implementation
    return "blockwise" if keys > _AUTO_LIMIT and queries > BLOCK else "reference"


def reference(
    q: Array, k: Array, v: Array, places: Places, window: int | None, scale: float,
    cap: float | None = None, bias: Bias | None = None,
) -> Array:  # fmt: skip
    """Attention with all scores at once."""
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    if bias is not None:
        scores += bias(places.query_index, places.key_index).reshape(scores.shape)
    # A finite floor: a padded query that sees no key must give zeros to the gradient, not NaN.
    scores = jnp.where(places.mask(window)[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, v).reshape(batch, length, heads, size)


def rematerialised(
    q: Array, k: Array, v: Array, places: Places, window: int | None, scale: float, bias: Bias,
    cap: float | None = None, block: int = BLOCK,
) -> Array:  # fmt: skip
    """Attention over blocks of queries, scores recomputed in the backward pass."""
    batch, length, heads, size = q.shape
    short = -length % block

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(_: None, queries: tuple[Array, Array, Array]) -> tuple[None, Array]:
        q_block, index, segments = queries
        here = dataclasses.replace(places, query_index=index, query_segments=segments)
        return None, reference(q_block, k, v, here, window, scale, cap, bias)

    _, out = jax.lax.scan(one_block, None, (blocks(q), blocks(places.query_index), blocks(places.query_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, size)[:, :length]
