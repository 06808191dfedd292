"""What a leaf of the parameter tree is: its Hugging Face module, its layers, its kind.

The tree is a flat dict from path to leaf. A path is the Hugging Face tensor name with the layer index taken out
(`model.layers.self_attn.q_proj.weight`); the leaf of a layered module has the layers stacked on axis 0. `Module` is
what models tell transforms about their tree, so that neither has to know the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

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
      segments: widths of the matrices that the file has side by side along `out`, in order; () where there is one.
        In the tree they lie in pieces, a `unit` holding the matching piece of each: see `from_torch`.
      no_adapter: why neither an adapter nor a trained copy can stand on it; "" where one can.
      unit: columns of `out` that belong together; a mesh cuts between units only.
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
    unit: int = 1
    no_adapter: str = ""

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

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one layer's weight in torch layout."""
        return self.shape[::-1] if self._turned else self.shape

    def from_torch(self, weight: Any) -> Any:
        """Turn one layer's weight from torch layout to the tree's: (in, out), fused columns in pieces.

        A `QuantizedTensor` is (in, out) already; its columns are ordered all the same.
        """
        turned = weight.T if self._turned and hasattr(weight, "T") else weight
        return jax.tree.map(self.interleave, turned)

    def to_torch(self, weight: Any) -> Any:
        """Turn one layer's weight back to torch layout."""
        weight = self.deinterleave(weight)
        return weight.T if self._turned else weight

    def interleave(self, columns: Any) -> Any:
        """Bring (..., out) from the file's order, segment after segment, to the tree's, unit after unit.

        Attention that reads q|k|v, and a mesh that cuts `out`, then find what belongs together in one place. A bias, an
        adapter's B and DoRA's magnitude are ordered as the weight is.
        """
        if not self.segments:
            return columns
        leading, count = columns.shape[:-1], sum(self.segments) // self.unit
        ends = [sum(self.segments[: place + 1]) for place in range(len(self.segments))]
        parts = [columns[..., end - width : end] for end, width in zip(ends, self.segments, strict=True)]
        pieces = [part.reshape(*leading, count, part.shape[-1] // count) for part in parts]
        return _concatenate(pieces).reshape(columns.shape)

    def deinterleave(self, columns: Any) -> Any:
        """Undo `interleave`."""
        if not self.segments:
            return columns
        leading, count = columns.shape[:-1], sum(self.segments) // self.unit
        units = columns.reshape(*leading, count, self.unit)
        ends = [sum(self.segments[: place + 1]) // count for place in range(len(self.segments))]
        parts = [units[..., end - width // count : end] for end, width in zip(ends, self.segments, strict=True)]
        return _concatenate([part.reshape(*leading, -1) for part in parts])

    @property
    def _turned(self) -> bool:
        return self.kind == "linear" and not self.fan_in_fan_out


def _concatenate(parts: list[Any]) -> Any:
    return (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts, axis=-1)
