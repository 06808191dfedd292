"""Models whose weights others have quantized: which formats are read, and what of a file stays packed.

`config.json`'s `quantization_config` names the format; which matrices are in it, the files say themselves: those that
`modules_to_not_convert` or `ignore` leave out have a plain weight there. A matrix that is exactly one of our formats
keeps its codes, whatever `quantize.*` says, as bitsandbytes' nf4 and gpt-oss' mxfp4 do. Others are dequantized one at
a time as they are read, and stored or quantized again as the configuration asks. All layers of a leaf are treated
alike: where one is not quantized, or otherwise, none stays packed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tpu_tune.checkpoints import bitsandbytes, mxfp4
from tpu_tune.checkpoints.compressed_tensors import compressed_matrices
from tpu_tune.checkpoints.gptq_awq import awq_matrices, gptq_matrices
from tpu_tune.checkpoints.params import torch_shapes
from tpu_tune.checkpoints.quantized_matrix import Matrix
from tpu_tune.checkpoints.scaled_floats import fp8_matrices
from tpu_tune.checkpoints.stored_tensor import StoredTensor
from tpu_tune.config import QuantizeConfig
from tpu_tune.errors import UserError
from tpu_tune.models import architecture
from tpu_tune.models.values import OBJECT, one_line, shown
from tpu_tune.tensors import Module, QuantizedTensor

Shapes = dict[str, tuple[int, ...]]
Read = Callable[[str], Any]
Words = Callable[[], str]

# quant_method -> what finds a model's quantized matrices, and what it is called in messages
_FORMATS: dict[str, tuple[Callable[..., dict[str, Matrix]], str]] = {
    "gptq": (gptq_matrices, "GPTQ"),
    "awq": (awq_matrices, "AWQ"),
    "compressed-tensors": (compressed_matrices, "compressed-tensors"),
    "fp8": (fp8_matrices, "FP8"),
    "fbgemm_fp8": (fp8_matrices, "FP8"),
}
# Of activations and caches, which are not quantized here.
_UNUSED = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "activation_scale",
    "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point", "prob_scale",
)  # fmt: skip


def as_unquantized(
    path: str, config: Mapping[str, Any], stored: Mapping[str, StoredTensor], read: Read
) -> tuple[Shapes, Read, Words]:
    """Turn stored names into logical ones where a config.json says that the weights are quantized.

    Args:
      path: where the model is, for messages.
      config: config.json's content.
      stored: the files' tensors by name.
      read: reads one of them.

    Returns:
      Logical shapes; a function that reads a logical tensor, as `QuantizedTensor` where it stays packed, else as an
      array; and one that says what is kept and what is dequantized, "" where there is nothing to say.

    Raises:
      UserError: a format that is not read, a matrix whose parts are missing or misshapen, or none in the format.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    quantization = config.get("quantization_config")
    if not quantization:
        return shapes, read, str
    if not OBJECT.holds(quantization):
        raise UserError(f"{path}: 'quantization_config' is {shown(quantization)}; it must be an object")
    if mxfp4.is_stored(config):
        return *mxfp4.as_quantized(path, shapes, read), str
    method = str(quantization.get("quant_method", "bitsandbytes"))
    if method == "bitsandbytes":
        model = _of_bitsandbytes(path, quantization, shapes, read)
        return model.shapes, model.read, model.words
    if method not in _FORMATS:
        known = ", ".join(["bitsandbytes nf4", "mxfp4", *_FORMATS])
        raise UserError(
            f"{path}: weights quantized by {shown(method)} are not read (known: {known}); give the unquantized model"
        )
    find, called = _FORMATS[method]
    with one_line(f"{path}: its quantization_config or a tensor's shape cannot be used"):
        matrices = find(path, quantization, stored, read)
    if not matrices and quantization.get("format") != "dense":
        raise UserError(
            f"{path}: config.json's quantization_config says {method}, and no matrix in its files is quantized so; "
            "take it out if the weights are plain"
        )
    for name in _empty_biases(config, matrices, shapes, read):
        del shapes[name]
    model = _Model(path, called, matrices, shapes, read)
    return model.shapes, model.read, model.words


def _of_bitsandbytes(path: str, quantization: Mapping[str, Any], shapes: Shapes, read: Read) -> _Model:
    logical, read = bitsandbytes.as_quantized(path, quantization, shapes, read)

    def matrix(name: str) -> Matrix:
        packed = functools.partial(read, name)
        return Matrix(logical[name], (), lambda: "nf4", packed, lambda: np.asarray(packed().dequantize()).T)

    matrices = {name: matrix(name) for name in logical if f"{name}.absmax" in shapes}
    return _Model(path, "bitsandbytes", matrices, logical, read)


