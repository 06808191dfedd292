"""Splash attention on TPU v4 and later: jax's own Pallas kernel, in the shapes of `attention`.

It never holds the scores, skips blocks that the causal mask or the window leaves empty, and takes segments. It wants
tokens in multiples of 128, so rows are padded; on a mesh every device runs it on its own rows and heads.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

_LANES = 128  # tokens come in multiples of this
_BLOCKS = (512, 256, 128)
_ROWS = ("data", "fsdp")


def splash(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    window: int | None,
    scale: float,
    cap: float | None,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Return causal self-attention.

    Args:
      segments: document of each token; queries see keys of their own.
      window: each query sees so many keys, its own place included; None for all.
      scale, cap: of the scores, see `attention`.
      mesh: over which rows and heads are cut; None on one device.
      interpret: run the kernel as plain JAX, to test it without a TPU.
    """
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    short = -length % _LANES
    q, k, v = (jnp.pad(part, [(0, 0), (0, short), (0, 0), (0, 0)]) for part in (q * scale, k, v))
    segments = jnp.pad(segments, [(0, 0), (0, short)], constant_values=-1)

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        kernel = _kernel(q.shape[2], q.shape[1], window, cap, interpret)
        ids = splash_attention.SegmentIds(segments, segments)
        turned = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(*turned, ids), 1, 2)

    if mesh is not None and mesh.size > 1:
        tensor = mesh.shape["tensor"]
        cut = "tensor" if heads % tensor == 0 and groups % tensor == 0 else None
        spec = PartitionSpec(_ROWS, None, cut, None)
        local = jax.shard_map(
            local, mesh=mesh, in_specs=(spec, spec, spec, PartitionSpec(_ROWS, None)), out_specs=spec, check_vma=False
        )
    return local(q, k, v, segments)[:, :length].astype(v.dtype)


def _kernel(heads: int, length: int, window: int | None, cap: float | None, interpret: bool) -> Any:
    shape = (length, length)
    if window is None:
        mask = splash_attention.CausalMask(shape)
    else:
        mask = splash_attention.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    make = functools.partial(splash_attention.make_splash_mha, head_shards=1, q_seq_shards=1, interpret=interpret)
    return make(splash_attention.MultiHeadMask([mask] * heads), block_sizes=sizes, attn_logits_soft_cap=cap)
