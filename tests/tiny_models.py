"""Tiny random models for the tests: a table of configs, and weights that NumPy makes from each tensor's name.

A new family is new rows in `CONFIGS`; `make_goldens.py` asks torch `transformers` for their logits.
"""

from __future__ import annotations

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tpu_tune.checkpoints.params import load_params, torch_shapes
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.models import Decoder, Execution, architecture, encode

GOLDENS = pathlib.Path(__file__).parent / "goldens"
ENCODER_TOKENS = 14
TOKENS = 20  # longer than every window and every trained length below

_SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def _llama(**changes):
    return {"model_type": "llama", "hidden_act": "silu", **_SIZES, **changes}


def _qwen(family, **changes):
    return {"model_type": family, "hidden_act": "silu", **_SIZES, **changes}


def _like_llama(family, **changes):
    return {"model_type": family, **_SIZES, "pad_token_id": 0, **changes}


def _neox(**changes):
    sizes = {key: value for key, value in _SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
    return {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        **sizes,
        **changes,
    }


def _gpt(family, **changes):
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "layer_norm_epsilon": 1e-5}
    return {"model_type": family, **sizes, "bos_token_id": 1, "eos_token_id": 2, **_NO_DROPOUT, **changes}


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _opt(**changes):
    return {
        "model_type": "opt",
        "vocab_size": 96,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }


def _gemma(family, **changes):
    return {
        "model_type": family,
        **_SIZES,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        **changes,
    }


