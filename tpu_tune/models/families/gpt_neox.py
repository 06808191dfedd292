"""GPT-NeoX: Pythia, RedPajama-INCITE, GPT-NeoX-20B (arXiv:2204.06745)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.names import LayerNames, Names

NAMES = Names(
    embed="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)
LAYER_NAMES = LayerNames(
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    qkv="attention.query_key_value",
    o="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def gpt_neox(config: Mapping[str, Any]) -> Architecture:
    """One fused projection with q, k, v head by head, rotary on part of each head, LayerNorm, biases everywhere."""
    config = {"max_position_embeddings": 2048, **config}  # transformers' default
    heads = config["num_attention_heads"]
    head_dim = config["hidden_size"] // heads
    partial = (config.get("rope_parameters") or {}).get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    rotary = rope.from_config(config, int(head_dim * partial))
    bias = bool(config.get("attention_bias", True))
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        layer_kinds=(LayerKind(LAYER_NAMES, rope=rotary),) * config["num_hidden_layers"],
        norm="layer",
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=check_activation(config.get("hidden_act", "gelu")),
        fused_heads=True,
        residual="parallel" if config.get("use_parallel_residual", True) else "sequential",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
        default_targets=("query_key_value",),
    )
