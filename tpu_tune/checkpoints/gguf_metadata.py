"""From a Hugging Face config to GGUF metadata: the inverse of gguf_config.py, one function per family.

What llama.cpp has built in cannot be said in a file; a config that asks for something else is refused by name, since
llama.cpp would run another model without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tpu_tune.checkpoints.gguf_config import llama3_factors, longrope_attention_factor
from tpu_tune.checkpoints.gguf_gemma4 import gemma4_metadata
from tpu_tune.errors import UserError
from tpu_tune.models import rope as rotary

Metadata = dict[str, Any]
Tensors = dict[str, np.ndarray]


def gguf_metadata(config: dict[str, Any]) -> tuple[str, Metadata, Tensors]:
    """Translate a model's configuration.

    Args:
      config: the content of a config.json, of any age; what it leaves out is filled in by transformers.

    Returns:
      `general.architecture`, metadata (full keys), and tensors by GGUF name that hold what Hugging Face has in the
      configuration (frequency factors).

    Raises:
      UserError: a family of which no GGUF is written, or a setting that GGUF cannot express.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in WRITERS:
        known = ", ".join(sorted(WRITERS))
        raise UserError(
            f"no GGUF is written of a '{kind}' model (written: {known}); export it with --merge, which llama.cpp's "
            "convert_hf_to_gguf.py takes if it knows the family"
        )
    architecture, translate = WRITERS[kind]
    full = dict(config) | CONFIG_MAPPING[kind].from_dict(config).to_dict()
    if kind == "t5":  # transformers 5 ties every T5 and keeps what the config said under another name
        full["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
    metadata, tensors = translate(full)
    return architecture, {f"{architecture}.{key}": value for key, value in metadata.items()}, tensors


def _expect(config: dict[str, Any], key: str, *values: Any) -> None:
    if config.get(key) not in values:
        raise UserError(
            f"GGUF cannot express {key}={config.get(key)!r} of a {config['model_type']} model (llama.cpp has "
            f"{' or '.join(map(repr, values))} built in); export it with --merge"
        )


def _expect_heads_as_wide_as_the_model(config: dict[str, Any]) -> None:
    """For families whose attention's output matrix llama.cpp takes for square."""
    _expect(config, "head_dim", None, config["hidden_size"] // config["num_attention_heads"])


def _decoder(config: dict[str, Any], rope: dict[str, Any]) -> Metadata:
    """What every decoder with rotary positions has."""
    heads = config["num_attention_heads"]
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "vocab_size": config["vocab_size"],
    }


def _llama_like(config: dict[str, Any], rope: dict[str, Any] | None = None) -> tuple[Metadata, Tensors]:
    rope = config["rope_parameters"] if rope is None else rope
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling, tensors = _rope_scaling(rope, head_dim)
    return _decoder(config, rope) | scaling | {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }, tensors


def _rope_scaling(rope: dict[str, Any], head_dim: int) -> tuple[Metadata, Tensors]:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}, {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, {}
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if (low, high) != (1, 4):
            raise UserError(f"GGUF is written for Llama 3's frequency factors 1 and 4, not {low} and {high}")
        trained = rope["original_max_position_embeddings"]
        factors = llama3_factors(rope["rope_theta"], head_dim, rope["factor"], trained)
        return {"rope.scaling.original_context_length": trained}, {"rope_freqs.weight": factors.astype(np.float32)}
    if kind == "yarn":
        if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
            raise UserError("GGUF is written for yarn's beta_fast 32 and beta_slow 1, which llama.cpp has built in")
        return _yarn(rope), {}
    raise UserError(f"GGUF with rope_type '{kind}' is not written (known: default, linear, llama3, longrope, yarn)")


def _yarn(rope: dict[str, Any], multiplier: float = 0.0) -> Metadata:
    """Yarn's keys; `multiplier` is the `yarn_log_multiplier` that llama.cpp reads for a few families."""
    factor = float(rope["factor"])
    built_in = rotary.yarn_magnitude(factor) / rotary.yarn_magnitude(factor, multiplier)
    found = rotary.from_config({"rope_parameters": rope}, 2).magnitude
    if not math.isclose(found, built_in, rel_tol=1e-5):
        raise UserError(
            f"GGUF cannot express yarn's attention factor {found:g} (llama.cpp has {built_in:g} built in); "
            "export it with --merge"
        )
    if not rope.get("truncate", True):
        raise UserError("GGUF cannot express yarn with truncate=false; export it with --merge")
    kept = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    } | {f"rope.scaling.yarn_{name}": float(rope[key]) for key, name in kept.items() if rope.get(key) is not None}


