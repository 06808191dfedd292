"""Phi-1.5 and Phi-2 (arXiv:2309.05463); Phi-3 and Phi-4-mini (arXiv:2404.14219)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, NAMES

_PHI_NAMES = dataclasses.replace(NAMES, final_norm="model.final_layernorm")
_PHI = dataclasses.replace(LAYER_NAMES, mlp_norm="", o="self_attn.dense", gate="", up="mlp.fc1", down="mlp.fc2")
_PHI3 = dataclasses.replace(
    LAYER_NAMES, q="", k="", v="", qkv="self_attn.qkv_proj", gate="", up="", gate_up="mlp.gate_up_proj"
)


def phi(config: Mapping[str, Any]) -> Architecture:
    """One LayerNorm for attention and MLP, which run side by side; rotary on part of each head, biases everywhere."""
    config = {"max_position_embeddings": 2048, **config}
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    names = _PHI
    if config.get("qk_layernorm"):
        names = dataclasses.replace(names, q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm")
    rotary = rope.from_config(config, int(head_dim * rope.partial_factor(config, 0.5)))
    return Architecture(
        family=config["model_type"],
        names=_PHI_NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        layer_kinds=(LayerKind(names, rope=rotary),) * config["num_hidden_layers"],
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=check_activation(config.get("hidden_act", "gelu_new")),
        residual="parallel",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
        default_targets=("q_proj", "v_proj", "fc1", "fc2"),
    )


def phi3(config: Mapping[str, Any]) -> Architecture:
    """Llama with q, k, v in one matrix and gate, up in another; long contexts by longrope."""
    config = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, **config}
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    rotary = rope.from_config(config, int(head_dim * rope.partial_factor(config)))
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        layer_kinds=(LayerKind(_PHI3, config.get("sliding_window"), rotary),) * config["num_hidden_layers"],
        norm_eps=config.get("rms_norm_eps", 1e-5),
        activation=check_activation(config.get("hidden_act", "silu")),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
        default_targets=("qkv_proj",),
    )