def _gemma4(types, **changes):
    """`types`: a letter a layer, s for a window and f for full attention."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    return _gemma(
        "gemma4_text",
        num_hidden_layers=len(types),
        layer_types=[names[kind] for kind in types],
        **{
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 5,
            "final_logit_softcapping": 20.0,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 96,
            "rope_parameters": _GEMMA4_ROPE,
            **changes,
        },
    )


def _phi(family, **changes):
    sizes = {key: value for key, value in _SIZES.items() if key != "rms_norm_eps"}
    return {"model_type": family, **sizes, "pad_token_id": 0, **changes}


def _qwen3_5(family, **changes):
    sizes = {
        "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
        "linear_value_head_dim": 6, "mlp_only_layers": [], "num_hidden_layers": 4,
    }  # fmt: skip
    return {"model_type": family, **_SIZES, "pad_token_id": 0, "hidden_act": "silu", **sizes, **changes}


def _t5(**changes):
    return {
        "model_type": "t5",
        "vocab_size": 96,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **changes,
    }


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
_FACTORS = {
    "embedding_multiplier": 3.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 4.0,
}  # fmt: skip
_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GEMMA3_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 300.0},
}
_LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 2.0, 4.0, 8.0]}

CONFIGS = {
    "llama1": _llama(num_key_value_heads=4),
    "llama2": _llama(rope_theta=10000.0),
    "llama3": _llama(rope_theta=500000.0, rope_scaling=_LLAMA3),
    "llama3_parameters": _llama(rope_parameters={"rope_theta": 500000.0, **_LLAMA3}),
    "llama_linear": _llama(rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_linear_parameters": _llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}),
    "llama_dynamic": _llama(max_position_embeddings=8, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "llama_tied": _llama(tie_word_embeddings=True),
    "llama_biases": _llama(attention_bias=True, mlp_bias=True, head_dim=16),
    "mistral_window": _qwen("mistral", sliding_window=5),
    "mistral_no_window": _qwen("mistral", sliding_window=None, head_dim=12),
    "qwen2": _qwen("qwen2", rope_theta=1000000.0, use_sliding_window=False, tie_word_embeddings=True),
    "qwen2_upper_windows": _qwen(
        "qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=6, max_window_layers=2
    ),
    "qwen3": _qwen("qwen3", head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "qwen3_alternating": _qwen(
        "qwen3",
        head_dim=8,
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=4,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "neox_parallel": _neox(use_parallel_residual=True),
    "neox_sequential": _neox(use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=20000),
    "neox_full_rotary": _neox(rotary_pct=1.0, attention_bias=False, tie_word_embeddings=True),
    "neox_parameters": _neox(
        rope_parameters={"rope_type": "default", "rope_theta": 15000.0, "partial_rotary_factor": 0.5}
    ),
    "gptj": _gpt("gptj", rotary_dim=4),
    "gptj_full_rotary": _gpt("gptj", rotary_dim=8, n_inner=48, activation_function="relu"),
    "gpt2": _gpt("gpt2"),
    "gpt2_unscaled": _gpt("gpt2", scale_attn_weights=False, n_inner=48, tie_word_embeddings=False),
    "opt": _opt(),
    "opt_350m": _opt(do_layer_norm_before=False, word_embed_proj_dim=16),
    "gemma": _gemma("gemma", hidden_act="gelu_pytorch_tanh"),
    "gemma_legacy_activation": _gemma("gemma", hidden_act="gelu", num_key_value_heads=1),
    "gemma2": _gemma(
        "gemma2", query_pre_attn_scalar=24, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma2_no_caps": _gemma(
        "gemma2",
        num_hidden_layers=3,
        query_pre_attn_scalar=16,
        sliding_window=6,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
    "gemma3": _gemma(
        "gemma3_text",
        num_hidden_layers=4,
        query_pre_attn_scalar=16,
        sliding_window=5,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        sliding_window_pattern=3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3_parameters": _gemma(
        "gemma3_text",
        num_hidden_layers=4,
        query_pre_attn_scalar=32,
        sliding_window=4,
        layer_types=_GEMMA3_TYPES,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 200000.0},
        },
    ),
    "phi": _phi("phi", partial_rotary_factor=0.5, num_key_value_heads=4, layer_norm_eps=1e-5),
    "phi_head_norms": _phi(
        "phi",
        layer_norm_eps=1e-5,
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.25},
    ),
    "phi3": _phi("phi3", rms_norm_eps=1e-5, sliding_window=6),
    "phi3_longrope_short": _phi(
        "phi3", original_max_position_embeddings=32, rope_scaling={"type": "longrope", **_LONGROPE}
    ),
    "phi3_longrope_long": _phi(
        "phi3", original_max_position_embeddings=16, rope_scaling={"type": "longrope", **_LONGROPE}
    ),
    "llama_yarn": _llama(rope_parameters={**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
    "qwen3_yarn": _qwen("qwen3", head_dim=16, rope_scaling={**_YARN, "type": "yarn", "attention_factor": 1.4}),
    "gemma4": _gemma4("ssfssf", hidden_size_per_layer_input=8, num_kv_shared_layers=3),
    "gemma4_wide": _gemma4(
        "sfsfsfsf",
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=4,
        use_double_wide_mlp=True,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
    "gemma4_unified": {
        key: value
        for key, value in _gemma4(
            "ssf", attention_k_eq_v=True, num_global_key_value_heads=1, tie_word_embeddings=False
        ).items()
        if "per_layer_input" not in key
    }
    | {"model_type": "gemma4_unified_text"},
    "gemma4_experts": _gemma4(
        "ssf",
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=5,
        top_k_experts=2,
        moe_intermediate_size=24,
    ),
    # All layers have the same leaves, and those whose keys and values are shared are not the last of their scan.
    "gemma4_alike": _gemma4(
        "sfffsf", global_head_dim=8, num_kv_shared_layers=2, attention_bias=True, hidden_size_per_layer_input=4
    ),
    "smollm3": _like_llama("smollm3", num_hidden_layers=4, rope_theta=5000.0, tie_word_embeddings=True),
    "smollm3_windows": _like_llama(
        "smollm3",
        num_hidden_layers=3,
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
        mlp_bias=True,
    ),
    "olmo2": _like_llama("olmo2"),
    "olmo2_biases": _like_llama("olmo2", num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True),
    "olmo3": _like_llama(
        "olmo3", num_hidden_layers=4, sliding_window=5, rope_theta=500000.0, rope_scaling={**_YARN, "truncate": False}
    ),
    "olmo3_parameters": _like_llama(
        "olmo3",
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": _YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
        tie_word_embeddings=True,
    ),
    "granite": _like_llama("granite", **_FACTORS, tie_word_embeddings=True),
    "granite_biases": _like_llama("granite", attention_bias=True, mlp_bias=True, attention_multiplier=0.3),
    "granite4": _like_llama(
        "granitemoehybrid",
        **_FACTORS,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=8,  # transformers checks it without any such layer
        layer_types=["attention"] * 2,
        shared_intermediate_size=48,
        position_embedding_type="rope",
    ),
    "granite4_no_positions": _like_llama(
        "granitemoehybrid",
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=8,
        layer_types=["full_attention"] * 2,
        shared_intermediate_size=40,
        attention_multiplier=0.3,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "glm": _like_llama("glm", head_dim=16),
    "glm_no_bias": _like_llama(
        "glm", head_dim=8, attention_bias=False, tie_word_embeddings=True, partial_rotary_factor=0.75
    ),
    "glm4": _like_llama("glm4", head_dim=16),
    "glm4_tied": _like_llama(
        "glm4",
        head_dim=8,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
    ),
    "ministral3": _like_llama(
        "ministral3",
        head_dim=16,
        rope_parameters={
            **_YARN,
            "original_max_position_embeddings": 4,
            "beta_fast": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.8,
        },
    ),  # fmt: skip
    "ministral3_window": _like_llama(
        "ministral3",
        head_dim=8,
        sliding_window=5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
            "original_max_position_embeddings": 6,
            "llama_4_scaling_beta": 0.5,
        },
    ),  # fmt: skip
    "cohere": _like_llama("cohere", tie_word_embeddings=True, layer_norm_eps=1e-5),
    "cohere_untied": _like_llama("cohere", attention_bias=True, logit_scale=0.5, rope_theta=5000.0),
    "cohere2": _like_llama("cohere2", num_hidden_layers=4, sliding_window=5, tie_word_embeddings=True),
    "cohere2_untied": _like_llama(
        "cohere2",
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
        attention_bias=True,
        logit_scale=0.5,
    ),
    "seed_oss": _like_llama("seed_oss", head_dim=16),
    "seed_oss_biases": _like_llama(
        "seed_oss",
        head_dim=8,
        attention_bias=False,
        attention_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "exaone4": _like_llama("exaone4", num_hidden_layers=4, sliding_window=5),
    "exaone4_no_window": _like_llama(
        "exaone4",
        sliding_window=None,
        sliding_window_pattern=None,
        layer_types=["full_attention"] * 2,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, **_LLAMA3},
    ),
    "nanochat": _like_llama("nanochat", hidden_act="relu2"),
    "nanochat_tied": _like_llama(
        "nanochat", attention_bias=True, tie_word_embeddings=True, final_logit_softcapping=None, rope_theta=5000.0
    ),
    "qwen3_5": _qwen3_5("qwen3_5_text", full_attention_interval=2),
    "qwen3_5_tied": _qwen3_5(
        "qwen3_5_text",
        num_hidden_layers=3,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_conv_kernel_dim=3,
        attention_bias=True,
        tie_word_embeddings=True,
        layer_types=["full_attention", "linear_attention", "linear_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    ),
    "qwen3_5_moe": _qwen3_5(
        "qwen3_5_moe_text",
        **_EXPERTS,
        shared_expert_intermediate_size=24,
        num_hidden_layers=2,
        full_attention_interval=2,
    ),
    "qwen3_next_experts": _qwen3_5(
        "qwen3_next",
        **_EXPERTS,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
        mlp_only_layers=[1],
        num_hidden_layers=3,
        full_attention_interval=3,
        tie_word_embeddings=True,
    ),
    "qwen3_next": _qwen3_5(
        "qwen3_next", num_experts=0, num_hidden_layers=2, full_attention_interval=2, tie_word_embeddings=True
    ),
    "qwen3_next_dense_layers": _qwen3_5(
        "qwen3_next",
        mlp_only_layers=[0, 1, 2, 3],
        partial_rotary_factor=0.75,
        linear_num_key_heads=1,
        linear_num_value_heads=3,
    ),
    "mixtral": _like_llama("mixtral", num_local_experts=4, num_experts_per_tok=2, rope_theta=1e6),
    "mixtral_window": _like_llama(
        "mixtral", num_local_experts=3, num_experts_per_tok=1, sliding_window=5, head_dim=16, tie_word_embeddings=True
    ),
    "qwen2_moe": _like_llama(
        "qwen2_moe",
        **_EXPERTS,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        shared_expert_intermediate_size=40,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=3,
    ),
    "qwen2_moe_renormalized": _like_llama(
        "qwen2_moe",
        **_EXPERTS,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        qkv_bias=False,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": _like_llama("qwen3_moe", **_EXPERTS, head_dim=16, norm_topk_prob=True),
    "qwen3_moe_mixed": _like_llama(
        "qwen3_moe",
        **_EXPERTS,
        head_dim=8,
        num_hidden_layers=4,
        mlp_only_layers=[0, 2],
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        tie_word_embeddings=True,
    ),
    "olmoe": _like_llama("olmoe", num_experts=6, num_experts_per_tok=3, clip_qkv=0.8),
    "olmoe_renormalized": _like_llama(
        "olmoe", num_experts=4, num_experts_per_tok=2, norm_topk_prob=True, attention_bias=True, num_key_value_heads=4
    ),
    "granitemoe": _like_llama("granitemoe", **_FACTORS, num_local_experts=5, num_experts_per_tok=2),
    "granitemoe_tied": _like_llama(
        "granitemoe",
        num_local_experts=4,
        num_experts_per_tok=3,
        attention_multiplier=0.3,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    "granitemoeshared": _like_llama(
        "granitemoeshared", **_FACTORS, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24
    ),
    "granitemoeshared_none": _like_llama(
        "granitemoeshared", num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.3
    ),
    "glm4_moe": _like_llama(
        "glm4_moe",
        head_dim=16,
        num_hidden_layers=3,
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "glm4_moe_plain": _like_llama(
        "glm4_moe",
        head_dim=8,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=2,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        tie_word_embeddings=True,
    ),
    "gpt_oss": _like_llama(
        "gpt_oss",
        hidden_size=64,
        intermediate_size=32,
        head_dim=16,
        num_hidden_layers=4,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=5,
        swiglu_limit=1.0,
        rope_theta=5000.0,
        rope_scaling={**_YARN, "original_max_position_embeddings": 8, "beta_fast": 4.0, "truncate": False},
    ),
    "t5": _t5(),
    "t5_gated": _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=3),
}
FAMILY_CASES = [
    "llama2", "mistral_window", "qwen2_upper_windows", "qwen3_alternating", "neox_parallel", "gptj", "gpt2", "opt_350m",
    "gemma", "gemma2", "gemma3", "gemma4", "gemma4_unified", "phi", "phi3", "smollm3", "olmo2", "olmo3", "granite",
    "granite4", "glm", "glm4", "ministral3", "cohere", "cohere2", "seed_oss", "exaone4", "nanochat", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "glm4_moe", "gpt_oss", "qwen3_5",
    "qwen3_5_moe", "qwen3_next", "t5",
]  # fmt: skip


# Families and variants whose tests of gradients, packing and generation show what the others' show.
SELDOM = (
    "gemma", "gemma4_unified", "smollm3", "olmo2", "granite4", "glm", "ministral3", "cohere", "seed_oss", "exaone4",
    "nanochat",
    "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared", "glm4_moe", "mixtral_window", "qwen2_moe_renormalized",
    "qwen3_moe_mixed", "olmoe_renormalized", "granitemoe_tied", "granitemoeshared_none", "glm4_moe_plain",
    "qwen3_next", "qwen3_5_moe", "qwen3_next_experts",
)  # fmt: skip


def seldom_slow(cases):
    """Return pytest parameters: those in `SELDOM` run with `-m slow`."""
    return mostly_slow(cases, [case for case in cases if case not in SELDOM])


def mostly_slow(cases, often):
    """Return pytest parameters: `often` run always, the other cases with `-m slow`."""
    import pytest

    return [case if case in often else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def input_ids(case="", rows=2, length=TOKENS):
    """Return (rows, length) token ids that depend on the case's name alone."""
    return np.random.default_rng(zlib.crc32(case.encode())).integers(3, _SIZES["vocab_size"], (rows, length))


