"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.names import LayerNames, Names

NAMES = Names(
    embed="transformer.wte",
    positions="transformer.wpe",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    head="lm_head",
)
LAYER_NAMES = LayerNames(
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv="attn.c_attn",
    o="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
)


def gpt2(config: Mapping[str, Any]) -> Architecture:
    """Learned positions, one fused q|k|v projection, matrices stored as (in, out).

    Raises:
      UserError: scores scaled by the layer's number, or cross-attention.
    """
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if config.get(key):
            raise UserError(f"'{key}' is set in the config of this gpt2 model, and not implemented")
    width, heads = config["n_embd"], config["n_head"]
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=width,
        intermediate_size=config.get("n_inner") or 4 * width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        layer_kinds=(LayerKind(LAYER_NAMES),) * config["n_layer"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=check_activation(config.get("activation_function", "gelu_new")),
        fan_in_fan_out=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tied=bool(config.get("tie_word_embeddings", True)),
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
        max_positions=config.get("n_positions", 1024),
        default_targets=("c_attn",),
    )
