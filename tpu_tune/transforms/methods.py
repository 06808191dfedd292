"""What is trained, what stays frozen, and the tree that the model sees: `split` and `combine`, by the method.

    full: everything is trained.            lora: adapters, modules_to_save and biases are; the base is frozen.

A `Method` is an object with these two functions and the facts of the leaves it trains. `combine` is what the jitted
loss calls: it wraps frozen leaves and what is trained in leaves that compute both, without copying either, so that the
gradient is taken with respect to the small tree only. LoRA's method is `lora.Targets`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array

from tpu_tune.errors import UserError
from tpu_tune.tensors import LeafSpec, Module, QuantizedTensor

Tree = dict[str, Any]


class Method(Protocol):
    """A way to train a model: which part of its tree, and what the model is made of while it is trained.

    Attributes:
      saved: modules that are trained in full though the others are frozen; they are not quantized.
      is_random: whether a training step draws random numbers (dropout).
    """

    saved: Sequence[Module]
    is_random: bool

    def init(self, params: Mapping[str, Any], key: Array) -> Tree:
        """Return the fresh leaves that the method adds to the tree, which change nothing yet."""

    def split(self, params: Mapping[str, Any], adapters: Mapping[str, Array]) -> tuple[Tree, Tree]:
        """Return (trainable, frozen) trees; trained leaves are float32 arrays.

        Args:
          params: the base tree.
          adapters: leaves from `init` or a file; may hold saved modules and biases too.
        """

    def combine(
        self, trainable: Mapping[str, Any], frozen: Mapping[str, Any], dropout_key: Array | None = None
    ) -> Tree:
        """Return the tree that the model runs on; pure, and free inside a jitted function.

        Args:
          trainable, frozen: the trees that `split` returned.
          dropout_key: PRNG key of this micro-batch; None switches dropout off. Every layer of every leaf gets a key of
            its own from it, whatever else is trained.
        """

    def leaves(self, base: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
        """Return path -> facts of every leaf of the trainable tree, given the facts of the base's leaves."""

    def num_parameters(self, trainable: Mapping[str, Any]) -> int:
        """Return the number of trained parameters."""


@dataclasses.dataclass(frozen=True)
class FullTuning:
    """Everything is trained, in float32: bfloat16 storage would lose a small learning rate's updates."""

    saved: tuple[Module, ...] = ()
    is_random: bool = False

    def init(self, params: Mapping[str, Any], key: Array) -> Tree:
        """Return nothing: the method adds no leaf."""
        return {}

    def split(self, params: Mapping[str, Any], adapters: Mapping[str, Array]) -> tuple[Tree, Tree]:
        """Return all leaves as trainable, and none as frozen.

        Raises:
          UserError: a leaf is quantized: the model's files have it so.
        """
        for path, leaf in params.items():
            if isinstance(leaf, QuantizedTensor):
                raise UserError(
                    f"method 'full' trains every weight, and the model's files have {path} in {leaf.format}; set "
                    "method=lora, or give the unquantized model"
                )
        return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in params.items()}, {}

    def combine(
        self, trainable: Mapping[str, Any], frozen: Mapping[str, Any], dropout_key: Array | None = None
    ) -> Tree:
        """Return the trainable leaves, beside frozen ones where there are any."""
        return {**frozen, **trainable}

    def leaves(self, base: Mapping[str, LeafSpec]) -> dict[str, LeafSpec]:
        """Return the base's facts."""
        return dict(base)

    def num_parameters(self, trainable: Mapping[str, Any]) -> int:
        """Return the size of all leaves."""
        return sum(leaf.size for leaf in trainable.values())


FULL = FullTuning()