def _empty_biases(config: Mapping[str, Any], matrices: Mapping[str, Matrix], shapes: Shapes, read: Read) -> list[str]:
    """Return the biases beside quantized matrices that the family has none of, all zeros: older tools wrote them."""
    beside = [name for name in (f"{matrix.removesuffix('.weight')}.bias" for matrix in matrices) if name in shapes]
    try:
        known = torch_shapes(architecture(config)) if beside else {}
    except UserError:  # whoever needs the architecture says what is wrong with it
        return []
    ends = {name.partition("layers.")[2] for name in known}
    return [name for name in beside if name.partition("layers.")[2] not in ends and not read(name).any()]


@dataclasses.dataclass
class _Model:
    """A model with quantized matrices.

    Attributes:
      path: where it is, for messages.
      called: the format's name.
      matrices: the quantized ones by logical name.
      stored: the files' tensors' shapes.
      read_stored: reads one of these.
    """

    path: str
    called: str
    matrices: Mapping[str, Matrix]
    stored: Shapes
    read_stored: Read

    @functools.cached_property
    def shapes(self) -> Shapes:
        """Logical shapes."""
        parts = {part for matrix in self.matrices.values() for part in matrix.parts}
        plain = {name: shape for name, shape in self.stored.items() if name not in parts}
        return {
            **{name: shape for name, shape in plain.items() if not name.endswith(_UNUSED)},
            **{name: matrix.shape for name, matrix in self.matrices.items()},
        }

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """Logical name without its layer -> what all of that name stay packed as, "" where they do not."""
        found = collections.defaultdict(set)
        for name in self.shapes:
            matrix = self.matrices.get(name)
            found[_of_all_layers(name)].add(matrix.kind() if matrix else "")
        return {name: kinds.pop() if len(kinds) == 1 else "" for name, kinds in found.items()}

    def read(self, name: str) -> np.ndarray | QuantizedTensor:
        """Read a logical tensor."""
        if name not in self.matrices:
            return self.read_stored(name)
        with one_line(f"{self.path}: {name} cannot be decoded"):
            return self.matrices[name].packed() if self.kinds[_of_all_layers(name)] else self.matrices[name].dense()

    def words(self) -> str:
        """Say what becomes of the matrices."""
        kinds = collections.Counter(self.kinds[_of_all_layers(name)] for name in self.matrices)
        parts = [f"{count} stay as they are, {kind}" for kind, count in sorted(kinds.items()) if kind]
        if kinds[""]:
            parts.append(f"{kinds['']} are dequantized, and stored as quantize.* and the dtype say")
        return f"{len(self.matrices)} matrices of its files are quantized by {self.called}: {'; '.join(parts)}"


def stored_formats(config: Mapping[str, Any], modules: Iterable[Module]) -> dict[str, QuantizeConfig]:
    """Return path -> format of the leaves that stay packed, as far as a config.json says it; nothing is read.

    For a plan: files that say they are symmetric and in order are taken at their word.
    """
    modules = list(modules)
    if mxfp4.is_stored(config):
        return dict.fromkeys(mxfp4.stored_paths(config, modules), QuantizeConfig("mxfp4"))
    quantization = config.get("quantization_config")
    how = _format_kept(quantization) if isinstance(quantization, Mapping) else None
    if how is None:
        return {}
    keys = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")
    left_out = [str(name) for key in keys for name in quantization.get(key) or []]
    return {
        module.weight: how
        for module in modules
        if module.kind == "linear" and not (module.is_head or module.is_delicate or module.is_router)
        if not any(_names(entry, name) for entry in left_out for name in module.names())
    }


def _format_kept(quantization: Mapping[str, Any]) -> QuantizeConfig | None:
    method = str(quantization.get("quant_method", "bitsandbytes"))
    if method == "bitsandbytes":
        return QuantizeConfig("nf4", group_size=64, double_quant=False)
    if method == "gptq":
        bits, size = quantization.get("bits"), quantization.get("group_size")
        is_ours = quantization.get("sym", True) and not quantization.get("desc_act")
    elif method == "compressed-tensors":
        groups = quantization.get("config_groups")
        groups = [group for group in groups.values() if isinstance(group, Mapping)] if OBJECT.holds(groups) else []
        weights = groups[0].get("weights") if len(groups) == 1 else None
        if not isinstance(weights, Mapping):
            return None
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if weights.get("type") == "float":
            return QuantizeConfig("mxfp4") if (bits, size) == (4, 32) else None
        is_ours = weights.get("symmetric", True) and weights.get("actorder") != "group"
    else:
        return None
    if not is_ours or bits not in (4, 8):
        return None
    size = size if type(size) is int and 0 < size and (size < 128 or size % 128) else 128
    return QuantizeConfig(f"int{bits}", group_size=size, double_quant=False)


def _names(entry: str, name: str) -> bool:
    """Whether an entry of `ignore` and its like is about a module."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry in name


def _of_all_layers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)
