"""Published models by name, so that a job can be planned before anything is downloaded.

Each entry has the keys of the model's config.json on the Hugging Face hub that matter here; a preset's name is a valid
`model.path` for a plan. The tests compare the resulting parameter counts with the published ones.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _llama(width: int, inner: int, layers: int, heads: int, kv_heads: int = 0, **changes: Any) -> Config:
    return {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **changes,
    }


def _llama3(width: int, inner: int, layers: int, heads: int, **changes: Any) -> Config:
    sizes = {"vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    return _llama(width, inner, layers, heads, 8, **{**sizes, **changes})


def _llama31(factor: float = 8.0, **changes: Any) -> Config:
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return {"max_position_embeddings": 131072, "rope_scaling": scaling, **changes}


def _qwen(family: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> Config:
    sizes = {"vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0}
    return _llama(
        width, inner, layers, heads, kv_heads, model_type=family, use_sliding_window=False, **sizes, **changes
    )


def _neox(width: int, inner: int, layers: int, heads: int, vocab: int, **changes: Any) -> Config:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        **changes,
    }


def _gpt2(width: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
    }


def _opt(width: int, layers: int, heads: int) -> Config:
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": width,
        "ffn_dim": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": width,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    }


def _gemma(family: str, width: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> Config:
    return {
        "model_type": family,
        "vocab_size": 256000,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **changes,
    }


def _gemma3(width: int, inner: int, layers: int, heads: int, kv_heads: int, window: int, **changes: Any) -> Config:
    sizes = {"vocab_size": 262144, "max_position_embeddings": 32768, "rope_theta": 1000000.0}
    sizes |= {"rope_local_base_freq": 10000.0, "sliding_window": window, "sliding_window_pattern": 6}
    return _gemma("gemma3_text", width, inner, layers, heads, kv_heads, **{**sizes, **changes})


def _gemma4(width: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> Config:
    text = {
        "vocab_size": 262144,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 262144,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        **changes,
    }
    return {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", **text}}


def _gemma3_multimodal(width: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> Config:
    """Their text models: the vision tower is neither loaded nor trained."""
    sizes = {"vocab_size": 262208, "max_position_embeddings": 131072, **changes}
    scaling = {"rope_type": "linear", "factor": 8.0}
    text = _gemma3(width, inner, layers, heads, kv_heads, 1024, rope_scaling=scaling, **sizes)
    return {"model_type": "gemma3", "text_config": text}


def _phi3(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, window: int | None) -> Config:
    return _llama(
        width,
        inner,
        layers,
        heads,
        kv_heads,
        model_type="phi3",
        vocab_size=vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        sliding_window=window,
    )


def _granite(attention: float, logits: float) -> Config:
    return {
        "max_position_embeddings": 131072,
        "rope_theta": 10000000.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": attention,
        "residual_multiplier": 0.22,
        "logits_scaling": logits,
        "tie_word_embeddings": True,
    }


def _qwen3_5(width: int, inner: int, layers: int, heads: int, value_heads: int, **changes: Any) -> Config:
    """The text models, without the vision tower and the head for further tokens; sizes as on their model cards."""
    rotary = {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25}
    sizes = {"vocab_size": 248320, "max_position_embeddings": 262144, "head_dim": 256}
    text = _llama(
        width, inner, layers, heads, 4, model_type="qwen3_5_text", linear_num_value_heads=value_heads, **sizes
    )
    return {"model_type": "qwen3_5", "text_config": {**text, "rope_parameters": rotary, **changes}}


def _ministral3(width: int, inner: int, layers: int, **changes: Any) -> Config:
    """The text model, without the vision tower; its rotary settings are the family's own."""
    sizes = {"vocab_size": 131072, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5}
    return _llama(width, inner, layers, 32, 8, model_type="ministral3", **sizes, **changes)


def _glm(family: str, **changes: Any) -> Config:
    """GLM-4 9B, of 2024 and of 2025."""
    sizes = {"vocab_size": 151552, "head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": True}
    return _llama(4096, 13696, 40, 32, 2, model_type=family, **sizes, **changes)


def _cohere(width: int, inner: int, layers: int, heads: int, kv_heads: int, **changes: Any) -> Config:
    sizes = {"vocab_size": 256000, "layer_norm_eps": 1e-5, "tie_word_embeddings": True}
    return _llama(width, inner, layers, heads, kv_heads, **sizes, **changes)


def _t5(width: int, inner: int, layers: int, heads: int, head_dim: int, gated: bool) -> Config:
    return {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_ff": inner,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "d_kv": head_dim,
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }


