"""Matrices that a model's files have quantized: as codes and scales where these are a format of ours, else as numbers.

The readers of the single file formats (`gptq_awq`, `compressed_tensors`, `scaled_floats`) describe each matrix as a
`Matrix`; `prequantized` decides which stay packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tpu_tune.tensors import QuantizedTensor

Read = Callable[[str], np.ndarray]  # name -> a stored tensor

_ROWS = 1024  # decoded at one time
_KERNEL_GROUP = 128  # rows: the largest group that the TPU kernel takes


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantized matrix in a model's files.

    Attributes:
      shape: (out, in), or with experts before them.
      parts: the stored tensors that it is made of.
      kind: what it can stay packed as, in words ("int4 in groups of 128"), "" for nothing. It may read small tensors.
      packed: reads it as codes and scales, where `kind` says something.
      dense: reads it as a float32 array of `shape`.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    kind: Callable[[], str]
    packed: Callable[[], QuantizedTensor]
    dense: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Integers:
    """A matrix of (code - zero point) x scale.

    Attributes:
      codes: uint8 (in, out), from 0 to 2^bits - 1.
      scales: float32 (groups, out).
      zeros: uint8 (groups, out), the codes that stand for 0; None: 2^(bits - 1) everywhere.
      group_of: int (in,), each row's group; None: `group_size` rows after each other.
      bits: 4 or 8.
      group_size: number of rows that share a scale.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    group_of: np.ndarray | None
    bits: int
    group_size: int

    def packed(self) -> QuantizedTensor:
        """Return it as int4 or int8 codes; the zero points have to be in the middle, and the rows in order.

        A scale for more rows than the kernels like is given to each of their groups.
        """
        scales, group = self.scales * np.float32(2 ** (self.bits - 1) - 1), self.group_size
        if group % _KERNEL_GROUP == 0:
            scales, group = scales.repeat(group // _KERNEL_GROUP, 0), _KERNEL_GROUP
            scales = scales[: -(-len(self.codes) // group)]
        return QuantizedTensor.from_codes(self.codes, scales, f"int{self.bits}", group)

    def dense(self) -> np.ndarray:
        """Return its numbers in float32, (out, in)."""
        weight = np.empty(self.codes.shape, np.float32)
        group_of = np.arange(len(weight)) // self.group_size if self.group_of is None else self.group_of
        for start in range(0, len(weight), _ROWS):
            at, groups = slice(start, start + _ROWS), group_of[start : start + _ROWS]
            zeros = np.float32(2 ** (self.bits - 1)) if self.zeros is None else self.zeros[groups].astype(np.float32)
            weight[at] = (self.codes[at].astype(np.float32) - zeros) * self.scales[groups]
        return weight.T


def unpack_int32(words: np.ndarray, bits: int, axis: int = 1) -> np.ndarray:
    """Return the codes, uint8, that int32 words hold along an axis of two, the lowest bits first; bits is 4 or 8."""
    if axis == 0:
        return unpack_int32(words.T, bits).T
    packed = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return packed
    codes = np.empty((*packed.shape, 2), np.uint8)
    np.bitwise_and(packed, 15, out=codes[..., 0])
    np.right_shift(packed, 4, out=codes[..., 1])
    return codes.reshape(len(packed), -1)


def kind_of(bits: int, group_size: int, rows: int) -> str:
    """Return what a symmetric matrix of `rows` rows in order can stay packed as, "" where it cannot."""
    if bits == 4 and rows % 2:  # two codes a byte
        return ""
    return f"int{bits} with a scale for each " + ("column" if group_size >= rows else f"{group_size} rows")


def not_packed(*_: Any) -> Any:
    """Stand for `packed` where there is no such form."""
    raise NotImplementedError
