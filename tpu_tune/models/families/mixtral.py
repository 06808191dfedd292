"""Mixtral (arXiv:2401.04088): Mistral whose MLP is one of eight, two of them for each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models.architecture import Architecture, Experts
from tpu_tune.models.families.llama import LAYER_NAMES, like_llama, same_layers
from tpu_tune.models.families.qwen_moe import balance_of

_NAMES = dataclasses.replace(
    LAYER_NAMES,
    gate="",
    up="",
    down="",
    router="block_sparse_moe.gate",
    expert_gate="block_sparse_moe.experts.w1",
    expert_up="block_sparse_moe.experts.w3",
    expert_down="block_sparse_moe.experts.w2",
)

# What transformers takes where a config.json leaves a key out.
_DEFAULTS = {
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
}  # fmt: skip


def mixtral(config: Mapping[str, Any]) -> Architecture:
    """Softmax over all experts, of which the two largest are taken and divided by their sum."""
    config = {**_DEFAULTS, **config}
    experts = Experts(
        count=config.get("num_experts") or config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        width=config["intermediate_size"],
        path="block_sparse_moe.experts",
        renormalize=True,
        balance=balance_of(config),
    )
    kinds = same_layers(config, config.get("sliding_window"), _NAMES)
    kinds = [dataclasses.replace(kind, experts=experts) for kind in kinds]
    return like_llama(config, kinds)
