"""GLM-4 (arXiv:2406.12793, arXiv:2508.06471): `glm` for the models of 2024, `glm4` and `glm4_moe` for those of 2025."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, Experts, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, head_dim_of, like_llama, same_layers
from tpu_tune.models.families.qwen_moe import SPARSE
from tpu_tune.models.names import LayerNames

_GLM = dataclasses.replace(LAYER_NAMES, gate="", up="", gate_up="mlp.gate_up_proj")
_GLM4 = dataclasses.replace(_GLM, attention_out_norm="post_self_attn_layernorm", mlp_out_norm="post_mlp_layernorm")

_SPARSE = dataclasses.replace(
    LAYER_NAMES,
    **SPARSE,
    choice_bias="mlp.gate.e_score_correction_bias",
    shared_gate="mlp.shared_experts.gate_proj",
    shared_up="mlp.shared_experts.up_proj",
    shared_down="mlp.shared_experts.down_proj",
)

# What transformers takes where a config.json leaves a key out.
_DEFAULTS = {
    "max_position_embeddings": 131072, "num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
}  # fmt: skip

_MOE = {
    "max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
}  # fmt: skip


def glm(config: Mapping[str, Any]) -> Architecture:
    """Llama with gate and up in one matrix and rotary positions on neighbours of half of each head."""
    return _architecture(config, _GLM)


def glm4(config: Mapping[str, Any]) -> Architecture:
    """GLM with norms of what attention and MLP add, too."""
    return _architecture(config, _GLM4)


def _architecture(config: Mapping[str, Any], names: LayerNames) -> Architecture:
    config = {**_DEFAULTS, **config}
    rotary = rope.from_config(config, int(head_dim_of(config) * rope.partial_factor(config, 0.5)))
    kinds = same_layers(config, names=names, rotary=dataclasses.replace(rotary, interleaved=True))
    return like_llama(config, kinds, qkv_bias=bool(config["attention_bias"]))


def glm4_moe(config: Mapping[str, Any]) -> Architecture:
    """GLM-4.5: Llama with rotary positions on half of each head; behind a few dense layers, DeepSeek-V3's experts."""
    config = {**_MOE, **config}
    experts = Experts(
        count=config.get("num_local_experts") or config["n_routed_experts"],
        per_token=config["num_experts_per_tok"],
        width=config["moe_intermediate_size"],
        path="mlp.experts",
        rule="sigmoid",
        renormalize=bool(config["norm_topk_prob"]),
        scale=float(config["routed_scaling_factor"]),
        groups=config["n_group"],
        top_groups=config["topk_group"],
        shared_width=config["n_shared_experts"] * config["moe_intermediate_size"],
    )
    norms = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"} if config.get("use_qk_norm") else {}
    dense, sparse = (dataclasses.replace(names, **norms) for names in (LAYER_NAMES, _SPARSE))
    rotary = rope.from_config(config, int(head_dim_of(config) * rope.partial_factor(config, 0.5)))
    first = config["first_k_dense_replace"]
    kinds = [
        LayerKind(dense, rope=rotary) if layer < first else LayerKind(sparse, rope=rotary, experts=experts)
        for layer in range(config["num_hidden_layers"])
    ]
    return like_llama(config, kinds, qkv_bias=bool(config.get("attention_bias", False)))
