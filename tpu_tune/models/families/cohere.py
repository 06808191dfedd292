"""Cohere's Command R, Aya and Command R7B: `cohere` and `cohere2`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.llama import LAYER_NAMES, like_llama

_ONE_NORM = dataclasses.replace(LAYER_NAMES, mlp_norm="")

# What transformers takes where a config.json leaves a key out.
_COHERE = {
    "max_position_embeddings": 8192, "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
_COHERE2 = {**_COHERE, "sliding_window": 4096}


def cohere(config: Mapping[str, Any]) -> Architecture:
    """One LayerNorm without bias for attention and MLP, which run side by side; rotary on neighbours.

    Raises:
      UserError: norms of q and k, which have weights of their own for each head.
    """
    config = {**_COHERE, **config}
    if config.get("use_qk_norm"):
        raise UserError(f"'use_qk_norm' is set in the config of this {config['model_type']} model: not implemented")
    kind = LayerKind(_ONE_NORM, rope=_rotary(config, 500000.0))
    return _architecture(config, [kind] * config["num_hidden_layers"])


def cohere2(config: Mapping[str, Any]) -> Architecture:
    """Three layers with a window and rotary positions to each one without either."""
    config = {**_COHERE2, **config}
    pattern = config.get("sliding_window_pattern") or 4
    types = config.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    window, full = LayerKind(_ONE_NORM, config["sliding_window"], _rotary(config, 10000.0)), LayerKind(_ONE_NORM)
    return _architecture(config, [window if kind == "sliding_attention" else full for kind in types])


def _rotary(config: Mapping[str, Any], theta: float) -> rope.Rope:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return dataclasses.replace(rope.from_config(config, head_dim, theta), interleaved=True)


def _architecture(config: Mapping[str, Any], kinds: list[LayerKind]) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    return like_llama(
        {**config, "head_dim": None},
        kinds,
        norm="layer",
        norm_bias=False,
        norm_eps=config["layer_norm_eps"],
        residual="parallel",
        qkv_bias=bias,
        o_bias=bias,
        head_scale=config["logit_scale"],
    )
