"""`Observed`: a leaf that notes what it is multiplied with."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from tpu_tune.tensors.leaf import grouped_matmul, matmul


@dataclasses.dataclass(frozen=True)
class Observed:
    """A frozen matrix whose inputs are wanted: for one call of a layer, inside the function that is traced.

    Attributes:
      base: the leaf that computes.
      path: its path, under which an input is noted.
      seen: path -> input and, of experts, the rows of each; added to by the products, so the caller reads it before the
        trace ends.
    """

    base: Any
    path: str
    seen: dict[str, tuple[Array, Array | None]]

    def matmul(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return x @ base, and note x."""
        self.seen[self.path] = (x, None)
        return matmul(x, self.base)

    def grouped_matmul(self, x: Float[Array, "rows in"], sizes: Int[Array, " experts"]) -> Float[Array, "rows out"]:
        """Return each row's product with its expert's matrix, and note x, sorted by expert, and the rows of each."""
        self.seen[self.path] = (x, sizes)
        return grouped_matmul(x, self.base, sizes)
