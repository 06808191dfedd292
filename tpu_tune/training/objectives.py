"""What training minimizes: an objective is an object that the config names (`objective.name`).

The step asks an objective two things: what the loss of a whole window is divided by (`weight`, from the batch alone,
before anything is differentiated), and the summed loss of one micro-batch. Sum and division are apart so that gradient
accumulation and several devices give exactly the loss and the gradient of the whole window, whatever is counted:
tokens, documents or pairs. A new objective is a class like `CrossEntropy` and a row in `OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.kernels.cross_entropy import IGNORED, chunked_cross_entropy, token_losses

Batch = Mapping[str, Int[Array, "..."]]
# Metric -> (sum, weight); their ratio is reported. With an entry for each label, its mean, and of evaluations only.
Sums = dict[str, tuple[Num[Array, "*labels"], Num[Array, "*labels"]]]


@dataclasses.dataclass(frozen=True)
class Head:
    """The model's output layer: `head(hidden)` gives logits.

    Attributes:
      apply: pure function (leaves, hidden states) -> logits; what an objective needs that computes its own gradients.
      leaves: the layer's parameters, a pytree; some trained, some frozen.
    """

    apply: Callable[[Any, Float[Array, "B T D"]], Float[Array, "B T V"]]
    leaves: Any

    def __call__(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return the logits of all tokens at once; large models and vocabularies want them in chunks."""
        return self.apply(self.leaves, hidden)


class Objective(Protocol):
    """A loss. Every batch that it sees is one micro-batch of (rows, tokens) int32 arrays, as `data` makes them.

    Attributes:
      unit: what the weight counts, in the plural: tokens, pairs. Evaluation rows say `eval_num_{unit}`.
      is_likelihood: the loss is a negative log-likelihood in nats, so that exp(mean loss) is a perplexity.
    """

    unit: str
    is_likelihood: bool

    def weight(self, batch: Batch) -> Num[Array, ""]:
        """Return what the micro-batch counts; the window's loss is the sum of losses / the sum of weights."""

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """Return the micro-batch's summed loss (float32), and further metrics.

        Each metric is a (sum, weight) of its own. Both are added up over micro-batches and devices, and logged as sum /
        weight under the metric's name, in evaluations with `eval_` before it.
        """


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Supervised fine-tuning: the cross-entropy of each target token.

    Attributes:
      chunk: tokens of each row whose logits exist at one time.
    """

    chunk: int
    unit: ClassVar[str] = "tokens"
    is_likelihood: ClassVar[bool] = True

    def weight(self, batch: Batch) -> Int[Array, ""]:
        """Return the number of target tokens."""
        return jnp.sum(batch["targets"] != IGNORED)

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """Return the summed cross-entropy, and the share of first guesses that are right."""
        loss, right = chunked_cross_entropy(head.apply, head.leaves, hidden, batch["targets"], self.chunk)
        return loss, {"token_accuracy": (right, self.weight(batch))}


@dataclasses.dataclass(frozen=True)
class Classification:
    """A label for each document, as transformers' `ForSequenceClassificationLoss` has it for each `problem_type`.

    The head is applied to every token, which costs nothing beside a layer; what it says counts at the tokens that
    `targets` marks, one a document. A document's loss is the mean over its labels.
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
    """Return the parts of each label's F1, 2 hits / (guessed + true)."""
    hits, all_guessed, all_true = (jnp.sum(x, (0, 1), jnp.float32) for x in (guessed * true, guessed, true))
    return 2 * hits, all_guessed + all_true


# name -> function of (the whole configuration, tokens of each row whose logits may exist at one time)
OBJECTIVES: dict[str, Callable[[ConfigDict, int], Objective]] = {
    "sft": lambda config, chunk: CrossEntropy(chunk),
}
# What a head of another name than lm is trained by.
HEADS: dict[str, Callable[[ConfigDict, int], Objective]] = {
    "classification": lambda config, chunk: Classification(config.head.problem_type),
}


def check_objective(name: str) -> None:
    """Check `objective.name`.

    Raises:
      UserError: no such objective; the nearest is given.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, 1, 0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"unknown objective.name '{name}'; {hint}choose among {', '.join(OBJECTIVES)}")


def mean(total: Num[Array, "*labels"] | float, weight: Num[Array, "*labels"] | float) -> Any:
    """Return total / weight, 0 where nothing was counted; of a metric with an entry for each label, the mean of these.

    Labels that nothing was counted of are left out, as in scikit-learn's macro averages.
    """
    if getattr(total, "ndim", 0):
        return mean(jnp.sum(jnp.where(weight > 0, mean_of_each(total, weight), 0.0)), jnp.sum(weight > 0))
    return mean_of_each(total, weight)


def mean_of_each(total: Any, weight: Any) -> Any:
    """Return total / weight, 0 where nothing was counted; of arrays or of numbers."""
    return total / (jnp.where(weight == 0, 1, weight) if hasattr(weight, "dtype") else weight or 1)
