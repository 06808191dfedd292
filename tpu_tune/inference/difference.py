"""How far one model's logits are from another's that should be the same but for rounding."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

_LEAST = 1e-4  # of float32 sums in another order, through all layers


def logits_differ(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return the largest absolute difference of two models' logits, and the same over the reference's largest logit."""
    most = float(np.max(np.abs(found - reference)))
    return most, most / float(np.max(np.abs(reference)))


def logit_bound(*dtypes: Any) -> float:
    """Return the largest relative difference that rounding to these dtypes, of weights or activations, explains.

    One rounding is half a machine epsilon off. Through the layers such errors add up as their squares do: to a few
    epsilons of the largest logit in models of any depth, and to eight in none: SmolLM2's 30 layers give up to 2.6% in
    bfloat16 and 0.3% in float16, where the bounds are 6.25% and 0.78%. A wrong scale, a lost or a turned matrix gives
    tens of percent.
    """
    return max(_LEAST, *(8 * float(jnp.finfo(dtype).eps) for dtype in dtypes))
