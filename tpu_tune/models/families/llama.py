"""Llama 1, 2 and 3.x, Mistral, Qwen2 and Qwen3: one lineage that differs in biases, windows and head norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind, LayerNames, Names

NAMES = Names(
    embed="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
)
LAYER_NAMES = LayerNames(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

# What transformers takes where a config.json leaves a key out.
_LLAMA = {"max_position_embeddings": 2048}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN2 = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN3 = {**_QWEN2, "head_dim": 128}


def llama(config: Mapping[str, Any]) -> Architecture:
    """Llama (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783)."""
    config = {**_LLAMA, **config}
    return _architecture(
        config,
        windows=[None] * config["num_hidden_layers"],
        qkv_bias=bool(config.get("attention_bias", False)),
        o_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def mistral(config: Mapping[str, Any]) -> Architecture:
    """Mistral 7B (arXiv:2310.06825): Llama with a sliding window."""
    config = {**_MISTRAL, **config}
    return _architecture(config, windows=[config["sliding_window"]] * config["num_hidden_layers"])


def qwen2(config: Mapping[str, Any]) -> Architecture:
    """Qwen2 (arXiv:2407.10671): biases on q, k and v, a window on the upper layers where the config turns it on."""
    config = {**_QWEN2, **config}
    return _architecture(config, windows=_qwen_windows(config), qkv_bias=True)


def qwen3(config: Mapping[str, Any]) -> Architecture:
    """Qwen3 (arXiv:2505.09388): a norm on every head of q and k instead of biases."""
    config = {**_QWEN3, **config}
    names = dataclasses.replace(LAYER_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    bias = bool(config.get("attention_bias", False))
    return _architecture(config, windows=_qwen_windows(config), layer_names=names, qkv_bias=bias, o_bias=bias)


def _qwen_windows(config: Mapping[str, Any]) -> list[int | None]:
    layers = config["num_hidden_layers"]
    window = config["sliding_window"] if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window if layer >= config["max_window_layers"] else None for layer in range(layers)]


def _architecture(
    config: Mapping[str, Any], windows: list[int | None], layer_names: LayerNames = LAYER_NAMES, **facts: Any
) -> Architecture:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rotary = rope.from_config(config, head_dim)
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        layer_kinds=tuple(LayerKind(layer_names, window, rotary) for window in windows),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        activation=check_activation(config.get("hidden_act", "silu")),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config.get("max_position_embeddings", 0),
        **facts,
    )
