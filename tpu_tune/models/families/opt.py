"""OPT (arXiv:2205.01068)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.names import LayerNames, Names

NAMES = Names(
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
)
LAYER_NAMES = LayerNames(
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.out_proj",
    up="fc1",
    down="fc2",
)


def opt(config: Mapping[str, Any]) -> Architecture:
    """Learned positions that begin at row 2, ReLU; OPT-350m norms its sums and embeds in fewer dimensions.

    Raises:
      UserError: LayerNorms without weights.
    """
    if not config.get("layer_norm_elementwise_affine", True):
        raise UserError("'layer_norm_elementwise_affine' is false in the config of this opt model: not implemented")
    width = config["hidden_size"]
    embed_size = config.get("word_embed_proj_dim") or width
    norm_first = config.get("do_layer_norm_before", True)
    names = NAMES
    if not norm_first or config.get("_remove_final_layer_norm"):
        names = dataclasses.replace(names, final_norm="")
    if embed_size != width:
        names = dataclasses.replace(
            names, project_in="model.decoder.project_in", project_out="model.decoder.project_out"
        )
    bias = config.get("enable_bias", True)
    heads = config["num_attention_heads"]
    return Architecture(
        family=config["model_type"],
        names=names,
        vocab_size=config["vocab_size"],
        hidden_size=width,
        intermediate_size=config["ffn_dim"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        layer_kinds=(LayerKind(LAYER_NAMES),) * config["num_hidden_layers"],
        norm="layer",
        norm_eps=1e-5,
        norm_first=norm_first,
        activation=check_activation(config.get("activation_function", "relu")),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
        embed_size=embed_size if embed_size != width else 0,
        max_positions=config.get("max_position_embeddings", 2048),
        position_offset=2,
    )
