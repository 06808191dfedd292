"""GPT-J 6B (github.com/kingoflolz/mesh-transformer-jax)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.names import LayerNames, Names
from tpu_tune.models.rope import Rope

NAMES = Names(
    embed="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    head="lm_head",
)
LAYER_NAMES = LayerNames(
    attention_norm="ln_1",
    mlp_norm="",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    o="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
)


def gptj(config: Mapping[str, Any]) -> Architecture:
    """One LayerNorm for attention and MLP, which run side by side; rotary on neighbours of part of each head."""
    width, heads = config["n_embd"], config["n_head"]
    head_dim = width // heads
    rotary = Rope(dim=config.get("rotary_dim", 64) or head_dim, interleaved=True)
    return Architecture(
        family=config["model_type"],
        names=NAMES,
        vocab_size=config["vocab_size"],
        hidden_size=width,
        intermediate_size=config.get("n_inner") or 4 * width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        layer_kinds=(LayerKind(LAYER_NAMES, rope=rotary),) * config["n_layer"],
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=check_activation(config.get("activation_function", "gelu_new")),
        residual="parallel",
        mlp_bias=True,
        head_bias=True,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config.get("n_positions", 2048),
    )
