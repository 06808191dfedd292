"""A family whose layers differ in their leaves, and the plain Llama that computes the same.

Layer 0 is dense and narrower, then two layers with separate matrices and one with fused ones, twice, and one more:
three groups. As a Llama, the fused matrices are cut, and the first layer's MLP is padded with zeros, which stay zero.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import helpers_training
import numpy as np
from safetensors.numpy import load_file, save_file

from tpu_tune.models import Architecture
from tpu_tune.models.families.llama import LAYER_NAMES, llama

NARROW, LAYERS = 32, 8
FUSED = dataclasses.replace(
    LAYER_NAMES, q="", k="", v="", qkv="self_attn.qkv_proj", gate="", up="", gate_up="mlp.gate_up_proj"
)
FUSED_LAYERS = (3, 6)


def mixed(config: Mapping[str, Any]) -> Architecture:
    """The family: a Llama whose layers are of three kinds."""
    plain = llama({**config, "num_hidden_layers": LAYERS})
    kind = plain.layer_kinds[0]
    kinds = [
        dataclasses.replace(kind, names=FUSED if layer in FUSED_LAYERS else LAYER_NAMES) for layer in range(LAYERS)
    ]
    kinds[0] = dataclasses.replace(kind, intermediate_size=NARROW)
    kinds[2] = dataclasses.replace(kinds[2], window=8)  # a fact of attention only, where the leaves are the same
    return dataclasses.replace(plain, family="mixed", layer_kinds=tuple(kinds))


def windowed_llama(config: Mapping[str, Any]) -> Architecture:
    """The same mathematics with the same leaves in every layer."""
    plain = llama(config)
    kinds = [*plain.layer_kinds]
    kinds[2] = dataclasses.replace(kinds[2], window=8)
    return dataclasses.replace(plain, layer_kinds=tuple(kinds))


def write_both(folder: pathlib.Path) -> tuple[str, str]:
    """Write the mixed model and the Llama; return their directories."""
    reference = helpers_training.write_tiny_llama(
        folder / "reference", num_hidden_layers=LAYERS, model_type="windowed_llama"
    )
    tensors = load_file(reference / "model.safetensors")
    first = "model.layers.0.mlp"
    tensors[f"{first}.down_proj.weight"][:, NARROW:] = 0
    for name in ("gate_proj", "up_proj"):
        tensors[f"{first}.{name}.weight"][NARROW:] = 0
    save_file(tensors, reference / "model.safetensors", metadata={"format": "pt"})

    folder = helpers_training.write_tiny_llama(folder / "mixed", num_hidden_layers=LAYERS, model_type="mixed")
    tensors[f"{first}.down_proj.weight"] = np.ascontiguousarray(tensors[f"{first}.down_proj.weight"][:, :NARROW])
    for name in ("gate_proj", "up_proj"):
        tensors[f"{first}.{name}.weight"] = tensors[f"{first}.{name}.weight"][:NARROW]
    for layer in FUSED_LAYERS:
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            module = f"model.layers.{layer}.{fused.partition('.')[0]}"
            pieces = [tensors.pop(f"{module}.{part}_proj.weight") for part in parts]
            tensors[f"model.layers.{layer}.{fused}.weight"] = np.concatenate(pieces)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), str(reference)


def config_of(folder: str) -> dict[str, Any]:
    """Return a directory's config.json."""
    return json.loads((pathlib.Path(folder) / "config.json").read_text())
