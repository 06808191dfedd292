"""EXAONE 4 (arXiv:2507.11407)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.models import rope
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.llama import NORMS_AFTER, head_dim_of, like_llama

# What transformers takes where a config.json leaves a key out.
_EXAONE4 = {
    "max_position_embeddings": 2048, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096,
    "sliding_window_pattern": 4,
}  # fmt: skip


def exaone4(config: Mapping[str, Any]) -> Architecture:
    """Norms of what attention and MLP add, none of what they read, and of each head of q and k.

    With a window, the layers that have none have no rotary positions either.
    """
    config = {**_EXAONE4, **config}
    window, rotary = config["sliding_window"], rope.from_config(config, head_dim_of(config))
    sliding = LayerKind(NORMS_AFTER, window, rotary)
    full = LayerKind(NORMS_AFTER, rope=None if window else rotary)
    kinds = [sliding if kind == "sliding_attention" and window else full for kind in _layer_types(config)]
    return like_llama(config, kinds)


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """Return the config's layer types; else a pattern such as LLLG, or every n-th layer without a window."""
    if config.get("layer_types"):
        return config["layer_types"]
    pattern = config["sliding_window_pattern"] or 1
    letters = pattern if isinstance(pattern, str) else "L" * (pattern - 1) + "G"
    return [
        "sliding_attention" if letters[layer % len(letters)] == "L" else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]
