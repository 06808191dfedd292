"""GGUF files as a source of weights: configuration, tensor names and layouts back to Hugging Face's."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from tpu_tune.checkpoints.gguf_families import FAMILIES, GgufFamily, split_layer
from tpu_tune.checkpoints.gguf_file import GgufFile, open_gguf_file, read_gguf_tensor
from tpu_tune.checkpoints.gguf_tokenizer import build_tokenizer
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models.values import one_line


def open_gguf(path: str) -> WeightSource:
    """Open a GGUF file; only its header is read.

    `read` gives F32, F16 and BF16 tensors as stored and everything else dequantized to float32.

    Raises:
      UserError: the file is missing, cut short or not GGUF, or of an architecture, version or number format that is
        not known here.
    """
    file = open_gguf_file(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{path}: architecture {architecture!r} is not known in GGUF files (known: {known})")
    family = FAMILIES[architecture]
    stored = _stored_names(file, family)
    with one_line(f"{path}: its metadata or a tensor's shape cannot be used"):
        config = family.config(file)
        shapes = {name: family.shape(name, file.tensors[original].shape) for name, original in stored.items()}
    return WeightSource(
        path=file.path,
        config=config,
        shapes=shapes,
        read=functools.partial(_read, file, stored, family, config),
        load_tokenizer=functools.partial(build_tokenizer, file.path, file.metadata),
        fingerprint=file.fingerprint,
    )


def _read(file: GgufFile, stored: dict[str, str], family: GgufFamily, config: dict[str, Any], name: str) -> np.ndarray:
    return family.to_huggingface(name, read_gguf_tensor(file, stored[name]), config)


def _stored_names(file: GgufFile, family: GgufFamily) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name."""
    names, stored, unknown = family.names_in(file.tensors), {}, []
    for original in file.tensors:
        module, _, kind = original.rpartition(".")
        key, layer = split_layer(module, "blk")
        if key in family.skip:
            continue
        if key not in names:
            unknown.append(original)
        else:
            stored[family.tensor_name(names[key].format(layer), kind)] = original
    if unknown:
        listed = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(f"{file.path}: {len(unknown)} tensors have no place in this architecture: {listed}")
    return stored
