"""What a gated DeltaNet layer is made of: its sizes, and its modules in the tree (`delta_net.py` has the layer)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tpu_tune.tensors import Module

if TYPE_CHECKING:
    from tpu_tune.models.names import LayerNames


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Sizes of a gated DeltaNet layer (arXiv:2412.06464).

    Attributes:
      key_heads: heads of queries and keys.
      value_heads: heads of values; each head of keys serves as many, one after the other.
      key_dim, value_dim: elements of a head.
      taps: tokens that its convolution sees, the own included.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def shared(self) -> int:
        """Heads of values that each head of keys serves."""
        return self.value_heads // self.key_heads

    @property
    def value_width(self) -> int:
        """Elements of all heads' values."""
        return self.value_heads * self.value_dim

    @property
    def unit(self) -> int:
        """Channels of the convolution that belong to one head of keys: its query, its key, its values."""
        return 2 * self.key_dim + self.shared * self.value_dim

    @property
    def channels(self) -> int:
        """Channels of the convolution."""
        return self.key_heads * self.unit


def delta_modules(names: LayerNames, delta: DeltaNet, width: int) -> list[Module]:
    """List the modules between the layer's norm and its output projection, in the order of the forward pass.

    Columns lie head of keys by head of keys in the tree, whether the file has them so (`delta_qkvz`) or not.
    """
    heads, shared, values = delta.key_heads, delta.shared, delta.shared * delta.value_dim
    segments = (heads * delta.key_dim, heads * delta.key_dim, delta.value_width)
    modules = []
    for name, unit, parts, gates in (
        (names.delta_qkv, delta.unit, segments, False),
        (names.delta_qkvz, delta.unit + values, (), False),
        (names.delta_z, values, (), False),
        (names.delta_ba, 2 * shared, (), True),
        (names.delta_b, shared, (), True),
        (names.delta_a, shared, (), True),
    ):
        if name:
            # The gates' exponentials multiply up over the tokens.
            facts = {"segments": parts, "unit": unit, "is_delicate": gates}
            modules.append(Module(name, "linear", (width, heads * unit), ("embed", "heads"), **facts))
    convolution = (delta.taps, delta.channels)
    why = "it is a tensor of another module"  # PEFT wraps modules
    return [
        *modules,
        Module(names.delta_conv, "elementwise", convolution, (None, "heads"), segments=segments, unit=delta.unit),
        # "bias" in its name keeps weight decay from it, as in Hugging Face's Trainer.
        *(
            Module(name, "elementwise", (delta.value_heads,), (None,), decay=decay, is_parameter=True, no_adapter=why)
            for name, decay in ((names.delta_rate, True), (names.delta_shift, False))
        ),
        Module(names.delta_norm, "norm", (delta.value_dim,), (None,)),
    ]
