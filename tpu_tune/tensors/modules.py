"""What a leaf of the parameter tree is: its Hugging Face module, its layers, its kind.

The tree is a flat dict from path to leaf. A path is the Hugging Face tensor name with the layer index taken out
(`model.layers.self_attn.q_proj.weight`); the leaf of a layered module has the layers stacked on axis 0. `Module` is
what models tell transforms about their tree, so that neither has to know the other.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal["linear", "embedding", "norm"]


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the tree, or a stack of the same module over the layers.

    Attributes:
      path: the module's path in the tree, without `.weight`.
      kind: what it is; `linear` and `embedding` modules can carry adapters.
      shape: of one layer's weight as it stands in the tree: (in, out), (vocabulary, dim) or (dim,).
      bias: whether it has a bias beside the weight.
      layers: how many are stacked; 0 for a module that is there once.
      layers_path: the part of `path` after which Hugging Face writes the layer index, "" where layers is 0.
      is_head: the output head, which `all-linear` leaves out.
      tied_to: path of the embedding whose weight this head uses; it has then no leaf of its own.
      fan_in_fan_out: the file holds the weight as (in, out), as GPT-2's Conv1D does.
      segments: widths of the matrices fused along `out`, in order; () where there is one.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    bias: bool = False
    layers: int = 0
    layers_path: str = ""
    is_head: bool = False
    tied_to: str = ""
    fan_in_fan_out: bool = False
    segments: tuple[int, ...] = ()

    @property
    def weight(self) -> str:
        """Path of the weight's leaf."""
        return f"{self.path}.weight"

    def name(self, layer: int | None = None) -> str:
        """Return the Hugging Face module name, with the layer index where there is one."""
        if not self.layers:
            return self.path
        return f"{self.layers_path}.{layer}{self.path[len(self.layers_path) :]}"

    def names(self) -> list[str]:
        """Return the Hugging Face names of all its layers, or its one name."""
        return [self.name(layer) for layer in range(self.layers)] if self.layers else [self.path]
