"""Attention with grouped heads, segments and sliding windows: which implementation runs, and the plain one.

`reference` holds all scores at once. `blockwise.py` holds those of two blocks, on any device; `splash.py` is the kernel
for newer TPUs, `gpu.py` has those for newer GPUs, and `strips.py` is faster than blocks on the other GPUs and for what
those kernels cannot do. `sequence.py` is blockwise attention over rows that are cut over devices. Scores with a learned
bias go through `rematerialised`, which lets JAX derive the bias's gradient.

A sink is one more logit of each head in the softmax, whose weight goes to no value (gpt-oss). Kernels that do not know
it give the scores' log-sum-exp, from which `with_sinks` corrects their result; the GPU's give none that has a gradient,
and are not used then.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from tpu_tune.errors import UserError
from tpu_tune.kernels import gpu, strips
from tpu_tune.kernels import splash as tpu
from tpu_tune.kernels.blockwise import BLOCK, blockwise
from tpu_tune.kernels.layout import Bias, TokenLayout, soft_cap
from tpu_tune.kernels.mesh import SEQUENCE
from tpu_tune.kernels.sequence import ring

IMPLEMENTATIONS = ("auto", "reference", "blockwise", "splash", "cudnn", "pallas")
_HOPPER = "pallas_hopper"  # pallas, with blocks for compute capability 9.0: `for_device` says it, no user
_STRIPS = "strips"  # likewise: where a GPU has no kernel; what its kernels cannot do goes there too
_KERNELS = ("splash", "cudnn", "pallas", _HOPPER, _STRIPS)  # the devices' own; what they cannot do goes to auto
_OLDEST_GPU = (8, 0)  # compute capability of Ampere; older cards have neither cuDNN's kernel nor bfloat16


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    layout: TokenLayout,
    *,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    bias: Bias | None = None,
    sinks: Float[Array, " H"] | None = None,
    implementation: str = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention; H is a multiple of K (grouped heads), scores and softmax are float32.

    Args:
      layout: indices and segments of queries and keys; where there are as many of both and attention is causal, they
        are one row from its beginning.
      window: number of keys that each query sees, its own included; None: all.
      scale: factor on the scores; D ** -0.5 by default.
      cap: soft limit of the scores, see `soft_cap`.
      bias: function from the indices to what is added to the scores; None without one.
      sinks: one more logit of each head in the softmax, which no value belongs to; None without them.
      implementation: auto | reference | blockwise | splash | cudnn | pallas, or what `for_device` returns. What the
        last three cannot do (a cache, a bias, an encoder; for the GPU's also sinks and other things, see `gpu.py`) goes
        to auto.
      mesh: the devices, each of which attends in its own part; None on one device.

    Raises:
      UserError: an unknown implementation.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    window = None if window is not None and window >= k.shape[1] else window
    if implementation not in (*IMPLEMENTATIONS, _HOPPER, _STRIPS):
        raise UserError(f"model.attention is '{implementation}'; it must be one of {', '.join(IMPLEMENTATIONS)}")
    row = bias is None and q.shape[1] == k.shape[1]  # queries and keys are the same tokens
    pieces = 1 if mesh is None else mesh.shape[SEQUENCE]
    if implementation in _KERNELS and row and layout.causal:
        out = _kernel(implementation, q, k, v, layout, window, scale, cap, sinks, mesh)
        if out is not None:
            return out
    if pieces > 1 and row and implementation != "reference" and q.shape[1] % pieces == 0:
        return ring(q, k, v, layout, window, scale, mesh, cap, sinks=sinks)
    implementation = chosen("auto" if implementation in _KERNELS else implementation, q.shape[1], k.shape[1])
    if implementation == "reference":
        return reference(q, k, v, layout, window, scale, cap, bias, sinks)
    if bias is not None:
        return rematerialised(q, k, v, layout, window, scale, bias, cap, sinks=sinks)
    return blockwise(q, k, v, layout, window, scale, cap=cap, sinks=sinks)


def _kernel(
    implementation: str,
    q: Array,
    k: Array,
    v: Array,
    layout: TokenLayout,
    window: int | None,
    scale: float,
    cap: float | None,
    sinks: Array | None,
    mesh: Mesh | None,
) -> Array | None:
    """Return causal self-attention by a device's own kernel; None where it cannot do what is asked."""
    segments = layout.query_segments
    if implementation == "splash":
        return (
            tpu.splash(q, k, v, segments, window, scale, cap, mesh, sinks=sinks) if tpu.fits(q.shape[1], mesh) else None
        )
    if mesh is not None and mesh.shape[SEQUENCE] > 1:
        return None
    plain = cap is None and sinks is None
    if plain and implementation == "cudnn" and not layout.packed and gpu.cudnn_takes(q):
        return gpu.cudnn(q, k, v, window, scale, mesh)
    if plain and implementation in ("cudnn", "pallas", _HOPPER) and window is None and gpu.pallas_takes(q):
        return gpu.pallas(q, k, v, segments, scale, mesh, implementation == _HOPPER)
    in_strips = strips.fits(q.shape[1]) and chosen("auto", q.shape[1], k.shape[1]) == "blockwise"
    return strips.strips(q, k, v, layout, window, scale, cap, sinks) if in_strips else None


