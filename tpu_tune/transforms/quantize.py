"""`quantize(params, policy)`: some leaves of the tree become `QuantizedTensor`.

The policy says by name which; loading applies it to one tensor at a time, so that a float model never stands in
memory whole, and `quantize` applies it to a tree that is already there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.errors import UserError
from tpu_tune.tensors import Module, QuantizedTensor, pack_block, quantize_tensor
from tpu_tune.transforms.select import Pattern, choices, matches, targeted


@dataclasses.dataclass(frozen=True)
class QuantizePolicy:
    """What to quantize and how; the fields are the config's `quantize.*` keys.

    Attributes:
      format: none | int8 | int4 | nf4.
      group_size: input rows that share a scale.
      double_quant: keep the scales in 8 bits; int8 codes gain nothing by it and keep float32 scales.
      include, exclude: names as in `lora.target_modules`; "all-linear" leaves the head and the embedding alone.
    """

    format: str = "none"
    group_size: int = 64
    double_quant: bool = True
    include: Pattern = ("all-linear",)
    exclude: Pattern = ()

    @classmethod
    def from_config(cls, config: ConfigDict) -> QuantizePolicy:
        """Build the policy from `config.quantize`."""
        values = {key: tuple(value) if isinstance(value, (list, tuple)) else value for key, value in config.items()}
        return cls(**values)

    def paths(self, modules: Sequence[Module]) -> frozenset[str]:
        """Return the paths of the weight leaves to quantize.

        Raises:
          UserError: a name matches nothing, matches a norm, or matches only some layers of a stack.
        """
        if self.format == "none":
            return frozenset()
        include = self.include if isinstance(self.include, str) else list(self.include)
        for entry in [self.exclude] if isinstance(self.exclude, str) else self.exclude:
            pattern = entry if isinstance(self.exclude, str) else [entry]
            if entry and not any(matches(name, pattern) for module in modules for name in module.names()):
                raise UserError(
                    f"quantize.exclude: '{entry}' matches no module; choose among {', '.join(choices(modules))}"
                )
        chosen = targeted(modules, include, exclude=self.exclude, key="quantize.include")
        by_path = {module.path: module for module in modules}
        for path, layers in chosen.items():
            module = by_path[path]
            if module.kind == "norm":
                raise UserError(f"quantize.include names the norm '{path}'; only matrices can be quantized")
            if len(layers) < module.layers:
                raise UserError(
                    f"quantize.include takes only {len(layers)} of the {module.layers} layers of '{path}'; "
                    "stacked layers are quantized together: name the module without its layer index"
                )
            pack_block(module.shape[0], self.format)
        return frozenset(by_path[path].weight for path in chosen if not by_path[path].tied_to)

    def apply(self, weight: Any) -> QuantizedTensor:
        """Quantize one kernel (..., in, out); a tensor that is quantized already stays as it is."""
        if isinstance(weight, QuantizedTensor):
            return weight
        double = self.double_quant and self.format != "int8"
        return quantize_tensor(weight, self.format, self.group_size, double)


def quantize(params: Mapping[str, Any], modules: Sequence[Module], policy: QuantizePolicy) -> dict[str, Any]:
    """Return the tree with the policy's leaves quantized; the other leaves are the same objects."""
    chosen = policy.paths(modules)
    return {path: policy.apply(leaf) if path in chosen else leaf for path, leaf in params.items()}
