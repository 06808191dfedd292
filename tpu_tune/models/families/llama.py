"""Llama 1, 2 and 3.x, Mistral, Qwen2 and Qwen3: one lineage that differs in biases, windows and head norms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.names import LayerNames, Names

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
# OLMo's and EXAONE 4's: norms of what attention and MLP add, none of what they read.
NORMS_AFTER = dataclasses.replace(
    LAYER_NAMES,
    attention_norm="",
    attention_out_norm="post_attention_layernorm",
    mlp_norm="",
    mlp_out_norm="post_feedforward_layernorm",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
)

# What transformers takes where a config.json leaves a key out.
_LLAMA = {"max_position_embeddings": 2048}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN2 = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_QWEN3 = {**_QWEN2, "head_dim": 128}


def llama(config: Mapping[str, Any]) -> Architecture:
    """Llama (arXiv:2302.13971, arXiv:2307.09288, arXiv:2407.21783)."""
    config = {**_LLAMA, **config}
    return like_llama(
        config,
        same_layers(config),
        qkv_bias=bool(config.get("attention_bias", False)),
        o_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def mistral(config: Mapping[str, Any]) -> Architecture:
    """Mistral 7B (arXiv:2310.06825): Llama with a sliding window."""
    config = {**_MISTRAL, **config}
    return like_llama(config, same_layers(config, config["sliding_window"]))


def qwen2(config: Mapping[str, Any]) -> Architecture:
    """Qwen2 (arXiv:2407.10671): biases on q, k and v, a window on the upper layers where the config turns it on."""
    config = {**_QWEN2, **config}
    return like_llama(config, _qwen_layers(config, LAYER_NAMES), qkv_bias=True)


def qwen3(config: Mapping[str, Any]) -> Architecture:
    """Qwen3 (arXiv:2505.09388): a norm on every head of q and k instead of biases."""
    config = {**_QWEN3, **config}
    names = dataclasses.replace(LAYER_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    bias = bool(config.get("attention_bias", False))
    return like_llama(config, _qwen_layers(config, names), qkv_bias=bias, o_bias=bias)


def _qwen_layers(config: Mapping[str, Any], names: LayerNames) -> list[LayerKind]:
    layers = config["num_hidden_layers"]
    window = config["sliding_window"] if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds:
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    else:
        windows = [window if layer >= config["max_window_layers"] else None for layer in range(layers)]
    rotary = rope.from_config(config, head_dim_of(config))
    return [LayerKind(names, window, rotary) for window in windows]


def head_dim_of(config: Mapping[str, Any]) -> int:
    """Return the size of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def same_layers(
    config: Mapping[str, Any],
    window: int | None = None,
    names: LayerNames = LAYER_NAMES,
    rotary: rope.Rope | None = None,
) -> list[LayerKind]:
    """Return the kinds of layers of a model whose layers are all alike; `rotary` by default as the config says."""
    kind = LayerKind(names, window, rotary or rope.from_config(config, head_dim_of(config)))
    return [kind] * config["num_hidden_layers"]


def like_llama(config: Mapping[str, Any], kinds: Sequence[LayerKind], **facts: Any) -> Architecture:
    """Return the architecture of a family that names and stores its parts as Llama does.

    Args:
      config: content of config.json, with the family's defaults.
      kinds: one entry a layer.
      facts: what else the family does not share with Llama.
    """
    heads = config["num_attention_heads"]
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim_of(config),
        layer_kinds=tuple(kinds),
        activation=check_activation(config.get("hidden_act", "silu")),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config.get("max_position_embeddings", 0),
        **{"norm_eps": config.get("rms_norm_eps", 1e-6), **facts},
    )
