"""OpenAI's gpt-oss (arXiv:2508.10925): attention with sinks, every other layer in a window, and clamped experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, Experts, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama
from tpu_tune.models.families.qwen_moe import balance_of

_NAMES = dataclasses.replace(
    LAYER_NAMES,
    gate="",
    up="",
    down="",
    sinks="self_attn.sinks",
    router="mlp.router",
    expert_gate_up="mlp.experts.gate_up_proj",
    expert_down="mlp.experts.down_proj",
)

# What transformers takes where a config.json leaves a key out.
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_DEFAULTS = {
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
    "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0, "attention_bias": True, "router_aux_loss_coef": 0.001,
}  # fmt: skip


def gpt_oss(config: Mapping[str, Any]) -> Architecture:
    """Biases everywhere; the largest scores are chosen first, and the softmax is over them alone."""
    config = {**_DEFAULTS, **config}
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = _YARN
    rotary = rope.from_config(config, head_dim_of(config), 150000.0)
    types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(config["num_hidden_layers"])
    ]
    experts = Experts(
        count=config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        width=config["intermediate_size"],
        rule="softmax_of_chosen",
        balance=balance_of(config),
        bias=True,
        alternating=True,
        clamp=config["swiglu_limit"],
        gain=config["swiglu_alpha"],
    )
    kinds = [
        LayerKind(_NAMES, config["sliding_window"] if kind == "sliding_attention" else None, rotary, experts=experts)
        for kind in types
    ]
    bias = bool(config["attention_bias"])
    return like_llama(config, kinds, qkv_bias=bias, o_bias=bias)
