"""Qwen3.5 and Qwen3-Next (text): three layers of gated DeltaNet to each one of gated attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.delta_modules import DeltaNet
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama
from tpu_tune.models.families.qwen_moe import SHARED, SPARSE, experts_of
from tpu_tune.models.names import LayerNames

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
_SPARSE = {
    "num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "mlp_only_layers": (), "decoder_sparse_step": 1, "norm_topk_prob": True, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_NEXT = {**_DEFAULTS, **_SPARSE, "intermediate_size": 5632, "num_experts": 512, "num_experts_per_tok": 10}
_QWEN3_5 = {**_DEFAULTS, "num_key_value_heads": 4}
_QWEN3_5_MOE = {**_DEFAULTS, **_SPARSE, "num_experts": 256, "num_experts_per_tok": 8}


def qwen3_5(config: Mapping[str, Any]) -> Architecture:
    """Qwen3.5: DeltaNet's projections are separate matrices."""
    return _architecture({**_QWEN3_5, **config}, _SEPARATE)


def qwen3_5_moe(config: Mapping[str, Any]) -> Architecture:
    """Qwen3.5 with experts in every layer, whose weights add up to one."""
    config = {**_QWEN3_5_MOE, **config, "norm_topk_prob": True, "mlp_only_layers": (), "decoder_sparse_step": 1}
    return _architecture({"intermediate_size": config["moe_intermediate_size"], **config}, _SEPARATE)


def qwen3_next(config: Mapping[str, Any]) -> Architecture:
    """Qwen3-Next: DeltaNet's projections are fused, head by head; its MLPs are experts but where the config says."""
    return _architecture({**_NEXT, **config}, _GROUPED)


def _with_experts(config: Mapping[str, Any], kinds: list[LayerKind]) -> list[LayerKind]:
    """Return the kinds of layers, with experts and an MLP of all tokens in the place of the MLP in sparse layers."""
    if not config.get("num_experts"):
        return kinds
    experts, dense = (
        experts_of(config, shared_width=config["shared_expert_intermediate_size"]),
        config["mlp_only_layers"],
    )
    return [
        kind
        if layer in (dense or ()) or (layer + 1) % config["decoder_sparse_step"]
        else dataclasses.replace(kind, names=dataclasses.replace(kind.names, **SPARSE, **SHARED), experts=experts)
        for layer, kind in enumerate(kinds)
    ]


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
    kinds = _with_experts(config, kinds)
    return like_llama(config, kinds, norm_offset=1.0, attention_gate=True, qkv_bias=bias, o_bias=bias)
