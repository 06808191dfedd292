"""Reading and writing gpt-oss' experts as its files have them: mxfp4 blocks, which stay packed.

A tensor NAME (experts, in, out) is stored turned, output by output, as
  NAME_blocks   uint8 (experts, out, in / 32, 16): two codes a byte, the even element of `in` in the low nibble
  NAME_scales   uint8 (experts, out, in / 32): exponents s, the scale is 2^(s - 127)
(transformers/integrations/mxfp4.py). All codes and exponents pass into a `QuantizedTensor` and back unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tpu_tune.errors import UserError
from tpu_tune.tensors import Module, QuantizedTensor

METHOD = "mxfp4"  # in config.json's `quantization_config`
_GROUP = 32
_BLOCKS, _SCALES = "_blocks", "_scales"

Read = Callable[[str], Any]


def is_stored(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that the experts are in mxfp4."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def stored_paths(config: Mapping[str, Any], modules: Iterable[Module]) -> frozenset[str]:
    """Return the paths of the leaves that such a config's files have in mxfp4: all experts' matrices."""
    return frozenset(module.weight for module in modules if module.experts) if is_stored(config) else frozenset()


def as_quantized(path: str, shapes: dict[str, tuple[int, ...]], read: Read) -> tuple[dict[str, tuple[int, ...]], Read]:
    """Turn stored names into logical ones: one (experts, in, out) shape for blocks and scales.

    Args:
      path: where the model is, for messages.
      shapes: stored tensors' shapes by name.
      read: reads a stored tensor.

    Returns:
      Logical shapes, and a function that reads a logical tensor (blocks as `QuantizedTensor`).

    Raises:
      UserError: blocks without their scales, or of another shape than these ask for.
    """
    logical, packed = dict(shapes), {}
    for blocks, shape in shapes.items():
        if not blocks.endswith(_BLOCKS):
            continue
        name = blocks.removesuffix(_BLOCKS)
        scales = logical.pop(name + _SCALES, None)
        if scales is None:
            raise UserError(f"{path}: {name}{_SCALES} is missing, so {blocks} cannot be decoded")
        if len(shape) != 4 or shape[3] != _GROUP // 2 or scales != shape[:3]:
            raise UserError(
                f"{path}: {blocks} has shape {shape} and its scales {scales}: not (experts, out, in/32, 16)"
            )
        del logical[blocks]
        packed[name] = logical[name] = (shape[0], shape[2] * _GROUP, shape[1])
    return logical, functools.partial(_read, path, packed, read)


def _read(path: str, packed: Mapping[str, Any], read: Read, name: str) -> np.ndarray | QuantizedTensor:
    if name not in packed:
        return read(name)
    blocks, scales = read(name + _BLOCKS), read(name + _SCALES)
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8:
        raise UserError(f"{path}: {name} is stored as {blocks.dtype} with scales of {scales.dtype}; mxfp4 has bytes")
    experts = [_decode(*pair) for pair in zip(blocks, scales, strict=True)]
    stack = {part: np.stack([getattr(expert, part) for expert in experts]) for part in ("codes", "scales")}
    one = experts[0]
    return QuantizedTensor(**stack, scale_max=None, **{key: getattr(one, key) for key in _FACTS})


_FACTS = ("format", "shape", "group_size", "pack_block")


def _decode(blocks: np.ndarray, scales: np.ndarray) -> QuantizedTensor:
    codes = np.empty((len(blocks), blocks[0].size, 2), np.uint8)
    packed = blocks.reshape(len(blocks), -1)
    np.bitwise_and(packed, 15, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    return QuantizedTensor.from_codes(codes.reshape(len(blocks), -1).T, scales.T, "mxfp4", _GROUP)


def untouched(
    config: Mapping[str, Any], params: Mapping[str, Any], modules: list[Module]
) -> dict[str, QuantizedTensor]:
    """Return the leaves of a tree that may be written as the files had them: all that these have in mxfp4, or none.

    Readers expect all experts in one format. None may where an adapter is on one, or a leaf is an array here.
    """
    leaves = {path: params.get(path) for path in stored_paths(config, modules)}
    kept = all(isinstance(leaf, QuantizedTensor) and leaf.format == "mxfp4" for leaf in leaves.values())
    return leaves if kept else {}


def file_tensors(leaves: Mapping[str, QuantizedTensor], modules: list[Module]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield blocks and scales of leaves (layers, experts, in, out), a layer at a time."""
    for module in modules:
        if module.weight not in leaves:
            continue
        for index, name in enumerate(module.names()):
            weight = jax.tree.map(lambda part, index=index: np.asarray(part[index]), leaves[module.weight])
            weight = jax.tree.map(module.deinterleave, weight)
            codes = np.swapaxes(np.asarray(weight.unpacked()), 1, 2)
            blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
            yield name + _BLOCKS, blocks.reshape(*codes.shape[:2], -1, _GROUP // 2)
            yield name + _SCALES, np.swapaxes(weight.scales, 1, 2)