def for_device(implementation: str, device: Any, dtype: Any = jnp.bfloat16, packed: bool = True) -> str:
    """Return the implementation to use on a device: what is asked for, or the best where that is auto.

    Args:
      implementation: a name as in `attention`.
      device: one of the mesh's devices, attached or from a topology's description.
      dtype: dtype of queries, keys and values.
      packed: whether a row may hold several documents, see `TokenLayout`.

    Raises:
      UserError: a kernel on a device, or for a dtype or rows, that it is not for.
    """
    kind = device.device_kind
    has_splash = device.platform == "tpu" and not kind.startswith(("TPU v2", "TPU v3"))
    new_gpu = _capability(device) >= _OLDEST_GPU
    half = jnp.dtype(dtype).itemsize == 2
    if implementation == "auto":
        if has_splash:
            return "splash"
        implementation = ("pallas" if packed else "cudnn") if new_gpu and half else "auto"
        if implementation == "auto" and _capability(device) > (0, 0):
            return _STRIPS
    setting = f"model.attention={implementation}"
    if implementation == "splash" and not has_splash:
        raise UserError(f"{setting} needs a TPU v4 or later, and this is {kind}; leave it at auto")
    if implementation in ("cudnn", "pallas"):
        if not new_gpu:
            raise UserError(
                f"{setting} needs an NVIDIA GPU of compute capability 8.0 or later, and this is {kind}; "
                "leave it at auto"
            )
        if not half:
            raise UserError(
                f"{setting} takes bfloat16 or float16, and model.dtype is {jnp.dtype(dtype)}; leave it at auto"
            )
        if implementation == "cudnn" and packed:
            raise UserError(f"{setting} takes no packed rows; set data.packing=false, or leave it at auto")
    return _HOPPER if implementation == "pallas" and _capability(device)[0] == 9 else implementation


def _capability(device: Any) -> tuple[int, int]:
    """Return an NVIDIA GPU's compute capability, (0, 0) for anything else."""
    match = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def chosen(implementation: str, queries: int, keys: int) -> str:
    """Return the implementation that a name stands for: what `auto` takes for so many queries and keys, or itself."""
    if implementation != "auto":
        return implementation
    return "blockwise" if keys > BLOCK and queries > BLOCK else "reference"


def reference(
    q: Array,
    k: Array,
    v: Array,
    layout: TokenLayout,
    window: int | None,
    scale: float,
    cap: float | None = None,
    bias: Bias | None = None,
    sinks: Array | None = None,
) -> Array:
    """Attention with all scores at once."""
    batch, length, heads, size = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, length, groups, heads // groups, size)
    scores = jnp.einsum("btghd,bsgd->bghts", q, k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * scale, cap)
    if bias is not None:
        scores += bias(layout.query_index, layout.key_index).reshape(scores.shape)
    # A finite floor: a padded query that sees no key must give zeros to the gradient, not NaN.
    scores = jnp.where(layout.mask(window)[:, None, None], scores, jnp.float32(-1e30))
    if sinks is not None:
        each_query = sinks.astype(jnp.float32).reshape(groups, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(each_query, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("bghts,bsgd->btghd", weights, v).reshape(batch, length, heads, size)


def rematerialised(
    q: Array,
    k: Array,
    v: Array,
    layout: TokenLayout,
    window: int | None,
    scale: float,
    bias: Bias,
    cap: float | None = None,
    block: int = BLOCK,
    sinks: Array | None = None,
) -> Array:
    """Attention over blocks of queries, scores recomputed in the backward pass."""
    batch, length, heads, size = q.shape
    short = -length % block

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_block(_: None, queries: tuple[Array, Array, Array]) -> tuple[None, Array]:
        q_block, index, segments = queries
        block_layout = dataclasses.replace(layout, query_index=index, query_segments=segments)
        return None, reference(q_block, k, v, block_layout, window, scale, cap, bias, sinks)

    _, out = jax.lax.scan(one_block, None, (blocks(q), blocks(layout.query_index), blocks(layout.query_segments)))
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, size)[:, :length]
