"""Losses of answers to judge, as functions of log-probabilities; TRL's definitions, names and defaults.

All arguments are float32 arrays of one shape, one element a pair (of `kto`, an answer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

Values = Float[Array, "*pairs"]


@dataclasses.dataclass(frozen=True)
class Ratios:
    """How pairs stand beside their reference.

    Attributes:
      chosen, rejected: log p(answer) - log p(answer) of the reference model.
      chosen_tokens, rejected_tokens: tokens of the answers.
    """

    chosen: Values
    rejected: Values
    chosen_tokens: Values
    rejected_tokens: Values

    @property
    def margin(self) -> Values:
        """The difference of the log ratios."""
        return self.chosen - self.rejected

    @property
    def mean_margin(self) -> Values:
        """The difference of the log ratios per token."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def _exo_pair(r: Ratios, beta: float, smoothing: float) -> Values:
    log_q, log_not_q = log_sigmoid(beta * r.margin), log_sigmoid(-beta * r.margin)
    chosen = jnp.exp(log_q) * (log_q - jnp.log1p(-smoothing))
    return chosen + jnp.exp(log_not_q) * (log_not_q - jnp.log(smoothing))


def _nca_pair(r: Ratios, beta: float, smoothing: float) -> Values:
    pulled = log_sigmoid(-beta * r.chosen) + log_sigmoid(-beta * r.rejected)
    return -log_sigmoid(beta * r.chosen) - 0.5 * pulled


def _robust(r: Ratios, beta: float, smoothing: float) -> Values:
    kept, turned = -log_sigmoid(beta * r.margin), -log_sigmoid(-beta * r.margin)
    return ((1 - smoothing) * kept - smoothing * turned) / (1 - 2 * smoothing)


# loss type of DPO -> function of (ratios, beta, label smoothing)
DPO: dict[str, Callable[[Ratios, float, float], Values]] = {
    "sigmoid": lambda r, beta, _: -log_sigmoid(beta * r.margin),
    "hinge": lambda r, beta, _: jnp.maximum(0.0, 1 - beta * r.margin),
    "ipo": lambda r, beta, _: (r.mean_margin - 1 / (2 * beta)) ** 2,
    "sigmoid_norm": lambda r, beta, _: -log_sigmoid(beta * r.mean_margin),
    "robust": _robust,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": lambda r, beta, _: -log_sigmoid(beta * r.chosen) - log_sigmoid(-beta * r.rejected),
    "sppo_hard": lambda r, beta, _: (r.chosen - 0.5 / beta) ** 2 + (r.rejected + 0.5 / beta) ** 2,
    "apo_zero": lambda r, beta, _: 1 - sigmoid(beta * r.chosen) + sigmoid(beta * r.rejected),
    "apo_down": lambda r, beta, _: sigmoid(beta * r.chosen) + 1 - sigmoid(beta * r.margin),
}


def smoothed(logits: Values, smoothing: float) -> Values:
    """Return -log sigmoid(logits), where a share `smoothing` of the pairs may be the wrong way round."""
    return -log_sigmoid(logits) * (1 - smoothing) - log_sigmoid(-logits) * smoothing


def cpo(kind: str, chosen: Values, rejected: Values, beta: float, smoothing: float, gamma: float) -> Values:
    """Return CPO's and SimPO's losses of log-probabilities (sums; of `simpo` and `ipo`, means per token)."""
    margin = chosen - rejected
    if kind == "hinge":
        return jnp.maximum(0.0, 1 - beta * margin)
    if kind == "ipo":
        return (margin - 1 / (2 * beta)) ** 2
    return smoothed(beta * margin - (gamma if kind == "simpo" else 0.0), smoothing)


def log_odds_ratio(chosen: Values, rejected: Values) -> Values:
    """Return the log of the ratio of the answers' odds, from their mean log-probabilities (below 0)."""
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def kto(
    kind: str, ratio: Values, desirable: Values, divergence: Float[Array, ""], beta: float, weights: tuple[float, float]
) -> Values:
    """Return the losses of single answers.

    Args:
      kind: kto | apo_zero_unpaired.
      ratio: log p(answer) - log p(answer) of the reference.
      desirable: bool.
      divergence: K, an estimate of the divergence from the reference; a constant, not read by apo_zero_unpaired.
      beta: strength.
      weights: of desirable answers, and of undesirable ones.
    """
    distance = ratio - (divergence if kind == "kto" else 0.0)
    return jnp.where(desirable, weights[0] * sigmoid(-beta * distance), weights[1] * sigmoid(beta * distance))


def _log1mexp(x: Values) -> Values:
    """log(1 - exp(x)) of x < 0, exact near 0 and far below it."""
    small = x > -jnp.log(2.0)
    near = jnp.log(-jnp.expm1(jnp.where(small, x, -1.0)))
    return jnp.where(small, near, jnp.log1p(-jnp.exp(jnp.where(small, -1.0, x))))
