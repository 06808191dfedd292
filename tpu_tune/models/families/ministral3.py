"""The text model of Ministral 3 (arXiv:2601.08584)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.models.architecture import Architecture
from tpu_tune.models.families.llama import like_llama, same_layers

# What transformers takes where a config.json leaves a key out.
_MINISTRAL3 = {
    "max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "sliding_window": None,
}  # fmt: skip
_ROPE = {
    "rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def ministral3(config: Mapping[str, Any]) -> Architecture:
    """Mistral with yarn, whose rotated queries grow with the logarithm of their position (`llama_4_scaling_beta`)."""
    config = {**_MINISTRAL3, **config}
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        config["rope_parameters"] = _ROPE
    return like_llama(config, same_layers(config, config["sliding_window"]))
