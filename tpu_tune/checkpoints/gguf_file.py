"""The GGUF container: metadata and a table of tensors, read in one pass over the header.

The layout is ggml's docs/gguf.md. The `gguf` package's reader makes several objects for each element of an array,
which takes seconds for a vocabulary; the header alone is read here, its number formats are left to that package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import mmap
import os
import struct
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from tpu_tune.errors import UserError
from tpu_tune.models.values import TEXT, Kind, check, shown, whole

VERSIONS = (2, 3)
_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# GGUFValueType -> struct code, little endian
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
_SAMPLE_BYTES = 4096
_MOST_DIMENSIONS = 4  # ggml's own bound
_DEEPEST = 4  # arrays in one another; llama.cpp writes one
_ALIGNMENTS = [2**power for power in range(17)]  # llama.cpp refuses what is no power of two
_ALIGNMENT = Kind("a power of two up to 65,536", lambda value: isinstance(value, int) and value in _ALIGNMENTS)
_KINDS = {"general.architecture": TEXT, "split.count": whole(0, 65535)}


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: its number format, its shape in torch order (GGUF's reversed), and where its bytes are."""

    format: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An opened file: metadata as Python values (arrays of numbers as NumPy arrays) and its tensors by GGUF name."""

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    fingerprint: str


def open_gguf_file(path: str) -> GgufFile:
    """Read a GGUF file's header and check that the file is whole and of formats that can be decoded.

    Raises:
      UserError: the file is missing, cut short, not GGUF, of an unknown version or number format, or one of several
        parts.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    size = os.path.getsize(path)
    if size < 24:
        raise UserError(f"{path}: {size} bytes are no GGUF file; fetch it again")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_start(path, data)
        try:
            metadata, tensors, end = _read_header(data)
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path}: cut short or damaged inside its header ({size} bytes); fetch it again") from error
        except _Unusable as error:
            raise UserError(f"{path}: {error}") from error
        check(metadata, _KINDS, path)
        _check_whole(path, metadata, tensors, size)
        digest = hashlib.sha256(str(size).encode() + data[:end])
        for tensor in tensors.values():
            digest.update(data[tensor.offset : tensor.offset + min(tensor.nbytes, _SAMPLE_BYTES)])
    return GgufFile(path, metadata, tensors, digest.hexdigest())


def read_gguf_tensor(file: GgufFile, name: str) -> np.ndarray:
    """Read one tensor in torch order: F32, F16, BF16 and F64 as stored, quantized ones dequantized to float32."""
    tensor = file.tensors[name]
    with open(file.path, "rb") as stream:
        stream.seek(tensor.offset)
        raw = np.fromfile(stream, dtype=np.uint8, count=tensor.nbytes)
    if raw.size != tensor.nbytes:
        raise UserError(f"{file.path}: cut short at {name}; fetch it again")
    if tensor.format.name in _PLAIN:
        return raw.view(_PLAIN[tensor.format.name]).reshape(tensor.shape)
    return gguf.dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.format).reshape(tensor.shape)


class _Unusable(Exception):
    """The header names a value type or number format that is not known here, or says what no GGUF file says."""


def _check_start(path: str, data: mmap.mmap) -> None:
    if data[:4] != _MAGIC:
        raise UserError(f"{path}: not a GGUF file (it does not begin with GGUF)")
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise UserError(f"{path}: {kind} GGUF is not read; known: little-endian versions {VERSIONS[0]}, {VERSIONS[1]}")


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, GgufTensor], int]:
    """Return metadata, tensors and where the header ends."""
    tensor_count, value_count = struct.unpack_from("<QQ", data, 8)
    at, metadata = 24, {}
    for _ in range(value_count):
        key, at = _read_string(data, at)
        if key in metadata:
            raise _Unusable(f"its metadata has {shown(key)} twice; fetch it again")
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _read_value(data, at + 4, kind)
    entries = []
    for _ in range(tensor_count):
        name, at = _read_string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > _MOST_DIMENSIONS:
            raise _Unusable(f"{shown(name)} has {dimensions} dimensions, more than {_MOST_DIMENSIONS}; fetch it again")
        *shape, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        at += 16 + 8 * dimensions
        entries.append((name, tuple(reversed(shape)), _format(name, kind), offset))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not _ALIGNMENT.holds(alignment):
        raise _Unusable(f"general.alignment is {shown(alignment)}; it must be {_ALIGNMENT.words}")
    start = -(-at // alignment) * alignment
    tensors = {}
    for name, shape, format_, offset in entries:
        elements, block_bytes = gguf.GGML_QUANT_SIZES[format_]
        if name in tensors:
            raise _Unusable(f"it has two tensors named {shown(name)}; fetch it again")
        if elements > 1 and (not shape or shape[-1] % elements):
            row = shape[-1] if shape else 1
            raise _Unusable(f"{name} has rows of {row}, not whole blocks of {format_.name}")
        tensors[name] = GgufTensor(format_, shape, start + offset, math.prod(shape) // elements * block_bytes)
    return metadata, tensors, at


def _read_string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > len(data):
        raise struct.error("string past the end")
    return data[at + 8 : end].decode(), end


def _read_value(data: mmap.mmap, at: int, kind: int, depth: int = 0) -> tuple[Any, int]:
    if kind == _STRING:
        return _read_string(data, at)
    if kind == _ARRAY:
        return _read_array(data, at, depth + 1)
    code = _scalar(kind)
    (value,) = struct.unpack_from("<" + code, data, at)
    # The shortest decimal of a float32: 1e-05 rather than 9.99999974e-06.
    return float(str(np.float32(value))) if code == "f" else value, at + struct.calcsize("<" + code)


def _read_array(data: mmap.mmap, at: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise _Unusable(f"its metadata has arrays nested more than {_DEEPEST} deep; fetch it again")
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in (_STRING, _ARRAY):
        values = []
        for _ in range(count):
            value, at = _read_value(data, at, kind, depth)
            values.append(value)
        return values, at
    code = _scalar(kind)
    end = at + count * struct.calcsize("<" + code)
    if end > len(data):
        raise struct.error("array past the end")
    return np.frombuffer(data[at:end], dtype=np.dtype("<" + code)), end


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise _Unusable(f"metadata of an unknown type ({kind}); damaged, or newer than this reader")
    return _SCALARS[kind]


def _format(name: str, kind: int) -> gguf.GGMLQuantizationType:
    try:
        return gguf.GGMLQuantizationType(kind)
    except ValueError as error:
        raise _Unusable(f"{shown(name)} is in an unknown number format ({kind}); a newer `gguf` may know it") from error


def _check_whole(path: str, metadata: dict[str, Any], tensors: dict[str, GgufTensor], size: int) -> None:
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise UserError(f"{path}: one of {parts} parts; join them first (llama.cpp's `llama-gguf-split --merge`)")
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if end > size:
        raise UserError(f"{path}: cut short: its header promises {end} bytes, it has {size}; fetch it again")
    first = {tensor.format: name for name, tensor in reversed(tensors.items())}
    for format_, name in first.items():
        if format_.name not in _PLAIN and not _can_dequantize(format_):
            raise UserError(f"{path}: {name} is in {format_.name}, which the gguf package cannot decode")


def _can_dequantize(format_: gguf.GGMLQuantizationType) -> bool:
    """Try one block of zeros: the package has no public list of what it decodes."""
    block_bytes = gguf.GGML_QUANT_SIZES[format_][1]
    try:
        with np.errstate(all="ignore"):
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), format_)
    except NotImplementedError:
        return False
    return True
