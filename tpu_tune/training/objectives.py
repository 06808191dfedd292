"""What training minimizes: an objective is an object that the config names (`objective.name`).

The step asks an objective two things: what the loss of a whole window is divided by (`weight`, from the batch alone,
before anything is differentiated), and the summed loss of one micro-batch. Sum and division are apart so that gradient
accumulation and several devices give exactly the loss and the gradient of the whole window, whatever is counted:
tokens, documents or pairs. Sum and weight may be vectors: a loss of several parts, each divided by a weight of its own
(pairs, and tokens of the chosen answers) before they are added. A new objective is a class like `CrossEntropy` and a
row in `OBJECTIVES`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num
from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.kernels.cross_entropy import IGNORED, chunked_cross_entropy
from tpu_tune.training import preference, preference_settings

Batch = Mapping[str, Int[Array, "..."]]
Sums = dict[str, tuple[Num[Array, "*parts"], Num[Array, "*parts"]]]  # metric -> (sum, weight); their `mean` is reported


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
      unit: what the weight counts (its first part, where it is a vector), in the plural: tokens, pairs. Evaluation rows
        say `eval_num_{unit}`.
      is_likelihood: the loss is a negative log-likelihood in nats, so that exp(mean loss) is a perplexity.
    """

    unit: str
    is_likelihood: bool

    def weight(self, batch: Batch) -> Num[Array, "*parts"]:
        """Return what the micro-batch counts; the window's loss is the sum of losses / the sum of weights."""

    def __call__(self, head: Head, hidden: Float[Array, "B T D"], batch: Batch) -> tuple[Float[Array, "*parts"], Sums]:
        """Return the micro-batch's summed loss (float32, of the weight's shape), and further metrics.

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


# name -> function of (the whole configuration, tokens of each row whose logits may exist at one time)
OBJECTIVES: dict[str, Callable[[ConfigDict, int], Objective]] = {
    "sft": lambda config, chunk: CrossEntropy(chunk),
    **preference.OBJECTIVES,
}


def check_objective(config: ConfigDict) -> None:
    """Check `config.objective`.

    Raises:
      UserError: no such objective (the nearest is given), or settings that it does not have.
    """
    name = config.objective.name
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, 1, 0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"unknown objective.name '{name}'; {hint}choose among {', '.join(OBJECTIVES)}")
    preference_settings.check(config)


def mean(total: Any, weight: Any) -> Any:
    """Return total / weight, 0 where nothing was counted; of arrays or numbers. Of vectors, the sum of quotients.

    Of matrices (labels, parts), the mean over the labels that were counted, as scikit-learn's macro averages; such a
    metric is one of evaluations only.
    """
    if not hasattr(weight, "dtype"):
        return total / (weight or 1)
    where = jnp.where if isinstance(weight, jax.Array) else np.where  # which keeps float64
    quotients = total / where(weight == 0, 1, weight)
    return quotients.sum() / max(1, np.count_nonzero(weight.any(-1))) if weight.ndim == 2 else quotients.sum()
