"""T5 1.0 and 1.1, FLAN-T5 (arXiv:1910.10683, arXiv:2210.11416)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind, RelativePositions
from tpu_tune.models.names import LayerNames, Names

_ATTENTION = "layer.0.SelfAttention"


def t5(config: Mapping[str, Any]) -> Architecture:
    """Encoder and decoder share the embedding; positions are a bias on the scores, which are not scaled.

    Raises:
      UserError: an MLP that is neither an activation nor `gated-` one.
    """
    kind = config.get("feed_forward_proj", "relu")
    gated, _, activation = kind.rpartition("-")
    if gated not in ("", "gated"):
        raise UserError(f"feed_forward_proj '{kind}' is not known; it is an activation's name, or gated-NAME")
    if kind == "gated-gelu":  # as transformers reads it
        activation = "gelu_new"
    # T5 1.0 scales the decoder's states before its tied head; 1.1 has a head of its own and does not. transformers 5
    # writes tie_word_embeddings=true for both, keeps scale_decoder_outputs beside it, and ties where the files hold no
    # head (`params.with_stored_head`).
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    width, heads = config["d_model"], config["num_heads"]
    encoder = Architecture(
        family=config["model_type"],
        names=_names("encoder"),
        vocab_size=config["vocab_size"],
        hidden_size=width,
        intermediate_size=config["d_ff"],
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config["d_kv"],
        layer_kinds=(LayerKind(_layer_names(1, bool(gated))),) * config["num_layers"],
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        activation=check_activation(activation),
        attention_scale=1.0,
        relative=RelativePositions(
            config.get("relative_attention_num_buckets", 32), config.get("relative_attention_max_distance", 128)
        ),
        causal=False,
        default_targets=("q", "v"),
    )
    cross = "layer.1.EncDecAttention"
    layer_names = dataclasses.replace(
        _layer_names(2, bool(gated)),
        cross_norm="layer.1.layer_norm",
        cross_q=f"{cross}.q",
        cross_k=f"{cross}.k",
        cross_v=f"{cross}.v",
        cross_o=f"{cross}.o",
    )
    start = config.get("decoder_start_token_id")
    return dataclasses.replace(
        encoder,
        names=dataclasses.replace(_names("decoder"), head="lm_head"),
        layer_kinds=(LayerKind(layer_names),) * (config.get("num_decoder_layers") or config["num_layers"]),
        tied=config.get("tie_word_embeddings") is not False,
        head_scale=width**-0.5 if scaled else 1.0,
        causal=True,
        encoder=encoder,
        start_token=(config.get("pad_token_id") or 0) if start is None else start,
    )


def _names(stack: str) -> Names:
    return Names(
        embed="shared",
        layers=f"{stack}.block",
        final_norm=f"{stack}.final_layer_norm",
        head="",
        relative_bias=f"{stack}.block.0.{_ATTENTION}.relative_attention_bias",
    )


def _layer_names(mlp: int, gated: bool) -> LayerNames:
    """Return the names in a layer whose MLP is the `mlp`-th of its parts."""
    dense = f"layer.{mlp}.DenseReluDense"
    return LayerNames(
        attention_norm="layer.0.layer_norm",
        mlp_norm=f"layer.{mlp}.layer_norm",
        q=f"{_ATTENTION}.q",
        k=f"{_ATTENTION}.k",
        v=f"{_ATTENTION}.v",
        o=f"{_ATTENTION}.o",
        gate=f"{dense}.wi_0" if gated else "",
        up=f"{dense}.wi_1" if gated else f"{dense}.wi",
        down=f"{dense}.wo",
    )