def weights(config):
    """Return Hugging Face tensor name -> float32 array in torch layout; large enough that nothing is nearly linear."""
    tensors = {}
    for name, shape in torch_shapes(architecture(config)).items():
        random = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if any(part in name for part in ("embed", "wte", "wpe", "shared")):
            scale, shift = 1.0, 0.0
        elif (("norm" in name or ".ln_" in name) and name.endswith(".weight")) or name.endswith("layer_scalar"):
            scale, shift = 0.2, 1.0
        else:
            scale, shift = (1.5 / np.sqrt(shape[-1]) if len(shape) >= 2 else 0.2), 0.0
        if name.endswith("Attention.q.weight"):  # T5 leaves its scores unscaled and q small instead
            scale /= np.sqrt(config["d_kv"])
        sharp = config["model_type"].startswith("gemma4") and not config.get("enable_moe_block")
        if sharp and name.endswith("q_norm.weight"):  # and so does Gemma 4
            scale, shift = scale / 4, shift / 4
        tensors[name] = (random * scale + shift).astype(np.float32)
    return tensors


def source(config, tensors=None):
    """Return a weight source over tensors in memory."""
    tensors = weights(config) if tensors is None else tensors
    shapes = {name: value.shape for name, value in tensors.items()}
    return WeightSource("tiny", dict(config), shapes, tensors.__getitem__, lambda: None, "tiny")


