"""Files whose matrices are 8-bit floats with scales: FP8 by blocks (DeepSeek, Qwen), by rows, or by the whole tensor.

A tensor NAME (out, in), or with experts before that, lies beside NAME_scale_inv or NAME_scale, and stands for
NAME x scale. The scales are one, one for each row (out, 1) or (out,), or one for each block of `weight_block_size`, the
last blocks of rows and columns perhaps short; float32, bfloat16, or a byte s for 2^(s - 127).
(transformers/integrations/finegrained_fp8.py, `_dequantize_fp8_weight`)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_tune.checkpoints.quantized_matrix import Matrix, Read, not_packed
from tpu_tune.checkpoints.stored_tensor import StoredTensor
from tpu_tune.errors import UserError
from tpu_tune.models.values import shown

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")


def fp8_matrices(
    path: str, quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], read: Read
) -> dict[str, Matrix]:
    """Return all tensors in 8-bit floats, by their names.

    Args:
      path: where the model is, for messages.
      quantization: config.json's `quantization_config`.
      stored: the files' tensors by name.
      read: reads one of them.

    Raises:
      UserError: one without scales, or scales whose shape fits no blocks; or matrices in less than 8 bits beside them.
    """
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    ):
        raise UserError(f"{path}: its quantization_config has weight_block_size {shown(block)}; not [rows, columns]")
    for name in stored:
        if stored[name].dtype in ("I8", "U8") and any(name + end in stored for end in _SCALES):
            raise UserError(f"{path}: {name} is stored as {stored[name].dtype} beside FP8 matrices, which is not read")
    return {
        name: scaled_matrix(path, name, block, stored, read)
        for name, tensor in stored.items()
        if tensor.dtype in FLOAT8 and not name.endswith(_SCALES)
    }


def scaled_matrix(
    path: str, name: str, block: tuple[int, int] | None, stored: Mapping[str, StoredTensor], read: Read
) -> Matrix:
    """Return one matrix of numbers and scales, whatever the numbers' dtype; arguments and errors as above."""
    scale = next((name + end for end in _SCALES if name + end in stored), None)
    if scale is None:
        raise UserError(f"{path}: {name}_scale_inv (or {name}_scale) is missing, so {name} cannot be decoded")
    shape = stored[name].shape
    sizes = _block_sizes(shape, stored[scale].shape, block) if len(shape) > 1 else None
    if sizes is None:
        raise UserError(
            f"{path}: {scale} has shape {stored[scale].shape}, which gives the blocks of {name} {shape} no scales"
        )

    def dense() -> np.ndarray:
        weight, scales = read(name).astype(np.float32), as_scales(read(scale))
        lead = shape[:-2] if scales.size > 1 and math.prod(shape[:-2]) > 1 and scales.ndim > 2 else ()
        grid = scales.reshape(*lead, *(-(-size // part) for size, part in zip(shape[-2:], sizes, strict=True)))
        rows = np.repeat(grid, sizes[0], -2)[..., : shape[-2], :]
        for column in range(rows.shape[-1]):
            weight[..., column * sizes[1] : (column + 1) * sizes[1]] *= rows[..., column, None]
        return weight

    return Matrix(shape, (name, scale), str, not_packed, dense)


def as_scales(stored: np.ndarray) -> np.ndarray:
    """Return scales in float32; bytes are exponents."""
    return np.exp2(stored.astype(np.float32) - 127) if stored.dtype == np.uint8 else stored.astype(np.float32)


def _block_sizes(
    shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale; None where the scales fit in no way."""
    rows, columns = shape[-2:]
    if math.prod(scales) == 1 or (len(scales) == 3 and scales[1:] == (1, 1) and scales[:1] == shape[:-2]):
        return rows, columns
    if len(scales) == 1:
        return (1, columns) if scales == (rows,) and len(shape) == 2 else None
    if scales[:-2] not in (shape[:-2], ()):
        return None
    if block is not None and scales[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
        return block[0], block[1]
    if rows % scales[-2] or columns % scales[-1]:
        return None
    return rows // scales[-2], columns // scales[-1]
