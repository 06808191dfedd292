"""Objectives of answers to judge: dpo, cpo, simpo, orpo of pairs, kto of single answers.

Both answers of a pair are documents of one packed row, the chosen first (`data.preference_rows`). The log-probability
of each document is the sum of its targets', which come from chunks of logits. The weight is the number of pairs (kto:
of answers), whatever their lengths, and where the chosen answers' cross-entropy is part of the loss the number of its
tokens; so accumulation and several devices give the whole window's loss. A reference model's log-probabilities do not
change in training: they come in the batch (`reference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from tpu_tune.data.tokenized_set import CHOSEN, MISMATCHED, REJECTED
from tpu_tune.kernels.cross_entropy import IGNORED, token_log_probs
from tpu_tune.training import preference_losses as losses
from tpu_tune.training.preference_settings import loss_types

if TYPE_CHECKING:
    from tpu_tune.training.objectives import Batch, Head, Sums


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """No loss: the log-probability of each document, (rows, slots) float32; what a reference model is asked for."""

    chunk: int
    unit: ClassVar[str] = "documents"
    is_likelihood: ClassVar[bool] = False

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Return the number of documents."""
        return jnp.sum(batch["document_roles"] > 0)

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, "B S"], Sums]:
        """Return each document's summed log-probability, 0 where there is none, and no metrics."""
        return _document_sums(_log_probs(self.chunk, head, hidden, batch["targets"]), batch), {}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The pairs of a micro-batch, (rows, slots / 2) arrays.

    Attributes:
      there: whether there is a pair. Where there is none the other arrays hold numbers that no loss breaks at.
      chosen, rejected: log-probabilities of the answers.
      chosen_tokens, rejected_tokens: their tokens.
      chosen_reference, rejected_reference: the reference model's log-probabilities, 0 without one.
    """

    there: Bool[Array, "B P"]
    chosen: Float[Array, "B P"]
    rejected: Float[Array, "B P"]
    chosen_tokens: Float[Array, "B P"]
    rejected_tokens: Float[Array, "B P"]
    chosen_reference: Float[Array, "B P"]
    rejected_reference: Float[Array, "B P"]

    def sum(self, values: Float[Array, "B P"]) -> Float[Array, ""]:
        """Add up what belongs to pairs."""
        return jnp.sum(jnp.where(self.there, values, 0.0))

    def metrics(self, chosen: Array, rejected: Array, chosen_log: Array, rejected_log: Array) -> Sums:
        """Return what is logged, from rewards and log-probabilities."""
        chosen, rejected, count = jax.lax.stop_gradient(chosen), jax.lax.stop_gradient(rejected), jnp.sum(self.there)
        found = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
            "logps/chosen": chosen_log,
            "logps/rejected": rejected_log,
        }
        return {name: (self.sum(values), count) for name, values in found.items()}


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """What the objectives of pairs share; `loss` is one of the functions below.

    Attributes:
      chunk: tokens of each row whose logits exist at one time.
      loss: function of the pairs -> (each pair's loss, rewards and log-probabilities to log, further metrics).
      likelihood: weight of the chosen answers' cross-entropy, a mean over their tokens, which is then the metric
        `nll_loss`, also where the weight is 0; None: there is none.
      with_prompt: whether that is over their prompts' tokens too.
    """

    chunk: int
    loss: Callable[[Pairs], tuple[Array, tuple[Array, ...], Mapping[str, Array]]]
    likelihood: float | None = None
    with_prompt: bool = False
    unit: ClassVar[str] = "pairs"
    is_likelihood: ClassVar[bool] = False

    def weight(self, batch: Batch) -> Float[Array, "2"]:
        """Return the number of pairs, and of tokens of the chosen answers."""
        pairs = jnp.sum(batch["document_roles"] == CHOSEN)
        return jnp.stack([pairs, jnp.sum(self._likely(batch))]).astype(jnp.float32)

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, "2"], Sums]:
        """Return the summed loss of pairs and of the chosen answers' tokens, and what users watch."""
        answers = batch["targets"] != IGNORED
        log_probs = _log_probs(self.chunk, head, hidden, self._targets(batch))
        pairs = _pairs(jnp.where(answers, log_probs, 0.0), answers, batch)
        each, logged, more = self.loss(pairs)
        likely = self._likely(batch)
        negative, tokens = -jnp.sum(jnp.where(likely, log_probs, 0.0)), jnp.sum(likely)
        metrics = pairs.metrics(*logged)
        metrics |= {name: (pairs.sum(values), jnp.sum(pairs.there)) for name, values in more.items()}
        if self.likelihood is not None:
            metrics["nll_loss"] = (negative, tokens)
        return jnp.stack([pairs.sum(each), (self.likelihood or 0.0) * negative]), metrics

    def _likely(self, batch: Batch) -> Bool[Array, "B T"]:
        """Which targets the cross-entropy counts."""
        return (_token_roles(batch) == CHOSEN) & (self._targets(batch) != IGNORED)

    def _targets(self, batch: Batch) -> Int[Array, "B T"]:
        if not self.with_prompt:
            return batch["targets"]
        ids, segments = (jnp.pad(batch[name][:, 1:], [(0, 0), (0, 1)]) for name in ("input_ids", "segment_ids"))
        follows = (segments == batch["segment_ids"]) & (segments > 0) & (_token_roles(batch) == CHOSEN)
        return jnp.where(follows, ids, batch["targets"])


@dataclasses.dataclass(frozen=True)
class Kto:
    """Single answers, desirable or not, against the reference and a common distance from it (Ethayarajh et al. 2024).

    Attributes:
      chunk: tokens of each row whose logits exist at one time.
      kind: kto | apo_zero_unpaired.
      beta: strength.
      weights: of desirable answers, and of undesirable ones.
    """

    chunk: int
    kind: str
    beta: float
    weights: tuple[float, float]
    unit: ClassVar[str] = "answers"
    is_likelihood: ClassVar[bool] = False

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Return the number of answers to judge."""
        return jnp.sum((batch["document_roles"] == CHOSEN) | (batch["document_roles"] == REJECTED))

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """Return the summed loss, and what users watch."""
        roles = batch["document_roles"]
        sums = _document_sums(_log_probs(self.chunk, head, hidden, batch["targets"]), batch)
        ratio = sums - batch["document_reference"]
        desirable, undesirable, others = (roles == role for role in (CHOSEN, REJECTED, MISMATCHED))
        moved = jnp.sum(jnp.where(others, ratio, 0.0)) / jnp.maximum(jnp.sum(others), 1)
        divergence = jax.lax.stop_gradient(jnp.maximum(moved, 0.0))
        each = losses.kto(self.kind, ratio, desirable, divergence, self.beta, self.weights)
        loss = jnp.sum(jnp.where(desirable | undesirable, each, 0.0))
        rewards = jax.lax.stop_gradient(self.beta * ratio)

        def total(values: Array, where: Array) -> tuple[Array, Array]:
            return jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where)

        chosen, rejected = total(rewards, desirable), total(rewards, undesirable)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": (jnp.stack([chosen[0], -rejected[0]]), jnp.stack([chosen[1], rejected[1]])),
            "logps/chosen": total(sums, desirable),
            "logps/rejected": total(sums, undesirable),
        }
        if self.kind == "kto":
            metrics["kl"] = (divergence, jnp.int32(1))
        return loss, metrics


def _log_probs(chunk: int, head: Head, hidden: Array, targets: Array) -> Float[Array, "B T"]:
    return token_log_probs(head.apply, head.leaves, hidden, targets, chunk)


def _document_sums(values: Float[Array, "B T"], batch: Batch) -> Float[Array, "B S"]:
    """Add up the tokens of each document."""
    slots = batch["document_roles"].shape[-1]
    # A product and not a scatter: it is one sum over the tokens also where they are cut over devices.
    belongs = batch["segment_ids"][..., None] == jnp.arange(1, slots + 1)
    return jnp.sum(jnp.where(belongs, values[..., None], 0.0), axis=1)


def _token_roles(batch: Batch) -> Int[Array, "B T"]:
    """The role of each token's document, 0 where padding."""
    segments = batch["segment_ids"]
    roles = jnp.take_along_axis(batch["document_roles"], jnp.maximum(segments - 1, 0), axis=-1)
    return jnp.where(segments > 0, roles, 0)


def _pairs(log_probs: Float[Array, "B T"], answers: Bool[Array, "B T"], batch: Batch) -> Pairs:
    roles = batch["document_roles"]
    there = roles[:, ::2] == CHOSEN

    def each(values: Array, instead: float) -> tuple[Array, Array]:
        return tuple(jnp.where(there, values[:, first::2], instead) for first in (0, 1))

    sums = each(_document_sums(log_probs, batch), -1.0)
    tokens = each(_document_sums(answers.astype(jnp.float32), batch), 1.0)
    reference = each(batch.get("document_reference", jnp.zeros(roles.shape, jnp.float32)), 0.0)
    return Pairs(there, *sums, *tokens, *reference)


def _dpo(config: ConfigDict, chunk: int) -> PairObjective:
    settings = config.objective
    types, beta, smoothing = loss_types(config), settings.beta, settings.label_smoothing
    weights = list(settings.loss_weights) or [1.0] * len(types)
    likelihood = settings.sft_weight + sum(weight for kind, weight in zip(types, weights, strict=True) if kind == "sft")
    terms = [(losses.DPO[kind], weight) for kind, weight in zip(types, weights, strict=True) if kind != "sft"]

    def loss(pairs: Pairs) -> tuple[Array, tuple[Array, ...], dict[str, Array]]:
        chosen, rejected = pairs.chosen - pairs.chosen_reference, pairs.rejected - pairs.rejected_reference
        ratios = losses.Ratios(chosen, rejected, pairs.chosen_tokens, pairs.rejected_tokens)
        each = sum((weight * term(ratios, beta, smoothing) for term, weight in terms), jnp.zeros_like(chosen))
        return each, (beta * chosen, beta * rejected, pairs.chosen, pairs.rejected), {}

    return PairObjective(chunk, loss, likelihood or None)


def _cpo(config: ConfigDict, chunk: int, kind: str, likelihood: float) -> PairObjective:
    beta, smoothing, gamma = (config.objective[key] for key in ("beta", "label_smoothing", "simpo_gamma"))
    is_mean = kind in ("simpo", "ipo")

    def loss(pairs: Pairs) -> tuple[Array, tuple[Array, ...], dict[str, Array]]:
        chosen = pairs.chosen / pairs.chosen_tokens if is_mean else pairs.chosen
        rejected = pairs.rejected / pairs.rejected_tokens if is_mean else pairs.rejected
        each = losses.cpo(kind, chosen, rejected, beta, smoothing, gamma)
        return each, (beta * chosen, beta * rejected, chosen, rejected), {}

    return PairObjective(chunk, loss, likelihood)


def _orpo(config: ConfigDict, chunk: int) -> PairObjective:
    beta = config.objective.beta

    def loss(pairs: Pairs) -> tuple[Array, tuple[Array, ...], dict[str, Array]]:
        chosen, rejected = pairs.chosen / pairs.chosen_tokens, pairs.rejected / pairs.rejected_tokens
        log_odds = losses.log_odds_ratio(chosen, rejected)
        ratio = jax.nn.log_sigmoid(log_odds)
        more = {"log_odds_ratio": ratio, "log_odds_chosen": log_odds}
        return -beta * ratio, (beta * chosen, beta * rejected, chosen, rejected), more

    return PairObjective(chunk, loss, 1.0, with_prompt=True)


def _kto(config: ConfigDict, chunk: int) -> Kto:
    settings = config.objective
    weights = settings.desirable_weight, settings.undesirable_weight
    return Kto(chunk, loss_types(config)[0], settings.beta, weights)


# name -> function of (the whole configuration, tokens of each row whose logits may exist at one time)
OBJECTIVES: dict[str, Callable[[ConfigDict, int], Any]] = {
    "dpo": _dpo,
    "orpo": _orpo,
    "simpo": lambda config, chunk: _cpo(config, chunk, "simpo", 0.0),
    "cpo": lambda config, chunk: _cpo(config, chunk, loss_types(config)[0], config.objective.cpo_alpha),
    "kto": _kto,
}