def load(config):
    """Return (architecture, parameter tree)."""
    arch = architecture(config)
    return arch, load_params(source(config), arch)


def write(directory, config):
    """Write a model directory as Hugging Face lays it out; return it as text."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights(config), directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def encoder_input(case, rows=2):
    """Return the encoder's (ids, mask) of an encoder-decoder's case; the last row is padded."""
    ids = input_ids(f"{case}/encoder", rows, ENCODER_TOKENS)
    mask = np.ones_like(ids)
    mask[-1, -4:] = 0
    return ids, mask


def torch_model(directory):
    """Load a directory with torch transformers, in float32; nothing may be missing or left over."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    is_t5 = AutoConfig.from_pretrained(directory).is_encoder_decoder
    model, info = (AutoModelForSeq2SeqLM if is_t5 else AutoModelForCausalLM).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def torch_logits(model, ids, encoder=None):
    """Return a torch model's float32 logits as NumPy; `encoder` is `encoder_input`'s of an encoder-decoder."""
    import torch

    ids, inputs = torch.as_tensor(np.asarray(ids)), {}
    if encoder is None:
        inputs["input_ids"] = ids
    else:
        inputs["input_ids"], inputs["attention_mask"] = (torch.as_tensor(part) for part in encoder)
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.float().numpy()


def torch_logits_of(case, model):
    """Return a torch model's logits of the case's input."""
    encoder = encoder_input(case) if CONFIGS[case]["model_type"] == "t5" else None
    return torch_logits(model, input_ids(case), encoder)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _logits(arch, params, ids, encoder, execution):
    encoder_output = encode(arch, params, execution, *encoder) if encoder else None
    return Decoder(arch, params, execution)(ids, encoder_output=encoder_output)


def logits(arch, params, ids, encoder=None, **execution):
    """Return our float32 logits."""
    ids, encoder = jax.tree.map(lambda array: jnp.asarray(array, jnp.int32), (ids, encoder))
    return np.asarray(_logits(arch, params, ids, encoder, Execution(**execution)))


def logits_of(case, arch, params, **execution):
    """Return our logits of the case's input."""
    return logits(arch, params, input_ids(case), encoder_input(case) if arch.encoder else None, **execution)


def difference(found, expected):
    """Return max|found - expected| / max|expected|, the measure of `within 1e-4`."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()
