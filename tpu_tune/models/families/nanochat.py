"""Karpathy's nanochat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.families.llama import LAYER_NAMES, NAMES, head_dim_of, like_llama, same_layers

_LAYER = dataclasses.replace(
    LAYER_NAMES, gate="", up="mlp.fc1", down="mlp.fc2", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"
)

# What transformers takes where a config.json leaves a key out.
_NANOCHAT = {"max_position_embeddings": 2048, "hidden_act": "relu2", "final_logit_softcapping": 15.0}


def nanochat(config: Mapping[str, Any]) -> Architecture:
    """Norms without weights, also of the embedding's rows and of rotated q and k; squared ReLU; angles negative."""
    config = {**_NANOCHAT, **config}
    rotary = dataclasses.replace(rope.from_config(config, head_dim_of(config)), clockwise=True)
    bias = bool(config.get("attention_bias", False))
    made = like_llama(
        config,
        same_layers(config, names=_LAYER, rotary=rotary),
        norm_weights=False,
        qk_norm_last=True,
        qkv_bias=bias,
        o_bias=bias,
        logit_soft_cap=config["final_logit_softcapping"],
    )
    return dataclasses.replace(made, names=dataclasses.replace(NAMES, embed_norm=NAMES.final_norm))
