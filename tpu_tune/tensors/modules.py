"""What a leaf of the parameter tree is: its Hugging Face module, its layers, its kind.

The tree is a flat dict from path to leaf. A path is the Hugging Face tensor name with the layer index taken out
(`model.layers.self_attn.q_proj.weight`); the leaf of a layered module has the layers stacked on axis 0. `Module` is
what models tell transforms about their tree, so that neither has to know the other.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["linear", "embedding", "norm", "elementwise"]


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """What transforms need to know of a leaf: its module says it, so that nobody guesses from a name.

    Attributes:
      axes: a logical name for each axis of one layer's array, which `transforms.sharding` maps to mesh axes; None: an
        axis that is never cut.
      stacked: whether axis 0 of the leaf counts layers, before `axes`.
      unit: entries of the last axis that belong together; a mesh cuts between units only.
      decay: whether weight decay applies.
      experts: whether the next leading axis counts experts.
      lora_plus: which of LoRA+'s rates applies (arXiv:2402.12354), "" for the learning rate itself.
    """

    axes: tuple[str | None, ...]
    stacked: bool = False
    unit: int = 1
    decay: bool = True
    experts: bool = False
    lora_plus: Literal["", "ratio", "embedding"] = ""

    @property
    def leading(self) -> int:
        """Number of axes before those of one matrix or vector: layers, experts."""
        return self.stacked + self.experts


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the tree, or a stack of the same module over the layers that have it.

    Attributes:
      path: the module's path in the tree, without `.weight`. Where layers have modules of one name that differ in
        shape, each stack after the first has the index of its first layer in brackets: `model.layers[3].mlp.up_proj`.
      kind: linear, embedding, norm, or elementwise, which acts on each channel by itself: a factor, a shift, or the
        taps of a convolution along the tokens. `linear` and `embedding` modules can carry adapters.
      shape: shape of one layer's weight as it stands in the tree: (in, out), (vocabulary, dim), (dim,) or, for a
        convolution, (taps, dim).
      axes: logical names of those axes, as in `LeafSpec`.
      bias: whether it has a bias beside the weight.
      layers: indices of the layers that are stacked, ascending; () for a module that is there once.
      layers_path: the part of its Hugging Face name before the layer index, "" for a module that is there once.
      is_head: whether it is the output head, which `all-linear` leaves out.
      tied_to: path of the embedding whose weight this head uses; it has then no leaf of its own.
      fan_in_fan_out: whether the file holds the weight as (in, out), as GPT-2's Conv1D does.
      segments: widths of the matrices that the file has side by side along `out`, in order; () where there is one.
        In the tree they lie in pieces, a `unit` holding the matching piece of each: see `from_torch`.
      alternating: whether the file has them column by column in turn instead: the first of each, the second of each.
      unit: columns of `out` that belong together; a mesh cuts between units only.
      decay: False where weight decay does not apply to its weight though it is no norm.
      is_delicate: whether quantization takes it only by name: a small matrix whose error the model magnifies.
      experts: number of experts whose matrices are stacked after the layers' axis, `shape` being one's; 0 for none.
      experts_per_token: to how many of them each token goes.
      experts_path: the part of its name inside the layer after which an expert's index follows in Hugging Face's names;
        "" where a file holds all experts of a layer in one tensor, (experts, out, in).
      is_router: whether it decides which experts a token goes to: adapters and quantization take it only by name.
      by_name: whether `all-linear` leaves it without an adapter though it could carry one.
      is_parameter: whether its tensor has the module's name, without `.weight` behind it.
      no_adapter: why neither an adapter nor a trained copy can stand on it; "" where one can.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias: bool = False
    layers: tuple[int, ...] = ()
    layers_path: str = ""
    is_head: bool = False
    tied_to: str = ""
    fan_in_fan_out: bool = False
    segments: tuple[int, ...] = ()
    alternating: bool = False
    unit: int = 1
    decay: bool = True
    is_delicate: bool = False
    experts: int = 0
    experts_per_token: int = 0
    experts_path: str = ""
    is_router: bool = False
    by_name: bool = False
    is_parameter: bool = False
    no_adapter: str = ""

    @property
    def weight(self) -> str:
        """Path of the weight's leaf."""
        return f"{self.path}.weight"

    @property
    def is_matrix(self) -> bool:
        """Whether its weight is a matrix, which adapters and quantization are made for."""
        return self.kind in ("linear", "embedding")

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of its leaves: layers and experts, as far as it has them; () for a module that is there once."""
        return ((len(self.layers),) if self.layers else ()) + ((self.experts,) if self.experts else ())

    def leaves(self) -> dict[str, LeafSpec]:
        """Return path -> facts of its leaves: the weight, and the bias where there is one."""
        common = {"stacked": bool(self.layers), "unit": self.unit, "experts": bool(self.experts)}
        # Hugging Face's Trainer spares modules that are norms, not parameters of others.
        decay = self.decay and (self.kind != "norm" or self.is_parameter)
        specs = {self.weight: LeafSpec(self.axes, decay=decay, **common)}
        if self.bias:
            specs[f"{self.path}.bias"] = LeafSpec((None,), decay=False, **common)
        return specs

    def leaf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return path -> shape of its leaves, layers stacked on axis 0; none for a tied head."""
        shapes = {} if self.tied_to else {self.weight: self.stack + self.shape}
        return shapes | ({f"{self.path}.bias": self.stack + self.shape[-1:]} if self.bias and not self.tied_to else {})

    def name(self, layer: int | str | None = None, expert: int | str | None = None) -> str:
        """Return the Hugging Face module name, with the indices of layer and expert where it has them."""
        if not self.layers:
            return self.path
        _, _, inside = self.path[len(self.layers_path) :].partition(".")
        if self.experts_path and expert is not None:
            inside = f"{self.experts_path}.{expert}{inside.removeprefix(self.experts_path)}"
        return f"{self.layers_path}.{layer}.{inside}"

    def names_of(self, layer: int | None) -> list[str]:
        """Return the Hugging Face names of one layer: one, or one for each expert."""
        return [self.name(layer, expert) for expert in (range(self.experts) if self.experts_path else (None,))]

    def names(self) -> list[str]:
        """Return the Hugging Face names of all its layers and experts, or its one name."""
        return [name for layer in self.layers or (None,) for name in self.names_of(layer)]

    def tensor_name(self, name: str, suffix: str) -> str:
        """Return a tensor's name in the files, given the module's name and `weight` or `bias`."""
        if self.is_parameter:
            return name if suffix == "weight" else f"{name}_{suffix}"
        return f"{name}.{suffix}"

    @property
    def stacked_in_file(self) -> tuple[int, ...]:
        """Leading axes of its tensors in the files: (experts,) where one holds all of a layer, else ()."""
        return (self.experts,) if self.experts and not self.experts_path else ()

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of one layer's weight in torch layout; of one expert's, where each has a tensor of its own."""
        if self._is_convolution:
            return (self.shape[1], 1, self.shape[0])
        return self.stacked_in_file + (self.shape[::-1] if self._is_transposed else self.shape)

    def from_torch(self, weight: Any) -> Any:
        """Turn one layer's or one expert's weight from torch layout to the tree's: (in, out), fused columns in pieces.

        A `QuantizedTensor` is (in, out) already; its columns are ordered all the same.
        """
        if self._is_convolution:
            weight = weight[:, 0].T
        transposed = weight.T if self._is_transposed and hasattr(weight, "T") else weight
        return jax.tree.map(self.interleave, transposed)

    def to_torch(self, weight: Any) -> Any:
        """Turn one layer's weight back to torch layout."""
        weight = self.deinterleave(weight)
        if self._is_convolution:
            return weight.T[:, None]
        return weight.T if self._is_transposed else weight

    def interleave(self, columns: Any) -> Any:
        """Bring (..., out) from the file's order, segment after segment, to the tree's, unit after unit.

        Attention that reads q|k|v, and a mesh that cuts `out`, then find what belongs together in one place. A bias, an
        adapter's B and DoRA's magnitude are ordered as the weight is.
        """
        if not self.segments:
            return columns
        leading, count = columns.shape[:-1], sum(self.segments) // self.unit
        ends = list(itertools.accumulate(self.segments))
        if self.alternating:
            columns = _concatenate([columns[..., first :: len(ends)] for first in range(len(ends))])
        parts = [columns[..., end - width : end] for end, width in zip(ends, self.segments, strict=True)]
        pieces = [part.reshape(*leading, count, part.shape[-1] // count) for part in parts]
        return _concatenate(pieces).reshape(columns.shape)

    def deinterleave(self, columns: Any) -> Any:
        """Undo `interleave`."""
        if not self.segments:
            return columns
        leading, count = columns.shape[:-1], sum(self.segments) // self.unit
        units = columns.reshape(*leading, count, self.unit)
        ends = [end // count for end in itertools.accumulate(self.segments)]
        parts = [units[..., end - width // count : end] for end, width in zip(ends, self.segments, strict=True)]
        parts = [part.reshape(*leading, -1) for part in parts]
        if self.alternating:
            return _concatenate([part[..., None] for part in parts]).reshape(columns.shape)
        return _concatenate(parts)

    @property
    def _is_convolution(self) -> bool:
        return self.kind == "elementwise" and len(self.shape) == 2

    @property
    def _is_transposed(self) -> bool:
        return self.kind == "linear" and not self.fan_in_fan_out


def _concatenate(parts: list[Any]) -> Any:
    return (np if isinstance(parts[0], np.ndarray) else jnp).concatenate(parts, axis=-1)
