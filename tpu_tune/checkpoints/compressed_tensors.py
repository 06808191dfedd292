"""Files of the compressed-tensors library (llm-compressor, vLLM): which of its formats a matrix is in, its parts say.

  weight_packed int32, weight_shape, weight_scale            integers of 4 or 8 bits in words, plus 2^(bits - 1)
    weight_zero_point (packed along `out`), weight_g_idx     if asymmetric; if the groups' rows lie apart
  weight int8, weight_scale, weight_zero_point               integers of a byte each
  weight fp8, weight_scale                                   see `scaled_floats`
  weight_packed uint8, weight_scale uint8                    mxfp4: two codes a byte, exponents for 32
  weight_packed uint8, weight_scale fp8, weight_global_scale nvfp4: the same codes, a scale / global scale for 16
Scales are (out, groups), (out, 1) or (1,). (compressed_tensors/compressors/*, `decompress`)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tpu_tune.checkpoints.quantized_matrix import Integers, Matrix, Read, kind_of, not_packed, unpack_int32
from tpu_tune.checkpoints.scaled_floats import FLOAT8, scaled_matrix
from tpu_tune.checkpoints.stored_tensor import StoredTensor
from tpu_tune.errors import UserError
from tpu_tune.models.values import shown
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.tensors.formats import FORMATS

_READ = (
    "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "mxfp4-pack-quantized", "nvfp4-pack-quantized",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Files:
    """The files of one model.

    Attributes:
      path: where it is, for messages.
      stored: their tensors by name.
      read: reads one of them.
      weights: the settings of each of the configuration's groups for weights.
    """

    path: str
    stored: Mapping[str, StoredTensor]
    read: Read
    weights: tuple[Mapping[str, Any], ...]

    def needed(self, name: str, of: str) -> StoredTensor:
        """Return a stored tensor without which another cannot be decoded."""
        if name not in self.stored:
            raise UserError(f"{self.path}: {name} is missing, so {of} cannot be decoded")
        return self.stored[name]

    def setting(self, key: str) -> set[Any]:
        """Return the values that the groups give a key."""
        return {tuple(value) if isinstance(value, list) else value for value in (one.get(key) for one in self.weights)}


def compressed_matrices(
    path: str, quantization: Mapping[str, Any], stored: Mapping[str, StoredTensor], read: Read
) -> dict[str, Matrix]:
    """Return the quantized matrices of a model by the names that they would have unquantized.

    Args:
      path: where the model is, for messages.
      quantization: config.json's `quantization_config`.
      stored: the files' tensors by name.
      read: reads one of them.

    Raises:
      UserError: a format that is not read, other bits than 4 and 8, or a matrix whose parts are missing or misshapen.
    """
    groups = [group for group in (quantization.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    formats = {str(one.get("format")) for one in (quantization, *groups) if one.get("format")}
    sparse = (quantization.get("sparsity_config") or {}).get("format", "dense")
    for name in sorted(formats | {sparse}):
        if name not in _READ:
            raise UserError(f"{path}: compressed-tensors' {shown(name)} is not read; give the unquantized model")
    weights = tuple(group["weights"] for group in groups if isinstance(group.get("weights"), Mapping))
    files = _Files(path, stored, read, weights)
    found = {}
    for name, tensor in stored.items():
        base = name.removesuffix("_packed")
        if base != name:
            found[base] = _words(files, base) if tensor.dtype == "I32" else _fp4(files, base)
        elif tensor.dtype == "I8" and name.endswith("weight"):
            found[name] = _bytes(files, name)
        elif tensor.dtype in FLOAT8 and name.endswith("weight"):
            blocks = [size for size in files.setting("block_structure") if isinstance(size, tuple) and len(size) == 2]
            found[name] = scaled_matrix(path, name, blocks[0] if len(blocks) == 1 else None, stored, read)
    return found


def _words(files: _Files, name: str) -> Matrix:
    """Integers packed in words."""
    packed = files.stored[f"{name}_packed"].shape
    files.needed(f"{name}_scale", name)
    if files.needed(f"{name}_shape", name).shape != (2,) or len(packed) != 2:
        raise UserError(f"{files.path}: {name}_packed has shape {packed}; only matrices are read, one for each expert")
    outputs, inputs = (int(size) for size in files.read(f"{name}_shape"))
    bits = next((bits for bits in (4, 8) if packed == (outputs, -(-inputs * bits // 32))), None)
    said = files.setting("num_bits") - {None}
    if bits is None or (said and bits not in said):
        many = ", ".join(sorted(map(shown, said))) or "unknown"
        raise UserError(f"{files.path}: {name}_packed has shape {packed} and num_bits {many}; only 4 and 8 are read")

    def codes() -> np.ndarray:
        return unpack_int32(files.read(f"{name}_packed"), bits)[:, :inputs].T

    def zeros() -> np.ndarray:
        return unpack_int32(files.read(f"{name}_zero_point"), bits, axis=0)[:outputs]

    parts = [f"{name}{end}" for end in ("_packed", "_shape", "_scale")]
    return _integers(files, name, (outputs, inputs), bits, codes, zeros, parts)


def _bytes(files: _Files, name: str) -> Matrix:
    """Integers of a byte each, whatever bits they have."""

    def as_codes(part: str) -> np.ndarray:
        return files.read(part).view(np.uint8) ^ np.uint8(128)

    shape = files.stored[name].shape
    files.needed(f"{name}_scale", name)
    if len(shape) != 2:
        raise UserError(f"{files.path}: {name} has shape {shape}; only matrices are read, one for each expert")
    codes, zeros = lambda: as_codes(name).T, lambda: as_codes(f"{name}_zero_point")  # noqa: E731
    return _integers(files, name, shape, 8, codes, zeros, [name, f"{name}_scale"])


def _integers(
    files: _Files,
    name: str,
    shape: tuple[int, int],
    bits: int,
    codes: Callable[[], np.ndarray],
    zeros: Callable[[], np.ndarray],
    parts: list[str],
) -> Matrix:
    """A matrix of integers; `codes` reads them as (in, out), `zeros` the zero points, one for each scale."""
    (outputs, inputs), scale = shape, files.stored[f"{name}_scale"].shape
    groups = scale[-1] if len(scale) == 2 and scale[0] == outputs else 1
    sizes = [size for size in files.setting("group_size") if type(size) is int and size > 0]
    size = next((size for size in sizes if -(-inputs // size) == groups), 0) if groups > 1 else inputs
    size = size or (inputs // groups if inputs % groups == 0 else 0)
    if not size or (groups == 1 and scale not in ((outputs, 1), (outputs,), (1,), (1, 1), ())):
        raise UserError(f"{files.path}: {name}_scale has shape {scale}, which gives {name} {shape} no scales")
    has_zeros, has_order = (f"{name}{end}" in files.stored for end in ("_zero_point", "_g_idx"))

    def order() -> np.ndarray | None:
        found = files.read(f"{name}_g_idx").astype(np.int64) if has_order else None
        if found is None or (found == -1).all() or np.array_equal(found, np.arange(inputs) // size):
            return None
        if found.shape != (inputs,) or found.min(initial=0) < 0 or found.max(initial=0) >= groups:
            raise UserError(f"{files.path}: {name}_g_idx does not give each of {inputs} rows one of {groups} groups")
        return found

    @functools.cache
    def kind() -> str:
        is_ours = order() is None and (not has_zeros or bool((zeros() == 2 ** (bits - 1)).all()))
        return kind_of(bits, size, inputs) if is_ours else ""

    def integers() -> Integers:
        scales = np.broadcast_to(files.read(f"{name}_scale").astype(np.float32).reshape(-1, groups), (outputs, groups))
        offsets = np.broadcast_to(zeros().reshape(-1, groups), (outputs, groups)).T if has_zeros else None
        return Integers(codes(), scales.T, offsets, order(), bits, size)

    more = [f"{name}_zero_point"] * has_zeros + [f"{name}_g_idx"] * has_order
    return Matrix(shape, (*parts, *more), kind, lambda: integers().packed(), lambda: integers().dense())


def _fp4(files: _Files, name: str) -> Matrix:
    """4-bit floats: mxfp4, or nvfp4."""
    tensor, scale = files.stored[f"{name}_packed"], files.needed(f"{name}_scale", name)
    outputs, inputs = tensor.shape[0], 2 * tensor.shape[-1]
    exponents = scale.dtype in ("U8", "F8_E8M0")
    group = 32 if exponents else 16
    if tensor.dtype != "U8" or len(tensor.shape) != 2 or scale.shape != (outputs, inputs // group) or inputs % group:
        raise UserError(
            f"{files.path}: {name}_packed is {tensor.dtype} {tensor.shape} with scales {scale.dtype} {scale.shape}; "
            f"not two codes a byte, with a scale for each {group}"
        )
    overall = [] if exponents else [f"{name}_global_scale"]
    for part in overall:
        files.needed(part, name)

    def codes() -> np.ndarray:
        packed = files.read(f"{name}_packed")
        return np.stack([packed & 15, packed >> 4], -1).reshape(outputs, inputs)

    def packed() -> QuantizedTensor:
        return QuantizedTensor.from_codes(codes().T, files.read(f"{name}_scale").view(np.uint8).T, "mxfp4", group)

    def dense() -> np.ndarray:
        scales = files.read(f"{name}_scale")
        if exponents:
            return np.asarray(packed().dequantize()).T
        scales = scales.astype(np.float32) / files.read(overall[0]).astype(np.float32).reshape(-1)[0]
        numbers = np.asarray(FORMATS["mxfp4"].decode(codes())) / 2  # of which a format of ours has the double
        return (numbers.reshape(outputs, -1, group) * scales[..., None]).reshape(outputs, inputs)

    kind = (lambda: "mxfp4") if exponents else str
    parts = (f"{name}_packed", f"{name}_scale", *overall)
    return Matrix((outputs, inputs), parts, kind, packed if exponents else not_packed, dense)
