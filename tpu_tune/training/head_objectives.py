"""Objectives of the heads that judge a text: a label for each document, or a reward, higher for better answers.

The head is applied to every token, which costs nothing beside a layer: its outputs are labels, not a vocabulary. What
it says counts at the tokens that `targets` marks, a document's last ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from tpu_tune.data.tokenized_set import CHOSEN
from tpu_tune.kernels.cross_entropy import IGNORED, token_losses

if TYPE_CHECKING:
    from tpu_tune.training.objectives import Batch, Head, Objective, Sums


@dataclasses.dataclass(frozen=True)
class Classification:
    """A label for each document, as transformers' `ForSequenceClassificationLoss` has it for each `problem_type`.

    A document's loss is the mean over its labels.
    """

    problem_type: str
    unit: ClassVar[str] = "documents"
    is_likelihood: ClassVar[bool] = False

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Return the number of documents."""
        return jnp.sum(batch["targets"] != IGNORED)

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """Return the summed loss, and accuracy and F1 (macro), or the mean squared error."""
        logits, weight = head(hidden).astype(jnp.float32), self.weight(batch)
        counted = (batch["targets"] != IGNORED)[..., None]
        if self.problem_type in ("auto", "single_label_classification"):
            losses, right = token_losses(logits, batch["targets"])
            guessed, true = (jax.nn.one_hot(x, logits.shape[-1]) for x in (logits.argmax(-1), batch["targets"]))
            scores = {"accuracy": (jnp.sum(right), weight), "f1": _f1(guessed * counted, true)}
            return jnp.sum(losses), scores
        labels = batch["labels"]
        if self.problem_type == "regression":
            loss = jnp.sum(jnp.mean((logits - labels) ** 2, -1, keepdims=True) * counted)
            return loss, {"mse": (loss, weight)}
        each = jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        guessed, true = (logits > 0) * counted, (labels > 0.5) * counted
        right = jnp.sum(jnp.all(guessed == true, -1, keepdims=True) * counted)
        scores = {"accuracy": (right, weight), "f1": _f1(guessed, true)}
        return jnp.sum(jnp.mean(each, -1, keepdims=True) * counted), scores


def _f1(guessed: Array, true: Array) -> tuple[Array, Array]:
    """Return the parts of each label's F1, 2 hits / (guessed + true), (labels, 1) each."""
    hits, all_guessed, all_true = (jnp.sum(x, (0, 1), jnp.float32) for x in (guessed * true, guessed, true))
    return 2 * hits[:, None], (all_guessed + all_true)[:, None]


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward for each answer: the log-likelihood that the chosen one of a pair is better (Bradley and Terry 1952).

    As in TRL's RewardTrainer; a row's `margin` (`labels` in the batch) is by how much. Both answers of a pair are
    documents of one row (`data.preference_rows`).

    Attributes:
      centering: weight of the squared sum of a pair's rewards, which a reward's zero is fixed by; 0 for none.
    """

    centering: float = 0.0
    unit: ClassVar[str] = "pairs"
    is_likelihood: ClassVar[bool] = False

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Return the number of pairs."""
        return jnp.sum(batch["document_roles"] == CHOSEN)

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """Return the summed loss, the share of pairs whose chosen answer has the higher reward, and the rewards."""
        count = self.weight(batch)
        rewards, margins = (document_values(values, batch) for values in (head(hidden), batch["labels"]))
        there = batch["document_roles"][:, ::2] == CHOSEN
        chosen, rejected = (jnp.where(there, rewards[:, first::2], 0.0) for first in (0, 1))
        each = -jax.nn.log_sigmoid(chosen - rejected - margins[:, ::2]) + self.centering * (chosen + rejected) ** 2
        total = jnp.sum(chosen), jnp.sum(rejected)
        return jnp.sum(jnp.where(there, each, 0.0)), {
            "accuracy": (jnp.sum((chosen > rejected) & there), count),
            "margin": (total[0] - total[1], count),
            "mean_reward": (total[0] + total[1], 2 * count),
        }


def document_values(values: Float[Array, "B T 1"], batch: Batch) -> Float[Array, "B S"]:
    """Return each document's value at its marked token, 0 where there is none."""
    slots = batch["document_roles"].shape[-1]
    # A product and not a gather: it is one sum over the tokens also where they are cut over devices.
    belongs = batch["segment_ids"][..., None] == jnp.arange(1, slots + 1)
    marked = belongs & (batch["targets"] != IGNORED)[..., None]
    return jnp.sum(jnp.where(marked, values.astype(jnp.float32), 0.0), axis=1)


# head.name -> function of (the whole configuration, tokens of each row whose logits may exist at one time)
HEADS: dict[str, Callable[[ConfigDict, int], Objective]] = {
    "classification": lambda config, chunk: Classification(config.head.problem_type),
    "reward": lambda config, chunk: Reward(config.head.center_rewards_coefficient),
}
