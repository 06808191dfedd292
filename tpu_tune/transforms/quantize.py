"""`quantize(params, modules, config)`: some leaves of the tree become `QuantizedTensor`.

`QuantizeConfig`, the config's `quantize.*` keys, says by name which. Loading quantizes one tensor at a time, so that a
float model never stands in memory whole; `quantize` takes a tree that is already there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpu_tune.config import QuantizeConfig
from tpu_tune.errors import UserError
from tpu_tune.tensors import FORMATS, Module, QuantizedTensor, pack_block, quantize_tensor
from tpu_tune.transforms.select import ALL_LINEAR, choices, matches, targeted


def quantized_paths(modules: Sequence[Module], config: QuantizeConfig) -> frozenset[str]:
    """Return the paths of the weight leaves to quantize.

    Raises:
      UserError: a name matches nothing, matches a norm, or matches only some layers of a stack.
    """
    if config.format == "none":
        return frozenset()
    for entry in [config.exclude] if isinstance(config.exclude, str) else config.exclude:
        pattern = entry if isinstance(config.exclude, str) else [entry]
        if entry and not any(matches(name, pattern) for module in modules for name in module.names()):
            raise UserError(
                f"quantize.exclude: '{entry}' matches no module; choose among {', '.join(choices(modules))}"
            )
    able = [module for module in modules if not module.is_delicate or config.include not in (ALL_LINEAR, [ALL_LINEAR])]
    chosen = targeted(able, config.include, exclude=config.exclude, key="quantize.include")
    by_path = {module.path: module for module in modules}
    for path, layers in chosen.items():
        module = by_path[path]
        if not module.is_matrix:
            what = "the norm " if module.kind == "norm" else ""
            raise UserError(f"quantize.include names {what}'{path}'; only matrices can be quantized")
        if len(layers) < len(module.layers):
            raise UserError(
                f"quantize.include takes only {len(layers)} of the {len(module.layers)} layers of '{path}'; "
                "stacked layers are quantized together: name the module without its layer index"
            )
        pack_block(module.shape[0], config.format)
    return frozenset(by_path[path].weight for path in chosen if not by_path[path].tied_to)


def quantize_weight(weight: Any, config: QuantizeConfig) -> QuantizedTensor:
    """Quantize one kernel (..., in, out); a tensor that is quantized already stays as it is.

    int8 codes gain nothing by scales of 8 bits and keep float32 ones.
    """
    if isinstance(weight, QuantizedTensor):
        return weight
    return quantize_tensor(weight, config.format, group_size(config), has_small_scales(config), config.symmetric)


def has_small_scales(config: QuantizeConfig) -> bool:
    """Return whether scales are stored in a byte: under double quantization, at four bits."""
    return config.double_quant and FORMATS[config.format].bits == 4


def group_size(config: QuantizeConfig) -> int:
    """Return the number of rows that share a scale: what the format says, else what the config does."""
    return FORMATS[config.format].group_size or config.group_size


def quantize(params: Mapping[str, Any], modules: Sequence[Module], config: QuantizeConfig) -> dict[str, Any]:
    """Return the tree with the named leaves quantized; the other leaves are the same objects."""
    paths = quantized_paths(modules, config)
    return {path: quantize_weight(leaf, config) if path in paths else leaf for path, leaf in params.items()}
