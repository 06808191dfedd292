"""The values of a Hugging Face config.json, held against what every family can work with before one reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.models.architecture import Architecture
from tpu_tune.models.values import FLAG, NOTHING, OBJECT, TEXT, check, listing, mapping, number, one_of, whole

MOST_LAYERS = 10_000
MOST_EXPERTS = 2**14
MOST_WIDE = 2**24  # of one dimension of a matrix
MOST_TOKENS = 2**28
MOST_POSITIONS = 2**40

_LAYERS, _WIDTH, _POSITIONS = whole(1, MOST_LAYERS), whole(1, MOST_WIDE), whole(1, MOST_POSITIONS)
_POSITIVE = number(0, above=True)
_TOKEN = whole(-1, MOST_TOKENS) | NOTHING  # -1: no such token (Llama 1)
_FACTORS = listing(_POSITIVE) | NOTHING
_FACTOR = number(0, 1e9, above=True) | NOTHING

KINDS = {
    "model_type": TEXT,
    "vocab_size": whole(1, MOST_TOKENS),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), _LAYERS),
    "num_decoder_layers": _LAYERS | NOTHING,
    "max_window_layers": whole(0, MOST_LAYERS) | NOTHING,
    "sliding_window_pattern": whole(1, MOST_LAYERS) | NOTHING,
    "no_rope_layer_interval": whole(1, MOST_LAYERS),
    "no_rope_layers": listing(FLAG) | NOTHING,
    **dict.fromkeys(
        ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"),
        _POSITIVE,
    ),
    **dict.fromkeys(("num_local_experts", "num_experts_per_tok"), whole(0, MOST_EXPERTS) | NOTHING),
    **dict.fromkeys(("n_routed_experts", "n_group", "topk_group"), whole(1, MOST_EXPERTS)),
    **dict.fromkeys(("num_experts", "top_k_experts"), whole(1, MOST_EXPERTS) | NOTHING),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "shared_intermediate_size"), whole(0, MOST_WIDE)),
    **dict.fromkeys(("decoder_sparse_step", "shared_expert_intermediate_size"), _WIDTH),
    "moe_intermediate_size": _WIDTH | NOTHING,
    "mlp_only_layers": listing(whole(0, MOST_LAYERS)) | NOTHING,
    **dict.fromkeys(("router_aux_loss_coef", "routed_scaling_factor"), number(0)),
    **dict.fromkeys(("clip_qkv", "swiglu_limit", "swiglu_alpha"), _POSITIVE | NOTHING),
    "linear_conv_kernel_dim": whole(2, 256),
    "full_attention_interval": whole(1, MOST_LAYERS),
    "position_embedding_type": TEXT | NOTHING,
    **dict.fromkeys(
        (
            "hidden_size", "intermediate_size", "num_attention_heads", "n_embd", "n_head", "ffn_dim", "d_model",
            "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets", "relative_attention_max_distance",
            "global_head_dim", "vocab_size_per_layer_input", "linear_key_head_dim", "linear_value_head_dim",
            "linear_num_key_heads", "linear_num_value_heads",
        ),
        _WIDTH,
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "n_inner", "rotary_dim", "word_embed_proj_dim",
                     "num_global_key_value_heads"), _WIDTH | NOTHING),
    **dict.fromkeys(("hidden_size_per_layer_input", "num_kv_shared_layers"), whole(0, MOST_WIDE) | NOTHING),
    "per_layer_config": mapping(OBJECT) | NOTHING,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), _POSITIONS),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window"), _POSITIONS | NOTHING),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), number(0, 1)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "rotary_emb_base", "query_pre_attn_scalar"), _POSITIVE),
    **dict.fromkeys(("rotary_pct", "partial_rotary_factor"), number(0, 1, above=True)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _POSITIVE | NOTHING),
    **dict.fromkeys(
        (
            "tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_parallel_residual",
            "qk_layernorm", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
            "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine",
            "use_bidirectional_attention", "scale_decoder_outputs", "is_encoder_decoder", "attention_out_bias",
            "use_qk_norm", "enable_moe_block", "use_double_wide_mlp", "attention_k_eq_v", "norm_topk_prob", "qkv_bias",
            "output_router_logits",
        ),
        FLAG | NOTHING,
    ),
    **dict.fromkeys(("hidden_act", "activation_function", "hidden_activation", "feed_forward_proj"), TEXT | NOTHING),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _TOKEN),
    "eos_token_id": _TOKEN | listing(whole(0, MOST_TOKENS)),
    "decoder_start_token_id": whole(0, MOST_TOKENS) | NOTHING,
    "layer_types": listing(one_of("full_attention", "sliding_attention", "attention", "linear_attention")) | NOTHING,
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config"), OBJECT | NOTHING),
}  # fmt: skip

_ROPE_KINDS = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    "rope_theta": _POSITIVE,
    "partial_rotary_factor": number(0, 1, above=True),
    "original_max_position_embeddings": _POSITIONS | NOTHING,
    **dict.fromkeys(("factor", "attention_factor"), _FACTOR),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), _POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow"), _FACTOR),
    **dict.fromkeys(("mscale", "mscale_all_dim", "llama_4_scaling_beta"), number(0, 1e9) | NOTHING),
    "truncate": FLAG,
    **dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
}

_GEMMA4 = {
    "use_bidirectional_attention": one_of("all", "vision") | NOTHING,
    **dict.fromkeys(("num_experts", "top_k_experts", "moe_intermediate_size"), _WIDTH | NOTHING),  # null: dense
}
_OWN_KINDS = {
    "qwen3_next": {"num_experts": whole(0, MOST_WIDE) | NOTHING},
    "exaone4": {"sliding_window_pattern": whole(1, MOST_LAYERS) | TEXT | NOTHING},  # such as LLLG
    "qwen2_moe": {"sliding_window": whole(0, MOST_POSITIONS) | NOTHING},  # what transformers 5 writes where it is off
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _GEMMA4),
}


def check_config(config: Mapping[str, Any]) -> None:
    """Hold a config's values against their kinds: types, ranges, and the lists that must fit one another.

    Raises:
      UserError: one does not; key and value are named.
    """
    where = f"the config of this {config.get('model_type')} model"
    check(config, KINDS | _OWN_KINDS.get(str(config.get("model_type")), {}), where)
    for key in ("rope_parameters", "rope_scaling"):
        settings = config.get(key) or {}
        check(settings, _ROPE_KINDS, f"{key} in {where}")
        for layer_type in ("full_attention", "sliding_attention"):
            if layer_type in settings:
                inner = settings[layer_type]
                check({layer_type: inner}, {layer_type: OBJECT}, f"{key} in {where}")
                check(inner, _ROPE_KINDS, f"{key}.{layer_type} in {where}")
    for layer, sizes in (config.get("per_layer_config") or {}).items():
        check(sizes, KINDS, f"per_layer_config.{layer} in {where}")
    kinds, layers = config.get("layer_types"), config.get("num_hidden_layers")
    if kinds and layers and len(kinds) != layers:
        raise UserError(f"{where}: 'layer_types' has {len(kinds)} entries for num_hidden_layers={layers}")


def check_architecture(architecture: Architecture) -> None:
    """Hold what a family made of a config together: what it derived is a number too, and fits.

    Raises:
      UserError: something does not.
    """
    where = f"the config of this {architecture.family} model"
    sizes = {
        name: getattr(architecture, name)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
    }
    check(sizes, dict.fromkeys(sizes, whole(1, MOST_TOKENS)), where)
    check({"max_positions": architecture.max_positions}, {"max_positions": whole(0, MOST_POSITIONS)}, where)
    experts = architecture.experts
    if experts and not 1 <= experts.per_token <= experts.count:
        raise UserError(f"{where}: it sends each token to {experts.per_token} of {experts.count} experts")
    if experts and (experts.count % experts.groups or experts.top_groups > experts.groups):
        raise UserError(
            f"{where}: {experts.count} experts do not make {experts.groups} groups of which a token has "
            f"{experts.top_groups}"
        )
    for kind in architecture.kinds:
        kv_heads, head_dim = architecture.heads(kind)
        if architecture.num_heads % kv_heads:
            raise UserError(f"{where}: {architecture.num_heads} heads cannot share {kv_heads} key and value heads")
        if kind.rope is not None and (kind.rope.dim % 2 or not 2 <= kind.rope.dim <= head_dim):
            raise UserError(
                f"{where}: it rotates {kind.rope.dim} elements of each head of {head_dim}; "
                "they must be two or more, even, and no more than the head has"
            )
    if architecture.encoder is not None:
        check_architecture(architecture.encoder)
