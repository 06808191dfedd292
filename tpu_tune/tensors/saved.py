"""`SavedTensor`: a module that is trained in full (PEFT's `modules_to_save`)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tpu_tune.tensors.leaf import dense, embed, matmul, unembed


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "value"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A module that is trained in full beside its frozen original (PEFT's `modules_to_save`).

    The module itself uses `value`; a tied head goes on using `base`, as PEFT's copy of the module leaves it.
    """

    base: Any
    value: Array

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ value."""
        return matmul(x, self.value)

    def embed(self, ids: Int[Array, "*batch"], dtype: Any) -> Float[Array, "*batch dim"]:
        """Return the rows of `value`."""
        return embed(ids, self.value, dtype)

    def unembed(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Return x @ base.T."""
        return unembed(x, self.base)

    def dense(self) -> Float[Array, "*layers in out"]:
        """Return `value` in float32."""
        return dense(self.value)
