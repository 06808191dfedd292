"""Noise on the embeddings of training inputs: NEFTune (Jain et al. 2023, arXiv:2310.05914, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tpu_tune.kernels.random_bits import uniform


def noise(
    key: Array, alpha: float, segment_ids: Int[Array, "B T"]
) -> Callable[[Float[Array, "B T D"]], Float[Array, "B T D"]]:
    """Return a function that adds uniform noise of +-alpha / sqrt(L D) to embeddings.

    Args:
      key: PRNG key of this micro-batch.
      alpha: `train.neftune_noise_alpha`; the paper uses 5, 10 and 15.
      segment_ids: document of each token, 0 for padding, which gets no noise. L is the length of a token's own
        document, so that packing changes nothing; transformers takes the padded length of the batch, which is the same
        for rows of one length.
    """
    width = segment_ids.shape[1]
    counts = jax.vmap(lambda row: jnp.zeros(width + 1, jnp.float32).at[row].add(1.0))(segment_ids)
    lengths = jnp.take_along_axis(counts, segment_ids, axis=1)

    def add(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        bound = jnp.where(segment_ids > 0, alpha / jnp.sqrt(lengths * x.shape[-1]), 0.0)
        return x + (bound[..., None] * uniform(key, x.shape)).astype(x.dtype)

    return add
