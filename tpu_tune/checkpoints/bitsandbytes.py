"""Reading bitsandbytes' 4-bit matrices (NF4, with or without double quantization) as they are, codes and all.

bitsandbytes quantizes blocks of 64 consecutive elements of the row-major (out, in) weight, so where 64 divides `in`
its blocks are groups of 64 along `in`, and codes and scales pass into a `QuantizedTensor` unchanged. A matrix NAME is
stored as
  NAME                                   uint8 [(n + 1) // 2, 1]; the first element is the high nibble
  NAME.absmax                            float32 per block; uint8 codes if double quantized
  NAME.quant_map                         float32 [16]
  NAME.nested_absmax, .nested_quant_map  float32 per 256 blocks, float32 [256]; only if double quantized
  NAME.quant_state.bitsandbytes__nf4     uint8: JSON with shape, blocksize, nested_blocksize, nested_offset, ...
(bitsandbytes/functional.py, `QuantState.as_dict(packed=True)`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tpu_tune.checkpoints import json_text
from tpu_tune.errors import UserError
from tpu_tune.models.values import NOTHING, TEXT, check, listing, number, one_line, whole
from tpu_tune.tensors import QuantizedTensor

_STATE_KINDS = {
    "shape": listing(whole(1, 2**31)),
    "blocksize": whole(1, 2**20),
    "dtype": TEXT,
    "nested_blocksize": whole(0, 2**20) | NOTHING,
    "nested_offset": number() | NOTHING,
}

Read = Callable[[str], Any]

_STATE = ".quant_state.bitsandbytes__"
# The table of the paper's appendix E, as bitsandbytes stores it; a file with another one is not NF4.
_NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    + (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)


def as_quantized(
    path: str, quantization: dict[str, Any], shapes: dict[str, tuple[int, ...]], read: Read
) -> tuple[dict[str, tuple[int, ...]], Read]:
    """Turn stored names into logical ones: one (out, in) shape per matrix, its parts hidden.

    Args:
      path: where the model is, for messages.
      quantization: config.json's `quantization_config`.
      shapes: stored tensors' shapes by name.
      read: reads a stored tensor.

    Returns:
      Logical shapes, and a function that reads a logical tensor (a matrix in 4 bits as `QuantizedTensor`).

    Raises:
      UserError: another quantization than bitsandbytes' NF4, or a matrix whose `in` is not whole blocks.
    """
    if not (quantization.get("load_in_4bit") or quantization.get("_load_in_4bit")):
        raise UserError(
            f"{path}: weights quantized by bitsandbytes int8 are not read; use the unquantized model or an nf4 one"
        )
    states = {}
    for name in shapes:
        if _STATE in name:
            matrix, _, kind = name.partition(_STATE)
            if kind != "nf4":
                raise UserError(f"{path}: {matrix} is in bitsandbytes' {kind}, which is not read; only nf4 is")
            states[matrix] = _read_state(path, matrix, read(name))
    parts = tuple(f"{matrix}." for matrix in states)
    logical = {name: shape for name, shape in shapes.items() if not name.startswith(parts)}
    for matrix, state in states.items():
        logical[matrix] = _checked_shape(path, matrix, state, shapes)
    return logical, functools.partial(_read, path, states, read)


def _read_state(path: str, matrix: str, packed: np.ndarray) -> dict[str, Any]:
    try:
        state = json_text.loads(packed.tobytes())
        check(state, _STATE_KINDS, path)
        return {
            "shape": tuple(int(size) for size in state["shape"]),
            "group": int(state["blocksize"]),
            "dtype": str(state["dtype"]),
            "nested_group": int(state.get("nested_blocksize") or 0),
            "nested_offset": np.float32(state.get("nested_offset") or 0.0),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the quantization state of {matrix} cannot be read ({error})") from error


def _checked_shape(
    path: str, matrix: str, state: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[int, ...]:
    shape, group = state["shape"], state["group"]
    if len(shape) != 2 or shape[1] % group:
        raise UserError(f"{path}: {matrix} of shape {shape} is not whole blocks of {group} along its rows; not read")
    needed = ["", ".absmax", ".quant_map"] + [".nested_absmax", ".nested_quant_map"] * bool(state["nested_group"])
    for part in needed:
        if matrix + part not in shapes:
            raise UserError(f"{path}: {matrix}{part} is missing, so {matrix} cannot be decoded")
    stored, expected = math.prod(shapes[matrix]), shape[0] * shape[1] // 2
    blocks = {".absmax": shape[0] * shape[1] // group, ".quant_map": 16}
    blocks |= {".nested_quant_map": 256} if state["nested_group"] else {}
    for part, size in blocks.items():
        if math.prod(shapes[matrix + part]) != size:
            raise UserError(f"{path}: {matrix}{part} has shape {shapes[matrix + part]} where {size} numbers belong")
    if stored != expected:
        raise UserError(f"{path}: {matrix} holds {stored} bytes where its shape {shape} needs {expected}")
    return shape


def _read(path: str, states: dict[str, dict[str, Any]], read: Read, name: str) -> np.ndarray | QuantizedTensor:
    if name not in states:
        return read(name)
    with one_line(f"{path}: {name} cannot be decoded"):
        return _decode(path, states, read, name)


def _decode(path: str, states: dict[str, dict[str, Any]], read: Read, name: str) -> QuantizedTensor:
    state = states[name]
    if not np.allclose(read(f"{name}.quant_map"), _NF4, rtol=0, atol=1e-6):
        raise UserError(f"{path}: {name} says nf4 but its table is another one")
    outputs, inputs = state["shape"]
    packed = read(name).reshape(-1)
    codes = np.empty((packed.size, 2), np.uint8)
    np.right_shift(packed, 4, out=codes[:, 0])
    np.bitwise_and(packed, 15, out=codes[:, 1])
    scales = _scales(name, state, read).reshape(outputs, inputs // state["group"])
    return QuantizedTensor.from_codes(
        codes.reshape(outputs, inputs).T, scales.T, format="nf4", group_size=state["group"]
    )


def _scales(name: str, state: dict[str, Any], read: Read) -> np.ndarray:
    """Scales per block, flat, in float32; double quantized ones are decoded as bitsandbytes does, in float32."""
    absmax = read(f"{name}.absmax")
    if not state["nested_group"]:
        return absmax.astype(np.float32)
    table = read(f"{name}.nested_quant_map").astype(np.float32)
    scale = np.repeat(read(f"{name}.nested_absmax").astype(np.float32), state["nested_group"])[: absmax.size]
    return table[absmax] * scale + state["nested_offset"]
