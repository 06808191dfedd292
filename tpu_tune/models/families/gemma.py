"""Gemma 1, 2 and 3 (text): arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models import rope
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, NAMES

FOUR_NORMS = dataclasses.replace(
    LAYER_NAMES,
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)

# What transformers takes where a config.json leaves a key out.
_GEMMA = {
    "head_dim": 256,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
}
_GEMMA2 = {
    "head_dim": 256, "num_key_value_heads": 4, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip
_GEMMA3 = {
    **_GEMMA2, "max_position_embeddings": 131072, "final_logit_softcapping": None, "attn_logit_softcapping": None,
}  # fmt: skip


def gemma(config: Mapping[str, Any]) -> Architecture:
    """Gemma 1: norms stored minus one, embeddings scaled by the root of their width, tanh GELU."""
    config = {**_GEMMA, **config}
    # The first releases said gelu and meant its tanh form.
    activation = "gelu_pytorch_tanh" if config["hidden_act"] == "gelu" else config["hidden_act"]
    kind = LayerKind(LAYER_NAMES, rope=rope.from_config(config, config["head_dim"]))
    return _architecture(config, [kind] * config["num_hidden_layers"], activation)


def gemma2(config: Mapping[str, Any]) -> Architecture:
    """Gemma 2: norms after attention and MLP too, soft caps, a window on every other layer."""
    config = {**_GEMMA2, **config}
    rotary = rope.from_config(config, config["head_dim"])
    kinds = [
        LayerKind(FOUR_NORMS, config["sliding_window"] if kind == "sliding_attention" else None, rotary)
        for kind in _layer_types(config, 2)
    ]
    return _with_caps(config, kinds)


def gemma3(config: Mapping[str, Any]) -> Architecture:
    """Gemma 3: norms of q and k, five layers with a window and a rotary base of their own to each one without."""
    config = {**_GEMMA3, **config}
    names = dataclasses.replace(FOUR_NORMS, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    settings = config.get("rope_parameters") or {
        "sliding_attention": {"rope_type": "default", "rope_theta": config.get("rope_local_base_freq", 10000.0)},
        "full_attention": {
            "rope_theta": config.get("rope_theta", 1000000.0),
            **(config.get("rope_scaling") or {"rope_type": "default"}),
        },
    }
    sliding, full = (
        rope.from_config({**config, "rope_parameters": settings}, config["head_dim"], theta, layer_type)
        for layer_type, theta in (("sliding_attention", 10000.0), ("full_attention", 1000000.0))
    )
    window = LayerKind(names, config["sliding_window"], sliding)
    kinds = [
        window if kind == "sliding_attention" else LayerKind(names, rope=full)
        for kind in _layer_types(config, config.get("sliding_window_pattern") or 6)
    ]
    return _with_caps(config, kinds)


def _layer_types(config: Mapping[str, Any], pattern: int) -> list[str]:
    """Return the config's layer types; without them every `pattern`-th layer sees everything."""
    default = [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return config.get("layer_types") or default


def _with_caps(config: Mapping[str, Any], kinds: list[LayerKind]) -> Architecture:
    architecture = _architecture(config, kinds, config["hidden_activation"])
    return dataclasses.replace(
        architecture,
        attention_scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_soft_cap=config["attn_logit_softcapping"],
        logit_soft_cap=config["final_logit_softcapping"],
    )


def _architecture(config: Mapping[str, Any], kinds: list[LayerKind], activation: str) -> Architecture:
    if config.get("use_bidirectional_attention"):
        raise UserError(
            f"'use_bidirectional_attention' is set in the config of this {config['model_type']} model: not implemented"
        )
    bias = bool(config.get("attention_bias", False))
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        layer_kinds=tuple(kinds),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        activation=check_activation(activation),
        qkv_bias=bias,
        o_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
        embed_scale=math.sqrt(config["hidden_size"]),
        max_positions=config["max_position_embeddings"],
    )