def _llama(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    """Llama and Mistral. Mistral's window is for readers like ours; llama.cpp lets it see the whole text, as Phi 3."""
    _expect(config, "hidden_act", "silu")
    metadata, tensors = _llama_like(config)
    window = config.get("sliding_window")
    return metadata | ({"attention.sliding_window": window} if window else {}), tensors


def _qwen(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    _expect(config, "attention_bias", False, None)  # Qwen3's, of which llama.cpp reads none behind the attention
    _expect(config, "use_sliding_window", False, None)
    if config["model_type"] == "qwen2":
        _expect_heads_as_wide_as_the_model(config)
    return _llama_like(config)


def _smollm3(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    _expect(config, "use_sliding_window", False, None)
    for key in ("attention_bias", "mlp_bias"):
        _expect(config, key, False)
    every_fourth = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    _expect(config, "no_rope_layers", every_fourth)
    return _llama_like(config)


def _olmo2(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    rope = config["rope_parameters"]
    sliding, full = (rope.get(key, rope) for key in ("sliding_attention", "full_attention"))
    _expect(config, "hidden_act", "silu")
    for key in ("attention_bias", "tie_word_embeddings"):
        _expect(config, key, False)
    _expect_heads_as_wide_as_the_model(config)
    metadata, tensors = _llama_like(config, full)
    if config["model_type"] == "olmo2":
        return metadata, tensors
    _expect({**sliding, "model_type": "olmo3"}, "rope_type", "default")
    _expect({**sliding, "model_type": "olmo3"}, "rope_theta", full["rope_theta"])
    return metadata | _windows(config) | {"rope.freq_base_swa": float(sliding["rope_theta"])}, tensors


def _windows(config: dict[str, Any]) -> Metadata:
    flags = [kind == "sliding_attention" for kind in config["layer_types"]]
    return {"attention.sliding_window": config["sliding_window"], "attention.sliding_window_pattern": flags}


def _granite(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    _expect_heads_as_wide_as_the_model(config)
    metadata, tensors = _llama_like(config)
    return metadata | {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }, tensors


def _granite_hybrid(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    """Granite 4's dense models, which llama.cpp stores as Granite 3 (see `gguf_write.as_llama_cpp_has_it`)."""
    _expect(config, "num_local_experts", 0)
    _expect(config, "position_embedding_type", "rope")
    _expect(config, "layer_types", ["full_attention"] * config["num_hidden_layers"])
    return _granite({**config, "intermediate_size": config["shared_intermediate_size"]})


def _glm(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    if config["model_type"] == "glm":
        _expect_heads_as_wide_as_the_model(config)
    rope = config["rope_parameters"]
    _expect({**rope, "model_type": config["model_type"]}, "rope_type", "default")
    metadata, tensors = _llama_like(config, rope)
    return metadata | {"rope.dimension_count": int(rope["partial_rotary_factor"] * config["head_dim"])}, tensors


def _ministral3(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    _expect(config, "sliding_window", None)
    rope = config["rope_parameters"]
    _expect({**rope, "model_type": "ministral3"}, "rope_type", "yarn")
    multiplier = float(rope.get("mscale_all_dim") or 0.0)
    metadata, tensors = _llama_like(config, {**rope, "rope_type": "default"})
    return metadata | _yarn(rope, multiplier) | {
        "rope.scaling.yarn_log_multiplier": multiplier,
        "attention.temperature_scale": float(rope["llama_4_scaling_beta"]),
    }, tensors


def _cohere(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    rope = config["rope_parameters"]
    _expect(config, "hidden_act", "silu")
    _expect(config, "use_qk_norm", False, None)
    _expect_heads_as_wide_as_the_model(config)
    _expect(config, "attention_bias", False)
    _expect(config, "tie_word_embeddings", True)
    _expect({**rope, "model_type": config["model_type"]}, "rope_type", "default")
    metadata = _decoder(config, rope) | {
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
        "logit_scale": float(config["logit_scale"]),
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "rope.scaling.type": "none",
    }
    if config["model_type"] == "cohere2":
        layers = range(config["num_hidden_layers"])
        every_fourth = ["sliding_attention" if (layer + 1) % 4 else "full_attention" for layer in layers]
        _expect(config, "layer_types", every_fourth)
        metadata["attention.sliding_window"] = config["sliding_window"]
    return metadata, {}


def _seed_oss(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    for key in ("mlp_bias", "attention_out_bias"):
        _expect(config, key, False)
    return _llama_like(config)


def _exaone4(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    """Windows are llama.cpp's for models of 64 layers alone."""
    _expect(config, "hidden_act", "silu")
    _expect_heads_as_wide_as_the_model(config)
    metadata, tensors = _llama_like(config)
    if config["num_hidden_layers"] == 64 and config["sliding_window"]:
        return metadata | _windows(config), tensors
    _expect(config, "sliding_window", None)
    return metadata, tensors


def _gpt_neox(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    rope = config["rope_parameters"]
    _expect({**rope, "model_type": "gpt_neox"}, "rope_type", "default")
    hidden, layers = config["hidden_size"], range(config["num_hidden_layers"])
    head_dim = hidden // config["num_attention_heads"]
    # llama.cpp opens no GPT-NeoX without these biases.
    sizes = {} if config["attention_bias"] else {"attn_qkv": 3 * hidden, "attn_output": hidden}
    zeros = {f"blk.{at}.{name}.bias": np.zeros(size, np.float32) for at in layers for name, size in sizes.items()}
    return _decoder(config, rope) | {
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * head_dim),
        "use_parallel_residual": bool(config["use_parallel_residual"]),
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
    }, zeros


def _gpt2(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _expect(config, "scale_attn_weights", True)
    _expect(config, "scale_attn_by_inverse_layer_idx", False)
    return {
        "context_length": config["n_positions"],
        "embedding_length": config["n_embd"],
        "feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
        "block_count": config["n_layer"],
        "attention.head_count": config["n_head"],
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "vocab_size": config["vocab_size"],
    }, {}


def _gemma(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "attention_bias", False)
    return _llama_like(config)


def _gemma2(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config[key] is None:
            raise UserError(f"GGUF cannot express a gemma2 model without {key}; export it with --merge")
    metadata, tensors = _windowed_gemma(config, config["rope_parameters"], period=2, largest=46)
    soft_caps = {key: config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    return metadata | soft_caps, tensors


def _gemma3(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "attn_logit_softcapping", None)
    rope = config["rope_parameters"]
    local = rope["sliding_attention"]
    _expect({**local, "model_type": "gemma3_text"}, "rope_type", "default")
    metadata, tensors = _windowed_gemma(config, rope["full_attention"], period=6, largest=62)
    soft_cap = config.get("final_logit_softcapping")
    return metadata | {"rope.freq_base_swa": float(local["rope_theta"])} | (
        {"final_logit_softcapping": soft_cap} if soft_cap else {}
    ), tensors


def _windowed_gemma(
    config: dict[str, Any], rope: dict[str, Any], period: int, largest: int
) -> tuple[Metadata, Tensors]:
    """What Gemma 2 and 3 share; see gguf_config.py for what llama.cpp takes for granted."""
    _expect(config, "hidden_activation", "gelu_pytorch_tanh")
    _expect(config, "attention_bias", False)
    _expect(config, "use_bidirectional_attention", False, None)
    layers = config["num_hidden_layers"]
    scale = config["hidden_size"] // config["num_attention_heads"] if layers == largest else config["head_dim"]
    _expect(config, "query_pre_attn_scalar", scale)
    metadata, tensors = _llama_like(config, rope)
    if period == 6 and "sliding_attention" not in config["layer_types"]:
        return metadata, tensors
    alternating = ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    _expect(config, "layer_types", alternating)
    return metadata | {"attention.sliding_window": config["sliding_window"]}, tensors


def _phi(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "gelu_new", "gelu_pytorch_tanh")
    _expect(config, "qk_layernorm", False)
    rope = config["rope_parameters"]
    _expect({**rope, "model_type": "phi"}, "rope_type", "default")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return _decoder(config, rope) | {
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * head_dim),
        "attention.layer_norm_epsilon": config["layer_norm_eps"],
    }, {}


def _phi3(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "hidden_act", "silu")
    rope = config["rope_parameters"]
    trained = config["original_max_position_embeddings"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    metadata = _decoder(config, rope) | {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": int(rope.get("partial_rotary_factor", 1.0) * head_dim),
        "rope.scaling.original_context_length": trained,
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    if rope.get("rope_type", "default") == "default":
        return metadata, {}
    _expect({**rope, "model_type": "phi3"}, "rope_type", "longrope")
    factor = rope.get("attention_factor") or longrope_attention_factor(config["max_position_embeddings"], trained)
    return metadata | {"rope.scaling.attn_factor": factor}, {
        f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32) for length in ("long", "short")
    }


def _t5(config: dict[str, Any]) -> tuple[Metadata, Tensors]:
    _expect(config, "feed_forward_proj", "relu", "gated-gelu")
    _expect(config, "relative_attention_max_distance", 128)
    if config["num_decoder_layers"] > config["num_layers"]:
        raise UserError(
            f"llama.cpp cannot start a T5 with more decoder layers ({config['num_decoder_layers']}) than encoder "
            f"layers ({config['num_layers']}); export it with --merge"
        )
    start = config.get("decoder_start_token_id")
    return {
        "context_length": config.get("n_positions") or 512,
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_ff"],
        "block_count": config["num_layers"],
        "decoder_block_count": config["num_decoder_layers"],
        "attention.head_count": config["num_heads"],
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        "attention.layer_norm_rms_epsilon": config["layer_norm_epsilon"],
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
        "decoder_start_token_id": config.get("pad_token_id") or 0 if start is None else start,
        "vocab_size": config["vocab_size"],
    }, {}


# Hugging Face's model_type -> GGUF's architecture and the function that translates
WRITERS: dict[str, tuple[str, Callable[[dict[str, Any]], tuple[Metadata, Tensors]]]] = {
    "llama": ("llama", _llama),
    "mistral": ("llama", _llama),
    "qwen2": ("qwen2", _qwen),
    "qwen3": ("qwen3", _qwen),
    "gpt_neox": ("gptneox", _gpt_neox),
    "gpt2": ("gpt2", _gpt2),
    "gemma": ("gemma", _gemma),
    "gemma2": ("gemma2", _gemma2),
    "gemma3_text": ("gemma3", _gemma3),
    "gemma4_text": ("gemma4", gemma4_metadata),
    "gemma4_unified_text": ("gemma4", gemma4_metadata),
    "phi": ("phi2", _phi),
    "phi3": ("phi3", _phi3),
    "smollm3": ("smollm3", _smollm3),
    "olmo2": ("olmo2", _olmo2),
    "olmo3": ("olmo2", _olmo2),
    "granite": ("granite", _granite),
    "granitemoehybrid": ("granite", _granite_hybrid),
    "glm": ("chatglm", _glm),
    "glm4": ("glm4", _glm),
    "ministral3": ("mistral3", _ministral3),
    "cohere": ("command-r", _cohere),
    "cohere2": ("cohere2", _cohere),
    "seed_oss": ("seed_oss", _seed_oss),
    "exaone4": ("exaone4", _exaone4),
    "t5": ("t5", _t5),
}
