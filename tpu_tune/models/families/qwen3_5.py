"""Qwen3.5 and Qwen3-Next (text): three layers of gated DeltaNet to each one of gated attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerKind, LayerNames
from tpu_tune.models.delta_modules import DeltaNet
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama

_ATTENTION = dataclasses.replace(LAYER_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_DELTA = dataclasses.replace(
    LAYER_NAMES,
    q="",
    k="",
    v="",
    o="linear_attn.out_proj",
    delta_conv="linear_attn.conv1d",
    delta_rate="linear_attn.A_log",
    delta_shift="linear_attn.dt_bias",
    delta_norm="linear_attn.norm",
)
_SEPARATE = dataclasses.replace(
    _DELTA,
    delta_qkv="linear_attn.in_proj_qkv",
    delta_z="linear_attn.in_proj_z",
    delta_b="linear_attn.in_proj_b",
    delta_a="linear_attn.in_proj_a",
)
_GROUPED = dataclasses.replace(_DELTA, delta_qkvz="linear_attn.in_proj_qkvz", delta_ba="linear_attn.in_proj_ba")

# What transformers takes where a config.json leaves a key out.
_DEFAULTS = {
    "max_position_embeddings": 32768, "head_dim": 256, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_NEXT = {**_DEFAULTS, "num_key_value_heads": 2, "num_experts": 512, "decoder_sparse_step": 1}
_QWEN3_5 = {**_DEFAULTS, "num_key_value_heads": 4}


def qwen3_5(config: Mapping[str, Any]) -> Architecture:
    """Qwen3.5: DeltaNet's projections are separate matrices."""
    return _architecture({**_QWEN3_5, **config}, _SEPARATE)


def qwen3_next(config: Mapping[str, Any]) -> Architecture:
    """Qwen3-Next without experts: DeltaNet's projections are fused, head by head."""
    config, dense = {**_NEXT, **config}, set(config.get("mlp_only_layers") or ())
    sparse = [
        layer
        for layer in range(config["num_hidden_layers"])
        if config["num_experts"] and layer not in dense and (layer + 1) % config["decoder_sparse_step"] == 0
    ]
    if sparse:
        raise UserError(
            f"this qwen3_next model has experts (layer {sparse[0]}: num_experts={config['num_experts']}), which are "
            "not implemented for it; num_experts=0 or all layers in mlp_only_layers is"
        )
    return _architecture(config, _GROUPED)


def _architecture(config: Mapping[str, Any], names: LayerNames) -> Architecture:
    interval = config["full_attention_interval"]
    types = config.get("layer_types") or [
        "linear_attention" if (layer + 1) % interval else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    other = set(types) - {"linear_attention", "full_attention"}
    if other:
        raise UserError(f"layer_types names '{min(other)}' in the config of this {config['model_type']} model")
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    if value_heads % key_heads:
        raise UserError(
            f"linear_num_value_heads={value_heads} is no multiple of linear_num_key_heads={key_heads} in the config of "
            f"this {config['model_type']} model"
        )
    delta = DeltaNet(
        key_heads,
        value_heads,
        config["linear_key_head_dim"],
        config["linear_value_head_dim"],
        config["linear_conv_kernel_dim"],
    )
    # Text has one position a token, so that the three of `mrope_section` turn alike.
    rotated = int(head_dim_of(config) * rope.partial_factor(config, 0.25))
    attention = LayerKind(_ATTENTION, rope=rope.from_config(config, rotated))
    kinds = [attention if kind == "full_attention" else LayerKind(names, delta=delta) for kind in types]
    bias = bool(config.get("attention_bias", False))
    return like_llama(config, kinds, norm_offset=1.0, attention_gate=True, qkv_bias=bias, o_bias=bias)
