"""ByteDance's Seed-OSS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.models.architecture import Architecture
from tpu_tune.models.families.llama import like_llama, same_layers

# What transformers takes where a config.json leaves a key out.
_SEED_OSS = {
    "max_position_embeddings": 524288, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
    "attention_out_bias": False, "mlp_bias": False,
}  # fmt: skip


def seed_oss(config: Mapping[str, Any]) -> Architecture:
    """Llama whose attention has biases on q, k and v, and a switch of its own for the output's."""
    config = {**_SEED_OSS, **config}
    return like_llama(
        config,
        same_layers(config),
        qkv_bias=bool(config["attention_bias"]),
        o_bias=bool(config["attention_out_bias"]),
        mlp_bias=bool(config["mlp_bias"]),
    )
