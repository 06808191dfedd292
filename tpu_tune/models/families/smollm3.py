"""SmolLM3: Llama without rotary positions in every fourth layer (arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama

# What transformers takes where a config.json leaves a key out.
_SMOLLM3 = {
    "max_position_embeddings": 32768, "num_key_value_heads": 4, "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}  # fmt: skip


def smollm3(config: Mapping[str, Any]) -> Architecture:
    """`no_rope_layers` has a 1 for each layer with rotary positions; those without may have a window instead."""
    config = {**_SMOLLM3, **config}
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotated = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(layers)]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types") or ["full_attention" if one else "sliding_attention" for one in rotated]
    rotary = rope.from_config(config, head_dim_of(config), 2000000.0)
    bias = bool(config.get("attention_bias", False))
    return like_llama(
        config,
        [
            LayerKind(LAYER_NAMES, window if kind == "sliding_attention" else None, rotary if one else None)
            for kind, one in zip(types, rotated, strict=True)
        ],
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
