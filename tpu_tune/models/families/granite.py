"""Granite 3, dense and with experts, and Granite 4's dense models (arXiv:2405.04324)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture, Experts, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, like_llama, same_layers
from tpu_tune.models.families.qwen_moe import balance_of

_SHARED_MLP = dataclasses.replace(
    LAYER_NAMES, gate="", up="", gate_up="shared_mlp.input_linear", down="shared_mlp.output_linear"
)

_SPARSE = dataclasses.replace(
    LAYER_NAMES,
    gate="",
    up="",
    down="",
    router="block_sparse_moe.router.layer",
    expert_gate_up="block_sparse_moe.input_linear",
    expert_down="block_sparse_moe.output_linear",
)

# What transformers takes where a config.json leaves a key out.
_GRANITE = {
    "max_position_embeddings": 2048, "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}  # fmt: skip
_MOE = {
    **_GRANITE, "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 0,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
_HYBRID = {**_GRANITE, "num_local_experts": 8, "shared_intermediate_size": 1024}


def granite(config: Mapping[str, Any]) -> Architecture:
    """Llama with four factors: on the embedding, the scores, what attention and MLP add, and (divided) the logits."""
    config = {**_GRANITE, **config}
    return _architecture(config, same_layers(config), mlp_bias=bool(config.get("mlp_bias", False)))


def granite_moe(config: Mapping[str, Any]) -> Architecture:
    """Granite whose MLP is many, weighed by the softmax of the largest scores, with or without one for all tokens."""
    config = {**_MOE, **config}
    shared = config["shared_intermediate_size"] if config["model_type"] == "granitemoeshared" else 0
    names = _SPARSE
    if shared:
        names = dataclasses.replace(names, shared_gate_up=_SHARED_MLP.gate_up, shared_down=_SHARED_MLP.down)
    experts = Experts(
        count=config["num_local_experts"],
        per_token=config["num_experts_per_tok"],
        width=config["intermediate_size"],
        rule="softmax_of_chosen",
        balance=balance_of(config),
        shared_width=shared,
    )
    kinds = [dataclasses.replace(kind, experts=experts) for kind in same_layers(config, names=names)]
    return _architecture(config, kinds)


def granite_hybrid(config: Mapping[str, Any]) -> Architecture:
    """Granite 4's own class for its dense models: gate and up in one matrix, all layers attention, no experts.

    Raises:
      UserError: experts or Mamba layers.
    """
    config = {**_HYBRID, **config}
    if config["num_local_experts"]:
        raise UserError(
            f"num_local_experts is {config['num_local_experts']} in the config of this {config['model_type']} model: "
            "experts are not implemented"
        )
    types = config.get("layer_types") or config.get("layers_block_type") or ["mamba"]
    other = sorted(set(types) - {"attention", "full_attention"})
    if other:
        raise UserError(
            f"layers of the type '{other[0]}' in the config of this {config['model_type']} model are not implemented"
        )
    kinds = same_layers(config, names=_SHARED_MLP)
    if config.get("position_embedding_type") != "rope":
        kinds = [dataclasses.replace(kind, rope=None) for kind in kinds]
    return _architecture({**config, "intermediate_size": config["shared_intermediate_size"]}, kinds)


def _architecture(config: Mapping[str, Any], kinds: list[LayerKind], **facts: Any) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    return like_llama(
        config,
        kinds,
        qkv_bias=bias,
        o_bias=bias,
        input_scale=float(config["embedding_multiplier"]),
        attention_scale=float(config["attention_multiplier"]),
        residual_scale=float(config["residual_multiplier"]),
        head_scale=1.0 / config["logits_scaling"],
        **facts,
    )
