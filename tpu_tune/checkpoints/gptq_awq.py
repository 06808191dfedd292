"""GPTQ's and AWQ's files: integers packed in int32 words.

A matrix NAME of (in, out) in b bits is stored as
            GPTQ                                    AWQ (gemm)
  qweight   int32 (in x b / 32, out)                int32 (in, out / 8), columns in the order 0 2 4 6 1 3 5 7
  qzeros    int32 (groups, out x b / 32)            int32 (groups, out / 8), in that order
  scales    float16 or bfloat16 (groups, out)       the same
  g_idx     int32 (in,): each row's group           -
and stands for (code - zero) x scale. `checkpoint_format: gptq` has every zero less 1 in its file, `gptq_v2` as it is.
(gptqmodel/nn_modules/qlinear/__init__.py, `dequantize_weight`; autoawq/awq/utils/packing_utils.py)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tpu_tune.checkpoints.quantized_matrix import Integers, Matrix, Read, kind_of, unpack_int32
from tpu_tune.checkpoints.stored_tensor import StoredTensor
from tpu_tune.errors import UserError
from tpu_tune.models.values import shown

_QWEIGHT = ".qweight"
_AWQ_PLACE = [0, 4, 1, 5, 2, 6, 3, 7]  # of each column of eight in its word


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the files of one model have integers.

    Attributes:
      bits: of a code.
      group_size: rows that share a scale; -1: all of them.
      rows, columns: codes that a word of `qweight` holds along `in` and `out`.
      codes, zeros: words of `qweight` and of `qzeros` -> uint8.
      may_keep: whether the configuration leaves it possible that all zero points are in the middle.
    """

    bits: int
    group_size: int
    rows: int
    columns: int
    codes: Callable[[np.ndarray], np.ndarray]
    zeros: Callable[[np.ndarray], np.ndarray]
    may_keep: bool = True


def gptq_matrices(
    path: str, quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], read: Read
) -> dict[str, Matrix]:
    """Return the quantized matrices of a GPTQ model by the names that they would have unquantized.

    Args:
      path: where the model is, for messages.
      quantization: config.json's `quantization_config`.
      stored: the files' tensors by name.
      read: reads one of them.

    Raises:
      UserError: other bits than 4 and 8, a layout that is not known, or a matrix whose parts are missing or misshapen.
    """
    layout = quantization.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise UserError(f"{path}: GPTQ's checkpoint_format {shown(layout)} is not read, only gptq and gptq_v2 are")
    bits, group_size = _numbers(path, quantization, "bits", "group_size", (4, 8))
    less = 1 if layout == "gptq" else 0

    def zeros(words: np.ndarray) -> np.ndarray:
        return (unpack_int32(words, bits) + np.uint8(less)) & np.uint8(2**bits - 1)

    codes = functools.partial(unpack_int32, bits=bits, axis=0)
    may_keep = quantization.get("sym", True) is not False
    return _matrices(path, _Layout(bits, group_size, 32 // bits, 1, codes, zeros, may_keep), stored, read)


def awq_matrices(
    path: str, quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], read: Read
) -> dict[str, Matrix]:
    """Return the quantized matrices of an AWQ model; arguments and errors as for `gptq_matrices`."""
    version = str(quantization.get("version") or quantization.get("format") or "gemm").lower()
    if version != "gemm":
        raise UserError(f"{path}: AWQ's version {shown(version)} is not read, only gemm is")
    named = ("w_bit", "q_group_size") if "w_bit" in quantization else ("bits", "group_size")
    bits, group_size = _numbers(path, quantization, *named, (4,))

    def in_order(words: np.ndarray) -> np.ndarray:
        codes = unpack_int32(words, bits)
        return codes.reshape(len(codes), -1, 8)[..., _AWQ_PLACE].reshape(codes.shape)

    return _matrices(path, _Layout(bits, group_size, 1, 8, in_order, in_order), stored, read)


def _numbers(
    path: str, quantization: Mapping[str, Any], bits: str, group_size: str, known: tuple[int, ...]
) -> tuple[int, int]:
    found = quantization.get(bits), quantization.get(group_size, 128)
    if found[0] not in known:
        raise UserError(
            f"{path}: its quantization_config has {bits} {shown(found[0])}; only "
            f"{' and '.join(map(str, known))} can be read"
        )
    if type(found[1]) is not int or not (found[1] == -1 or found[1] > 0):
        raise UserError(f"{path}: its quantization_config has {group_size} {shown(found[1])}; not a number of rows")
    return found


def _matrices(path: str, layout: _Layout, stored: Mapping[str, StoredTensor], read: Read) -> dict[str, Matrix]:
    names = [name.removesuffix(_QWEIGHT) for name in stored if name.endswith(_QWEIGHT)]
    return {f"{name}.weight": _matrix(path, name, layout, stored, read) for name in names}


def _matrix(path: str, name: str, layout: _Layout, stored: Mapping[str, StoredTensor], read: Read) -> Matrix:
    parts = {part: f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    for part in ("qzeros", "scales"):
        if parts[part] not in stored:
            raise UserError(f"{path}: {parts[part]} is missing, so {name}.qweight cannot be decoded")
    has_order = parts["g_idx"] in stored
    if not has_order:
        del parts["g_idx"]
    words = stored[parts["qweight"]].shape
    if len(words) != 2:
        raise UserError(f"{path}: {name}.qweight has shape {words}; not a matrix")
    rows, columns = words[0] * layout.rows, words[1] * layout.columns
    group_size = rows if layout.group_size == -1 else layout.group_size
    groups, in_word = -(-rows // group_size), 32 // layout.bits
    expected = {"qzeros": (groups, columns // in_word), "scales": (groups, columns), "g_idx": (rows,)}
    for part in parts.keys() & expected.keys():
        if stored[parts[part]].shape != expected[part]:
            raise UserError(
                f"{path}: {parts[part]} has shape {stored[parts[part]].shape}, where {layout.bits} bits in groups of "
                f"{layout.group_size} ask for {expected[part]}"
            )
    for part in ("qweight", "qzeros"):
        if stored[parts[part]].dtype not in ("I32", "U32"):
            raise UserError(f"{path}: {parts[part]} is stored as {stored[parts[part]].dtype}, not in words of 32 bits")

    def order() -> np.ndarray | None:
        """Each row's group; None where the groups' rows come one after the other."""
        found = read(parts["g_idx"]).astype(np.int64) if has_order else None
        if found is None or np.array_equal(found, np.arange(rows) // group_size):
            return None
        if found.min(initial=0) < 0 or found.max(initial=0) >= groups:
            raise UserError(f"{path}: {parts['g_idx']} names other groups than 0 to {groups - 1}")
        return found

    @functools.cache
    def kind() -> str:
        is_ours = layout.may_keep and order() is None
        is_ours = is_ours and bool((layout.zeros(read(parts["qzeros"])) == 2 ** (layout.bits - 1)).all())
        return kind_of(layout.bits, group_size, rows) if is_ours else ""

    def integers() -> Integers:
        zeros = layout.zeros(read(parts["qzeros"]))
        scales = read(parts["scales"]).astype(np.float32)
        return Integers(layout.codes(read(parts["qweight"])), scales, zeros, order(), layout.bits, group_size)

    return Matrix((columns, rows), tuple(parts.values()), kind, lambda: integers().packed(), lambda: integers().dense())
