"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; torch.optim.Muon): matrices move orthogonally.

Each matrix' momentum is replaced by the nearest matrix whose singular values are about 1, by a few Newton-Schulz
steps. Embeddings, the head, norms and biases are not for it: `optimizers.py` gives them AdamW's update. It is not
`optax.contrib.muon` because that corrects the momentum's bias as Adam does, which torch's does not.
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
MOMENTUM = 0.95


def orthogonalized(matrix: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Return a matrix with about the same singular vectors, and singular values between 0.7 and 1.2.

    Quintic Newton-Schulz steps X <- a X + (b G + c G^2) X with G = X X^T, on the shorter side, as torch's.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / jnp.maximum(jnp.linalg.norm(x), EPS)
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def scale_by_muon() -> optax.GradientTransformation:
    """Return Muon's update of one matrix, before weight decay and the learning rate.

    Nesterov momentum of 0.95 as in torch. The result is multiplied by 0.2 sqrt(max(m, n)), torch's
    `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv:2502.16982, section 2.2): an entry then moves as far as
    with AdamW, whose learning rate and weight decay can be kept.
    """

    def update(grad, momentum, params=None):
        del params
        momentum = momentum + (1 - MOMENTUM) * (grad - momentum)
        ahead = grad + MOMENTUM * (momentum - grad)
        return 0.2 * max(grad.shape) ** 0.5 * orthogonalized(ahead), momentum

    return optax.GradientTransformation(jnp.zeros_like, update)


def is_for_muon(axes: tuple[str | None, ...]) -> bool:
    """Whether a leaf of these axes (`LeafSpec.axes`) is a matrix that Muon is meant for: not an embedding or a head."""
    return len(axes) == 2 and "vocab" not in axes
