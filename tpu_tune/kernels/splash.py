"""Splash attention on TPU v4 and later: jax's own Pallas kernel, in the shapes of `attention`.

It never holds the scores, skips blocks that the causal mask or the window leaves empty, and takes segments. It wants
tokens in multiples of 128, so rows are padded; on a mesh every device runs it on its own rows and heads. Where a row
is cut over the mesh axis `sequence`, every device gathers the row's keys and values and masks its own queries' part.
In the backward pass one kernel gives all three gradients where it can: scores are computed again once and not twice.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.mesh import SEQUENCE, cut_heads, on_each_device

RESULT = "attention"  # name of the kernel's result and of what its backward pass reads, which model.remat=dots keeps
_LANES = 128  # tokens come in multiples of this
_BLOCKS = (512, 256, 128)
_PARTS = 4  # in which the kernel of all gradients leaves the queries', one for each block of keys: they are memory
_KEYS = 2048  # of a block at most, of 128 numbers each: the chip's own memory


def fits(length: int, mesh: Mesh | None) -> bool:
    """Return whether the kernel takes rows of so many tokens: those that are cut over devices cannot be padded."""
    pieces = 1 if mesh is None else mesh.shape[SEQUENCE]
    return pieces == 1 or length % (pieces * _LANES) == 0


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
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H D"]:
    """Return causal self-attention.

    Args:
      segments: document of each token; queries see keys of their own document.
      window: number of keys that each query sees, its own included; None: all.
      scale, cap: factor on the scores and their soft limit, see `attention`.
      mesh: the devices over which rows, heads and tokens are cut; None on one device. See `fits`.
      interpret: run the kernel as plain JAX, to test it without a TPU.
      sinks: logits of each head that no value belongs to, see `attention`.
    """
    length, heads, groups = q.shape[1], q.shape[2], k.shape[2]
    pieces = 1 if mesh is None else mesh.shape[SEQUENCE]
    cut = None if mesh is None else cut_heads(mesh, heads, groups)
    short = -length % _LANES
    q, k, v = (jnp.pad(part, [(0, 0), (0, short), (0, 0), (0, 0)]) for part in (q * scale, k, v))
    segments = jnp.pad(segments, [(0, 0), (0, short)], constant_values=-1)
    mask = splash_attention.MultiHeadMask(
        [_mask(length + short, pieces, window)] * (heads // mesh.shape[cut] if cut else heads)
    )
    blocks = _blocks(length + short, pieces, window, v.shape[-1])
    kernel = splash_attention.make_splash_mha(
        mask,
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=pieces,
        residual_checkpoint_name=RESULT,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )

    def local(kernel: Any, sinks: Array | None, q: Array, k: Array, v: Array, segments: Array) -> Array:
        key_segments = segments
        if pieces > 1:
            k, v, key_segments = (jax.lax.all_gather(part, SEQUENCE, axis=1, tiled=True) for part in (k, v, segments))
        heads_first = (jnp.swapaxes(part, 1, 2) for part in (q, k, v))
        each_row = jax.vmap(functools.partial(kernel, sinks=sinks))
        return jnp.swapaxes(each_row(*heads_first, splash_attention.SegmentIds(segments, key_segments)), 1, 2)

    first = ()
    if mesh is not None:
        masks = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, SEQUENCE)))
        first = masks, PartitionSpec(cut)
    run = on_each_device(local, mesh, heads, groups, first)
    return run(kernel, sinks, q, k, v, segments)[:, :length].astype(v.dtype)


def _mask(length: int, pieces: int, window: int | None) -> Any:
    if window is None:
        return splash_attention.CausalMask((length, length), shard_count=pieces)
    return splash_attention.LocalMask((length, length), (window - 1, 0), offset=0, shard_count=pieces)


def _blocks(length: int, pieces: int, window: int | None, size: int) -> splash_attention.BlockSizes:
    """Return the kernels' blocks for rows of so many tokens, on a device's own part of the queries."""
    block, own = (next(size for size in _BLOCKS if tokens % size == 0) for tokens in (length, length // pieces))
    forward = {"block_q": own, "block_kv": block, "block_q_dkv": own, "block_kv_dkv_compute": block}
    together = gradient_keys(length, size) if window is None and pieces == 1 else 0
    if together:
        return splash_attention.BlockSizes(**forward, block_kv_dkv=together, use_fused_bwd_kernel=True)
    return splash_attention.BlockSizes(**forward, block_kv_dkv=block, block_q_dq=own, block_kv_dq=block)


def gradient_keys(length: int, size: int) -> int:
    """Return how many keys, heads of `size` numbers, the kernel of all gradients takes at a time; 0: they are too many.

    Each block of keys leaves a gradient of all queries, of which few are wanted. It has five products where two kernels
    have seven, on larger blocks that the causal mask leaves empty less often.
    """
    block = next(size for size in _BLOCKS if length % size == 0)
    count = length // block
    parts = next(parts for parts in range(min(count, _PARTS), 0, -1) if count % parts == 0)
    pays = 5 * (parts + 1) / parts < 7 * (count + 1) / count
    return length // parts if pays and length // parts * max(size, _LANES) <= _KEYS * _LANES else 0
