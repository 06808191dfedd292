"""GLM-4 (arXiv:2406.12793): `glm` for the models of 2024, `glm4` for those of 2025."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerNames
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama, same_layers

_GLM = dataclasses.replace(LAYER_NAMES, gate="", up="", gate_up="mlp.gate_up_proj")
_GLM4 = dataclasses.replace(_GLM, attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm")

# What transformers takes where a config.json leaves a key out.
_DEFAULTS = {
    "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
}  # fmt: skip


def glm(config: Mapping[str, Any]) -> Architecture:
    """Llama with gate and up in one matrix and rotary positions on neighbours of half of each head."""
    return _architecture(config, _GLM)


def glm4(config: Mapping[str, Any]) -> Architecture:
    """GLM with norms of what attention and MLP add, too."""
    return _architecture(config, _GLM4)


def _architecture(config: Mapping[str, Any], names: LayerNames) -> Architecture:
    config = {**_DEFAULTS, **config}
    rotary = rope.from_config(config, int(head_dim_of(config) * rope.partial_factor(config, 0.5)))
    kinds = same_layers(config, names=names, rotary=dataclasses.replace(rotary, interleaved=True))
    return like_llama(config, kinds, qkv_bias=bool(config["attention_bias"]))
