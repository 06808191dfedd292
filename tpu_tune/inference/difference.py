"""How far one model's logits are from another's that should be the same but for rounding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

_LEAST = 1e-4  # of float32 sums in another order, through all layers
_MOST = 0.25


def logits_differ(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the largest absolute difference of two models' logits, and the same over the reference's largest logit."""
    most = float(np.max(np.abs(found - reference)))
    return most, most / float(np.max(np.abs(reference)))


def logit_bound(*dtypes: Any) -> float:
    """Return the largest relative difference that rounding to these dtypes, of weights or activations, explains.

    One rounding is half a machine epsilon off, and through the layers such errors add up as their squares do: the 30 of
    SmolLM2 give up to 3.4 epsilons of the largest logit (2.6% in bfloat16, 0.3% in float16), a small model with an
    adapter of absurd strength 24. The bound is 32, and 25% at most: 25% in bfloat16, 3.1% in float16, 0.01% in float32.
    """
    return max(_LEAST, *(min(32 * float(jnp.finfo(dtype).eps), _MOST) for dtype in dtypes))
