"""Qwen2-MoE (arXiv:2407.10671) and Qwen3-MoE (arXiv:2505.09388): Qwen2 and Qwen3 whose MLP is many small ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, Experts, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama
from tpu_tune.models.names import LayerNames

# A sparse layer's: the MLP's own names are those of each expert.
SPARSE = {
    "gate": "", "up": "", "down": "", "router": "mlp.gate", "expert_gate": "mlp.experts.gate_proj",
    "expert_up": "mlp.experts.up_proj", "expert_down": "mlp.experts.down_proj",
}  # fmt: skip
# The MLP that every token of Qwen2-MoE (and Qwen3-Next) goes through, and the gate on it.
SHARED = {
    "shared_gate": "mlp.shared_expert.gate_proj", "shared_up": "mlp.shared_expert.up_proj",
    "shared_down": "mlp.shared_expert.down_proj", "shared_switch": "mlp.shared_expert_gate",
}  # fmt: skip

# What transformers takes where a config.json leaves a key out.
_QWEN = {
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "decoder_sparse_step": 1,
    "norm_topk_prob": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_QWEN2 = {
    **_QWEN, "num_key_value_heads": 16, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
}  # fmt: skip
_QWEN3 = {
    **_QWEN, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
}  # fmt: skip


def qwen2_moe(config: Mapping[str, Any]) -> Architecture:
    """Qwen2 with experts beside one MLP that all tokens go through, which a sigmoid of the token weighs."""
    config = {**_QWEN2, **config}
    window = config["sliding_window"] if config.get("use_sliding_window") else None
    types = config.get("layer_types") or [
        "full_attention" if layer % 2 or layer >= config["max_window_layers"] else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    windows = [window if kind == "sliding_attention" else None for kind in types]
    experts = experts_of(config, shared_width=config["shared_expert_intermediate_size"])
    kinds = sparse_layers(config, LAYER_NAMES, windows, experts)
    return like_llama(config, kinds, qkv_bias=bool(config["qkv_bias"]))


def qwen3_moe(config: Mapping[str, Any]) -> Architecture:
    """Qwen3 with experts."""
    config = {**_QWEN3, **config}
    window = config["sliding_window"] if config.get("use_sliding_window") else None
    names = dataclasses.replace(LAYER_NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
    kinds = sparse_layers(config, names, [window] * config["num_hidden_layers"], experts_of(config))
    bias = bool(config.get("attention_bias", False))
    return like_llama(config, kinds, qkv_bias=bias, o_bias=bias)


def experts_of(config: Mapping[str, Any], **facts: Any) -> Experts:
    """Return what a Qwen config says of experts: softmax over all, the largest taken, perhaps renormalized."""
    return Experts(
        # transformers 5 writes the second name for some of these families
        **{
            "count": config.get("num_local_experts") or config["num_experts"],
            "per_token": config["num_experts_per_tok"],
            "width": config.get("moe_intermediate_size", 0),
            "path": "mlp.experts",
            "renormalize": bool(config["norm_topk_prob"]),
            "balance": balance_of(config),
            **facts,
        }
    )


def balance_of(config: Mapping[str, Any]) -> float:
    """Return the weight of the load-balancing loss: transformers adds it where the router's logits are asked for."""
    return float(config["router_aux_loss_coef"]) if config.get("output_router_logits") else 0.0


def sparse_layers(
    config: Mapping[str, Any], names: LayerNames, windows: list[int | None], experts: Experts
) -> list[LayerKind]:
    """Return the kinds of layers: every `decoder_sparse_step`-th has experts, but those of `mlp_only_layers`."""
    rotary = rope.from_config(config, head_dim_of(config))
    shared = SHARED if experts.shared_width else {}
    sparse_names = dataclasses.replace(names, **SPARSE, **shared)
    dense, sparse = LayerKind(names, rope=rotary), LayerKind(sparse_names, rope=rotary, experts=experts)
    kinds = []
    for layer, window in enumerate(windows):
        is_sparse = (
            layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % config["decoder_sparse_step"] == 0
        )
        kinds.append(dataclasses.replace(sparse if is_sparse else dense, window=window))
    return kinds