PRESETS: dict[str, Config] = {
    # Llama 1 and 2 (arXiv:2302.13971, table 2; arXiv:2307.09288)
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-33b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64, rms_norm_eps=1e-5),
    "llama-2-7b": _llama(4096, 11008, 32, 32, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-2-13b": _llama(5120, 13824, 40, 40, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, max_position_embeddings=4096, rms_norm_eps=1e-5),
    # Llama 3 (arXiv:2407.21783, table 3)
    "llama-3-8b": _llama3(4096, 14336, 32, 32),
    "llama-3-70b": _llama3(8192, 28672, 80, 64),
    "llama-3.1-8b": _llama3(4096, 14336, 32, 32, **_llama31()),
    "llama-3.1-70b": _llama3(8192, 28672, 80, 64, **_llama31()),
    "llama-3.2-1b": _llama3(2048, 8192, 16, 32, head_dim=64, **_llama31(32.0, tie_word_embeddings=True)),
    "llama-3.2-3b": _llama3(3072, 8192, 28, 24, head_dim=128, **_llama31(32.0, tie_word_embeddings=True)),
    "smollm2-135m": _llama(
        576,
        1536,
        30,
        9,
        3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "mistral-7b": _llama(
        4096,
        14336,
        32,
        32,
        8,
        model_type="mistral",
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    # Qwen (arXiv:2412.15115, arXiv:2505.09388)
    "qwen2.5-0.5b": _qwen("qwen2", 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "qwen2.5-7b": _qwen("qwen2", 3584, 18944, 28, 28, 4) | {"vocab_size": 152064, "max_position_embeddings": 131072},
    "qwen3-0.6b": _qwen("qwen3", 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
    "qwen3-8b": _qwen("qwen3", 4096, 12288, 36, 32, 8, head_dim=128) | {"max_position_embeddings": 40960},
    "qwen3-14b": _qwen("qwen3", 5120, 17408, 40, 40, 8, head_dim=128) | {"max_position_embeddings": 40960},
    "qwen3-32b": _qwen("qwen3", 5120, 25600, 64, 64, 8, head_dim=128) | {"max_position_embeddings": 40960},
    "qwen3.5-4b": _qwen3_5(2560, 9216, 32, 16, 32, tie_word_embeddings=True),
    "qwen3.5-9b": _qwen3_5(4096, 12288, 32, 16, 32),
    "qwen3.5-27b": _qwen3_5(5120, 17408, 64, 24, 48),
    # GPT-NeoX (arXiv:2204.06745, arXiv:2304.01373, RedPajama-INCITE)
    "gpt-neox-20b": _neox(6144, 24576, 44, 64, 50432, hidden_act="gelu_fast"),
    "pythia-6.9b": _neox(4096, 16384, 32, 32, 50432),
    "pythia-1b": _neox(2048, 8192, 16, 8, 50304),
    "redpajama-3b": _neox(2560, 10240, 32, 32, 50432, rotary_pct=1.0, use_parallel_residual=False),
    # GPT-J, GPT-2, OPT (arXiv:2205.01068, table 1)
    "gpt-j-6b": {
        "model_type": "gptj",
        "vocab_size": 50400,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
    },
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    "opt-6.7b": _opt(4096, 32, 32),
    # Gemma (arXiv:2403.08295, arXiv:2408.00118, arXiv:2503.19786)
    "gemma-7b": _gemma("gemma", 3072, 24576, 28, 16, 16, hidden_act="gelu_pytorch_tanh"),
    "gemma-2-2b": _gemma("gemma2", 2304, 9216, 26, 8, 4, query_pre_attn_scalar=256, sliding_window=4096),
    "gemma-2-9b": _gemma("gemma2", 3584, 14336, 42, 16, 8, query_pre_attn_scalar=256, sliding_window=4096),
    "gemma-3-270m": _gemma3(640, 2048, 18, 4, 1, 512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 4, 1, 512),
    "gemma-3-4b": _gemma3_multimodal(2560, 10240, 34, 8, 4),
    "gemma-3-12b": _gemma3_multimodal(3840, 15360, 48, 16, 8),
    "gemma-3-27b": _gemma3_multimodal(5376, 21504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168),
    # Gemma 4: https://huggingface.co/google/gemma-4-E4B and gemma-4-31B, their text_config
    "gemma-4-e4b": _gemma4(2560, 10240, 42, 8, 2, num_kv_shared_layers=18, hidden_size_per_layer_input=256),
    "gemma-4-31b": _gemma4(
        5376,
        21504,
        60,
        32,
        16,
        sliding_window=1024,
        attention_k_eq_v=True,
        num_global_key_value_heads=4,
        max_position_embeddings=262144,
    ),
    # Phi (arXiv:2309.05463, arXiv:2404.14219)
    "phi-2": _llama(
        2560,
        10240,
        32,
        32,
        model_type="phi",
        vocab_size=51200,
        layer_norm_eps=1e-5,
        hidden_act="gelu_new",
        partial_rotary_factor=0.4,
    ),
    "phi-3-mini": _phi3(3072, 8192, 32, 32, 32, 32064, 2047),
    "phi-3-medium": _phi3(5120, 17920, 40, 40, 10, 32064, 2047),
    # Families that differ from Llama in a fact or two
    "smollm3-3b": _llama(
        2048,
        11008,
        36,
        16,
        4,
        model_type="smollm3",
        vocab_size=128256,
        max_position_embeddings=65536,
        rope_theta=5000000.0,
        tie_word_embeddings=True,
    ),
    "olmo-2-7b": _llama(
        4096, 11008, 32, 32, model_type="olmo2", vocab_size=100352, max_position_embeddings=4096, rope_theta=500000.0
    ),
    "olmo-3-7b": _llama(
        4096,
        11008,
        32,
        32,
        model_type="olmo3",
        vocab_size=100278,
        max_position_embeddings=65536,
        rope_theta=500000.0,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
        sliding_window=4096,
    ),
    "granite-3.3-8b": _llama(
        4096, 12800, 40, 32, 8, model_type="granite", vocab_size=49159, **_granite(0.0078125, 16.0)
    ),
    "granite-4.0-micro": _llama(
        2560,
        8192,
        40,
        40,
        8,
        model_type="granitemoehybrid",
        vocab_size=100352,
        shared_intermediate_size=8192,
        num_local_experts=0,
        layer_types=["attention"] * 40,
        position_embedding_type="rope",
        **_granite(0.015625, 10.0),
    ),
    "ministral-3-3b": _ministral3(3072, 9216, 26, tie_word_embeddings=True),
    "ministral-3-8b": _ministral3(4096, 14336, 34),
    "glm-4-9b": _glm("glm", max_position_embeddings=131072, rms_norm_eps=1.5625e-07),
    "glm-4-9b-0414": _glm("glm4", max_position_embeddings=32768, rms_norm_eps=1e-5),
    "command-r-35b": _cohere(
        8192,
        22528,
        40,
        64,
        64,
        model_type="cohere",
        max_position_embeddings=131072,
        rope_theta=8000000.0,
        logit_scale=0.0625,
    ),
    "aya-expanse-8b": _cohere(
        4096, 14336, 32, 32, 8, model_type="cohere", max_position_embeddings=8192, logit_scale=0.125
    ),
    "command-r7b": _cohere(
        4096,
        14336,
        32,
        32,
        8,
        model_type="cohere2",
        max_position_embeddings=132096,
        rope_theta=50000.0,
        logit_scale=0.25,
        sliding_window=4096,
    ),
    "seed-oss-36b": _llama(
        5120,
        27648,
        64,
        80,
        8,
        model_type="seed_oss",
        vocab_size=155136,
        head_dim=128,
        max_position_embeddings=524288,
        rope_theta=10000000.0,
        attention_bias=True,
    ),
    "exaone-4-32b": _llama(
        5120,
        27392,
        64,
        40,
        8,
        model_type="exaone4",
        vocab_size=102400,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        rope_scaling=_llama31(16.0)["rope_scaling"],
        sliding_window=4096,
        sliding_window_pattern="LLLG",
    ),
    "nanochat-d20": _llama(1280, 5120, 20, 10, model_type="nanochat", vocab_size=65536, hidden_act="relu2"),
    # Sparse models: Mixtral (arXiv:2401.04088), Qwen3-MoE (arXiv:2505.09388), OLMoE (arXiv:2409.02060)
    "gpt-oss-20b": _llama(
        2880,
        2880,
        24,
        64,
        8,
        model_type="gpt_oss",
        vocab_size=201088,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 12,
        num_local_experts=32,
        num_experts_per_tok=4,
        attention_bias=True,
    ),
    "mixtral-8x7b": _llama(
        4096,
        14336,
        32,
        32,
        8,
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        sliding_window=None,
    ),
    "qwen3-30b-a3b": _qwen(
        "qwen3_moe",
        2048,
        6144,
        48,
        32,
        4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
    "olmoe-1b-7b": _llama(
        2048,
        1024,
        16,
        16,
        model_type="olmoe",
        vocab_size=50304,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    # T5 1.0 and FLAN-T5 (arXiv:1910.10683, arXiv:2210.11416)
    "t5-small": _t5(512, 2048, 6, 8, 64, gated=False),
    "flan-t5-base": _t5(768, 2048, 12, 12, 64, gated=True),
    "flan-t5-xl": _t5(2048, 5120, 24, 32, 64, gated=True),
    "flan-t5-xxl": _t5(4096, 10240, 24, 64, 64, gated=True),
}
