"""Gemma 4 (text): layers of two attentions, the last ones on the keys and values of earlier ones, inputs by layer.

With `enable_moe_block` every layer has experts beside its MLP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models import rope
from tpu_tune.models.activations import check_activation
from tpu_tune.models.architecture import Architecture, LayerKind
from tpu_tune.models.families.gemma import FOUR_NORMS
from tpu_tune.models.families.gemma4_experts import with_experts
from tpu_tune.models.families.llama import NAMES

_LAYER_NAMES = dataclasses.replace(
    FOUR_NORMS, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", scalar="layer_scalar"
)
_LAYER_INPUT_NAMES = {
    "input_gate": "per_layer_input_gate",
    "input_projection": "per_layer_projection",
    "input_norm": "post_per_layer_input_norm",
}
_INPUT_NAMES = {
    "inputs_embed": "model.embed_tokens_per_layer",
    "inputs_projection": "model.per_layer_model_projection",
    "inputs_norm": "model.per_layer_projection_norm",
}

# What transformers takes where a config.json leaves a key out.
_GEMMA4 = {
    "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": None, "attention_k_eq_v": False,
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "hidden_size_per_layer_input": 256,
    "vocab_size_per_layer_input": 262144, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 512,
    "max_position_embeddings": 131072, "final_logit_softcapping": None, "num_key_value_heads": 4,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}  # fmt: skip
_UNIFIED = {**_GEMMA4, "hidden_size_per_layer_input": 0, "sliding_window": 1024, "max_position_embeddings": 262144}


def gemma4(config: Mapping[str, Any]) -> Architecture:
    """Gemma 4: plain norm weights, scores unscaled, values normed too, full layers with heads of their own size."""
    family = config["model_type"]
    defaults = _GEMMA4 if family == "gemma4_text" else _UNIFIED
    config = {**defaults, **config}
    config["rope_parameters"] = config["rope_parameters"] or defaults["rope_parameters"]
    if config.get("per_layer_config") is not None:  # transformers writes 05 where there are ten layers or more
        config["per_layer_config"] = {int(layer): sizes for layer, sizes in config["per_layer_config"].items()}
    if config.get("use_bidirectional_attention") == "all":
        raise UserError(f"use_bidirectional_attention='all' in the config of this {family} model is not implemented")
    bias = bool(config.get("attention_bias", False))
    per_layer = config["hidden_size_per_layer_input"] or 0
    return Architecture(
        family=family,
        names=dataclasses.replace(NAMES, **(_INPUT_NAMES if per_layer else {})),
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        layer_kinds=_layer_kinds(config),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        value_norm=True,
        activation=check_activation(config["hidden_activation"]),
        qkv_bias=bias,
        o_bias=bias,
        tied=bool(config.get("tie_word_embeddings", True)),
        embed_scale=math.sqrt(config["hidden_size"]),
        layer_input_size=per_layer,
        layer_input_vocab=config["vocab_size_per_layer_input"] if per_layer else 0,
        attention_scale=1.0,
        logit_soft_cap=config["final_logit_softcapping"],
        max_positions=config["max_position_embeddings"],
    )


def _layer_kinds(config: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    count = config["num_hidden_layers"]
    types = list(config.get("layer_types") or ["sliding_attention"] * count)
    if not config.get("layer_types"):
        types[5::6] = ["full_attention"] * (count // 6)
    types[-1] = "full_attention"
    own = count - config["num_kv_shared_layers"]  # layers with keys and values of their own
    if {*types[: max(own, 0)]} != {*types}:
        raise UserError(
            f"the config of this {config['model_type']} model: num_kv_shared_layers="
            f"{config['num_kv_shared_layers']} of {count} layers leaves no layer to share with"
        )
    kinds = [_layer_kind(config, types, layer, own) for layer in range(count)]
    return tuple(with_experts(config, kind) for kind in kinds) if config.get("enable_moe_block") else tuple(kinds)


def _layer_kind(config: Mapping[str, Any], types: list[str], layer: int, own: int) -> LayerKind:
    is_full, is_shared = types[layer] == "full_attention", layer >= own
    names = dataclasses.replace(_LAYER_NAMES, **(_LAYER_INPUT_NAMES if config["hidden_size_per_layer_input"] else {}))
    if is_shared:
        names = dataclasses.replace(names, k="", v="", k_norm="")
    elif is_full and config["attention_k_eq_v"]:
        names = dataclasses.replace(names, v="")
    # transformers 5.24 writes what differs from layer to layer into a table of its own.
    sizes = {"head_dim": config["head_dim"], "num_key_value_heads": config["num_key_value_heads"]}
    if config.get("per_layer_config") is not None:
        own_sizes = config["per_layer_config"].get(layer, {})
        if own_sizes.keys() - sizes.keys():
            raise UserError(
                f"per_layer_config sets {', '.join(own_sizes)} of layer {layer}: only {', '.join(sizes)} can"
            )
        sizes |= own_sizes
    elif is_full:
        sizes["head_dim"] = config["global_head_dim"]
        if config["attention_k_eq_v"]:
            sizes["num_key_value_heads"] = config["num_global_key_value_heads"] or config["num_key_value_heads"]
    return LayerKind(
        names,
        window=None if is_full else config["sliding_window"],
        rope=rope.from_config(config, sizes["head_dim"], layer_type=types[layer]),
        intermediate_size=config["intermediate_size"] * (2 if is_shared and config["use_double_wide_mlp"] else 1),
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        keys_from=own - 1 - types[:own][::-1].index(types[layer]) if is_shared else None,
    )
