"""Attention kernels for NVIDIA GPUs of compute capability 8.0 and later: cuDNN's, and jax's own in Pallas (Triton).

Both are causal self-attention that never holds the scores, in float16 or bfloat16. cuDNN's is the faster one and takes
windows, but no segments in linear memory; it is for rows of one document each. Pallas' takes segments, but no windows;
it wants tokens in multiples of its blocks (elsewhere it reads past the end: jax issue 23819), so rows are padded. On a
mesh every device runs them on its own rows and heads. Neither has a gradient with a sink in the softmax.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as jax_pallas
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.mesh import on_each_device

_HALF = (jnp.float16, jnp.bfloat16)
_TOKENS = 128  # the largest block below

# Options of XLA's compiler. DotMerger would join LoRA's A with a whole dequantized weight, which it copies for that.
COMPILER_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}


def cudnn_takes(q: Float[Array, "B T H D"]) -> bool:
    """Return whether cuDNN takes this dtype and head size (on every card: those from 9.0 take up to 256)."""
    return q.dtype in _HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def cudnn(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    window: int | None,
    scale: float,
    mesh: Mesh | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B T H D"]:
    """Return causal self-attention of rows of one document each; see `attention` for the arguments.

    Args:
      implementation: a name that `jax.nn.dot_product_attention` takes; xla tests the call without a GPU.
    """

    def local(q: Array, k: Array, v: Array) -> Array:
        visible = None if window is None else (window - 1, 0)  # keys before a query's own, and behind it
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=visible, implementation=implementation
        )

    return on_each_device(local, mesh, q.shape[2], k.shape[2])(q, k, v)


def pallas_takes(q: Float[Array, "B T H D"]) -> bool:
    """Return whether the Pallas kernel takes this dtype and head size; larger heads exceed a card's shared memory."""
    return q.dtype in _HALF and 16 <= q.shape[-1] <= 256


def pallas(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    segments: Int[Array, "B T"],
    scale: float,
    mesh: Mesh | None = None,
    hopper: bool = False,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Return causal self-attention in which queries see keys of their own segment; see `attention` for the arguments.

    Args:
      hopper: whether the card is of compute capability 9.0.
      interpret: run the kernel as plain JAX, to test it without a GPU.
    """
    length = q.shape[1]
    short = -length % _TOKENS
    q, k, v = (jnp.pad(part, [(0, 0), (0, short), (0, 0), (0, 0)]) for part in (q, k, v))
    segments = jnp.pad(segments, [(0, 0), (0, short)], constant_values=-1)

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        def one_member(q: Array, k: Array, v: Array) -> Array:
            blocks = _blocks(q.shape[-1], hopper)
            return jax_pallas.mha(
                q, k, v, segments, sm_scale=scale, causal=True, block_sizes=blocks, interpret=interpret
            )

        # The kernel wants a key head a query head. Mapped over the members of a group, it reads the group's keys where
        # they lie, instead of copies.
        grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
        return jax.vmap(one_member, in_axes=(3, None, None), out_axes=3)(grouped, k, v).reshape(q.shape)

    return on_each_device(local, mesh, q.shape[2], k.shape[2])(q, k, v, segments)[:, :length]


def _blocks(size: int, hopper: bool) -> jax_pallas.BlockSizes:
    """Return the kernel's blocks: jax's default, but for large heads those that fit a card of 8.6's shared memory.

    A Hopper card's registers hold four times the default's backward blocks, which are 32 by 32; older cards spill.
    """
    if size > 128:
        return jax_pallas.BlockSizes(64, 32, 32, 32, 32, 32)
    return jax_pallas.BlockSizes(128, 128, 64, 64, 64, 64) if hopper else jax_pallas.BlockSizes.get_default()
