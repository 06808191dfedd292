"""One tensor in a file: where its bytes lie and how they are read, whatever format the file has.

A tensor is read by seeking to its bytes, not through a memory map: pages of a map that were touched once would count
as this process's memory until the file is closed.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from tpu_tune.errors import UserError

# safetensors' names
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor's bytes lie.

    Attributes:
      file: path of the file.
      offset: absolute offset of the first byte.
      nbytes: bytes from the first element to the last: the tensor's own, and with strides what lies between them.
      dtype: safetensors' name for it.
      shape: the torch layout's, (out, in) for a linear layer.
      strides: steps in elements, for a view that is not row-major; nothing of it leaves the `nbytes`.
    """

    file: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return how many elements lie from a view's first to its last, both counted; strides are not negative."""
    return 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of an array without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_tensor(name: str, tensor: StoredTensor) -> np.ndarray:
    """Read one tensor in the file's dtype (bfloat16 and 8-bit floats through ml_dtypes), row-major.

    Raises:
      UserError: the dtype is not known, its length does not fit its shape, or the file is cut short.
    """
    if tensor.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"{tensor.file}: {name} is stored as {tensor.dtype}, which is not read here (known: {known})")
    dtype = np.dtype(DTYPES[tensor.dtype])
    strides = row_major(tensor.shape) if tensor.strides is None else tensor.strides
    if tensor.nbytes != span(tensor.shape, strides) * dtype.itemsize:
        raise UserError(f"{tensor.file}: the header's shape and length of {name} do not agree; fetch it again")
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        flat = np.fromfile(file, dtype=np.uint8, count=tensor.nbytes)
    if flat.size != tensor.nbytes:
        raise UserError(f"{tensor.file}: cut short at {name}; fetch it again")
    if tensor.strides is None:
        return flat.view(dtype).reshape(tensor.shape)
    in_bytes = tuple(stride * dtype.itemsize for stride in strides)
    return np.ndarray(tensor.shape, dtype, flat, 0, in_bytes).copy()
