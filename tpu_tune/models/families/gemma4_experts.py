"""Gemma 4's experts, which stand beside the MLP of every layer where `enable_moe_block` says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models.architecture import Experts, LayerKind

_NAMES = {
    "router": "router.proj", "router_scale": "router.scale", "expert_scale": "router.per_expert_scale",
    "expert_gate_up": "experts.gate_up_proj", "expert_down": "experts.down_proj",
    "experts_norm": "pre_feedforward_layernorm_2", "experts_out_norm": "post_feedforward_layernorm_2",
    "dense_out_norm": "post_feedforward_layernorm_1",
}  # fmt: skip


def with_experts(config: Mapping[str, Any], kind: LayerKind) -> LayerKind:
    """Return a kind of layers with experts: softmax over all, the largest taken, divided by their sum and scaled."""
    experts = Experts(
        count=config["num_experts"],
        per_token=config["top_k_experts"],
        width=config["moe_intermediate_size"],
        in_parameters=True,
        renormalize=True,
    )
    return dataclasses.replace(kind, names=dataclasses.replace(kind.names, **_NAMES), experts=experts)
