"""OLMoE, OLMo 2 and OLMo 3 (arXiv:2409.02060, arXiv:2501.00656, arXiv:2512.13961)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, NORMS_AFTER, head_dim_of, like_llama, same_layers
from tpu_tune.models.families.qwen_moe import SPARSE, experts_of

# What transformers takes where a config.json leaves a key out.
_OLMO = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_OLMOE = {
    "max_position_embeddings": 4096, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
    "rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01,
}  # fmt: skip
_OLMO3 = {**_OLMO, "sliding_window": 4096, "rope_theta": 500000.0}


def olmo2(config: Mapping[str, Any]) -> Architecture:
    """Norms of what attention and MLP add, none of what they read; q and k are normed before they become heads."""
    config = {**_OLMO, **config}
    return _architecture(config, same_layers(config, names=NORMS_AFTER))


def olmo3(config: Mapping[str, Any]) -> Architecture:
    """OLMo 2 with a window in three layers of four; only the others' rotary embedding is stretched."""
    config = {**_OLMO3, **config}
    settings = config.get("rope_parameters") or {
        "sliding_attention": {"rope_type": "default"},
        "full_attention": config.get("rope_scaling") or {"rope_type": "default"},
    }
    sliding, full = (
        rope.from_config({**config, "rope_parameters": settings}, head_dim_of(config), layer_type=layer_type)
        for layer_type in ("sliding_attention", "full_attention")
    )
    types = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in range(config["num_hidden_layers"])
    ]
    window = LayerKind(NORMS_AFTER, config["sliding_window"], sliding)
    kinds = [window if kind == "sliding_attention" else LayerKind(NORMS_AFTER, rope=full) for kind in types]
    return _architecture(config, kinds)


def olmoe(config: Mapping[str, Any]) -> Architecture:
    """Norms before attention and MLP as in Llama, q and k normed before they become heads, experts in every layer."""
    config = {**_OLMOE, **config}
    names = dataclasses.replace(LAYER_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", **SPARSE)
    experts = experts_of(config, width=config["intermediate_size"])
    kinds = [dataclasses.replace(kind, experts=experts) for kind in same_layers(config, names=names)]
    return dataclasses.replace(_architecture(config, kinds), qkv_clip=config.get("clip_qkv"))


def _architecture(config: Mapping[str, Any], kinds: list[LayerKind]) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    return like_llama(config, kinds, qkv_bias=bias, o_bias=bias, qk_norm="projection")
