"""`Observed`: a leaf that notes what it is multiplied with."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float

from tpu_tune.tensors.leaf import matmul


@dataclasses.dataclass(frozen=True)
class Observed:
    """A frozen matrix whose inputs are wanted: for one call of a layer, inside the function that is traced.

    Attributes:
      base: the leaf that computes.
      path: its path, under which an input is noted.
      seen: path -> input; added to by `matmul`, so the caller reads it before the trace ends.
    """

    base: Any
    path: str
    seen: dict[str, Array]

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ base, and note x."""
        self.seen[self.path] = x
        return matmul(x, self.base)
