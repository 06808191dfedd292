"""Random bits at the cost of a few integer operations each, for dropout's masks and NEFTune's noise.

`jax.random` computes a cipher for every pair of words: a mask of (2048, 4096) takes six times as long on a v5e as
writing it does, and four such masks a linear layer are 15% of a QLoRA step (by the compiler). Here a word of a key and
the place of an element are mixed by a hash whose every output bit depends on every input bit with a probability near
one half (`lowbias32`, Christopher Wellons, https://nullprogram.com/blog/2018/07/31/). That is no cipher, and need not
be: keys come from `jax.random.fold_in`, and elements of one key differ in their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, UInt32


def random_bits(keys: Array, shape: Sequence[int]) -> UInt32[Array, "*keys ..."]:
    """Return 32 random bits for every element.

    Args:
      keys: typed PRNG keys of any shape.
      shape: what each key gives bits for; at most 2**32 elements.

    Returns:
      (*keys' shape, *shape) words; an element's depends on its key and its place in `shape` alone.
    """
    words = jax.random.key_data(keys)[..., :2]
    first, second = (words[..., index].reshape(*keys.shape, *(1,) * len(shape)) for index in (0, 1))
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(shape):  # sums of iotas, which a mesh can cut along any axis
        stride = math.prod(shape[axis + 1 :])
        iota = jax.lax.broadcasted_iota(jnp.uint32, (1,) * axis + (size,) + (1,) * (len(shape) - axis - 1), axis)
        place = place + iota * jnp.uint32(stride % 2**32)
    return _mixed(_mixed(place ^ first) + second)


def keep_mask(keys: Array, shape: Sequence[int], probability: float) -> Bool[Array, "*keys ..."]:
    """Return True with a probability, for every element (see `random_bits`)."""
    return random_bits(keys, shape) < jnp.uint32(min(round(probability * 2**32), 2**32 - 1))


def uniform(keys: Array, shape: Sequence[int]) -> Float32[Array, "*keys ..."]:
    """Return numbers in [-1, 1), for every element (see `random_bits`): multiples of 2**-23."""
    return (random_bits(keys, shape) >> 8).astype(jnp.float32) * 2.0**-23 - 1.0


def _mixed(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)
