"""Weights that were rounded against activations (`quantize.calibration`), kept in the run that they were made for.

`<run>/calibrated/layer-00007.safetensors` holds one layer's matrices as codes and scales, under their Hugging Face
names. They follow from the run's data, which nobody else has, so whoever loads the run's base reads them there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.params import check_names
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture
from tpu_tune.tensors import FORMATS, QuantizedTensor, pack_block

FOLDER = "calibrated"
_PARTS = ("codes", "scales", "scale_max")


def write_layer(folder: str, layer: int, matrices: Mapping[str, QuantizedTensor], mark: str, rows: str) -> None:
    """Write one layer's matrices: wholly, or not at all.

    Args:
      folder: a run's `calibrated`; made if needed.
      layer: its number.
      matrices: Hugging Face name of a tensor -> what stands for it, columns in the file's order; where the tensor has
        all of a layer's experts, on a leading axis.
      mark: what the matrices belong to: `run_checkpoints.base_fingerprint`.
      rows: a hash of the rows that they were rounded for.

    Raises:
      UserError: it cannot be written.
    """
    arrays, facts = {}, {"mark": mark, "rows": rows}
    for name, matrix in matrices.items():
        for part in _PARTS:
            if getattr(matrix, part) is not None:
                arrays[f"{name}.{part}"] = np.ascontiguousarray(getattr(matrix, part))
        facts |= {"format": matrix.format, "group_size": str(matrix.group_size)}
    try:
        storage.make_dirs(folder)
        storage.write_bytes(_file(folder, layer), save(arrays, facts))
    except OSError as error:
        raise UserError(f"{_file(folder, layer)} cannot be written: {error.strerror or error}") from error


def names_in(folder: str, layer: int, mark: str) -> list[str]:
    """Return the names of what `write_layer` wrote for this base; none where there is nothing."""
    with _opened(folder, layer, mark) as stored:
        return [] if stored is None else _names(stored)


def read_layer(folder: str, layer: int, mark: str, rows: str | None = None) -> dict[str, QuantizedTensor] | None:
    """Return what `write_layer` wrote; None where there is none for this base, or for these rows if they are given."""
    with _opened(folder, layer, mark, rows) as stored:
        return None if stored is None else {name: _matrix(stored, name) for name in _names(stored)}


def with_calibrated(source: WeightSource, architecture: Architecture, folder: str, mark: str) -> WeightSource:
    """Return a source that reads the matrices in `folder` instead of its own.

    Args:
      source: the model.
      architecture: its facts.
      folder: a run's `calibrated`.
      mark: as for `write_layer`.

    Raises:
      UserError: they are not there, or belong to another base.
    """
    names, found = check_names(source, architecture), {}
    for layer in range(architecture.num_layers):
        matrices = names_in(folder, layer, mark)
        if not matrices:
            raise UserError(
                f"{_file(folder, layer)}: the rounded weights of this run's base are not there, or belong to another "
                "base; the run's train command makes them"
            )
        found |= {names[name]: (layer, name) for name in matrices}

    def read(name: str) -> np.ndarray | QuantizedTensor:
        if name not in found:
            return source.read(name)
        layer, own = found[name]
        with _opened(folder, layer, mark) as stored:
            return _matrix(stored, own)

    return dataclasses.replace(source, read=read)


def _file(folder: str, layer: int) -> str:
    return os.path.join(folder, f"layer-{layer:05d}.safetensors")


@contextlib.contextmanager
def _opened(folder: str, layer: int, mark: str, rows: str | None = None) -> Iterator[Any]:
    """Yield a layer's file, open; None where it is not there, or was written for something else."""
    file = _file(folder, layer)
    if not storage.exists(file):
        yield None
        return
    try:
        stored = safe_open(storage.local_copy(file), "numpy")
    except (SafetensorError, OSError):  # damaged: what it held is made again
        yield None
        return
    with stored:
        facts = stored.metadata() or {}
        yield stored if facts.get("mark") == mark and rows in (None, facts.get("rows")) else None


def _names(stored: Any) -> list[str]:
    return sorted({key.rpartition(".")[0] for key in stored.keys()})  # noqa: SIM118


def _matrix(stored: Any, name: str) -> QuantizedTensor:
    facts, keys = stored.metadata(), stored.keys()
    format = facts["format"]
    codes, scales, largest = (
        stored.get_tensor(f"{name}.{part}") if f"{name}.{part}" in keys else None for part in _PARTS
    )
    rows = codes.shape[-2] * (2 if FORMATS[format].bits == 4 else 1)
    shape = (rows, codes.shape[-1])
    return QuantizedTensor(codes, scales, largest, format, shape, int(facts["group_size"]), pack_block(rows, format))
