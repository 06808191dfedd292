"""From GGUF metadata to the content of a Hugging Face config.json, one function per family.

What llama.cpp's converter leaves out because llama.cpp has it built in (Gemma's alternation of windows, Phi's rotary
base, T5's bucket distance) is filled in here with the value that llama.cpp uses.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tpu_tune.checkpoints.gguf_file import GgufFile, read_gguf_tensor
from tpu_tune.errors import UserError
from tpu_tune.models.families.checked import MOST_LAYERS, MOST_POSITIONS
from tpu_tune.models.values import FLAG, TEXT, check, number, whole

_POSITIVE = number(0, above=True)
_COUNT = whole(0, MOST_POSITIONS)
_SIZE = whole(1, MOST_POSITIONS)
# What a key of the architecture's holds; one that is not here holds a size.
_KINDS = {
    **dict.fromkeys(("rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.factor"), _POSITIVE),
    **dict.fromkeys((f"rope.scaling.yarn_{name}" for name in ("attn_factor", "beta_fast", "beta_slow")), _POSITIVE),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale", "attention.scale"), _POSITIVE),
    **dict.fromkeys(("rope.scaling.yarn_log_multiplier", "attention.temperature_scale"), number(0)),
    **dict.fromkeys(("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"), number(0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "rope.scaling.attn_factor"), number(0)),
    **dict.fromkeys(
        (
            "expert_count", "attention.sliding_window", "attention.sliding_window_pattern", "decoder_start_token_id",
            "rope.scaling.original_context_length", "attention.shared_kv_layers", "embedding_length_per_layer_input",
        ),
        _COUNT,
    ),
    **dict.fromkeys(("block_count", "decoder_block_count"), whole(1, MOST_LAYERS)),
    "rope.scaling.type": TEXT,
    **dict.fromkeys(("use_parallel_residual", "rope.scaling.finetuned"), FLAG),
}  # fmt: skip


def metadata_value(file: GgufFile, key: str, *default: Any) -> Any:
    """A metadata value under the architecture's own prefix; required where no default is given."""
    full = f"{file.metadata['general.architecture']}.{key}"
    if full in file.metadata:
        value = file.metadata[full]
        if isinstance(value, (list, np.ndarray)):
            raise UserError(f"{file.path}: {full} differs from layer to layer, which is not supported")
        check({full: value}, {full: _KINDS.get(key, _SIZE)}, file.path)
        return value
    if not default:
        raise UserError(f"{file.path}: its metadata lacks {full}")
    return default[0]


def _check(file: GgufFile) -> None:
    if metadata_value(file, "expert_count", 0):
        raise UserError(f"{file.path}: a mixture of experts, which is not supported")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: lacks token_embd.weight, so it holds no language model")


def common_config(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    """What every family's config calls by the same name."""
    _check(file)
    ids = {"bos_token_id": "bos", "pad_token_id": "padding"}
    ends = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(number for number in ends if number is not None))
    return {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": _rows(file, "token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
    } | {key: file.metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in ids.items()}


def shared_config(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    """What every decoder with rotary positions has."""
    return common_config(file, model_type, class_name) | {
        "hidden_size": metadata_value(file, "embedding_length"),
        "intermediate_size": metadata_value(file, "feed_forward_length"),
        "num_hidden_layers": metadata_value(file, "block_count"),
        "num_attention_heads": metadata_value(file, "attention.head_count"),
        "max_position_embeddings": metadata_value(file, "context_length"),
        "rope_theta": float(metadata_value(file, "rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file),
    }


def llama_like_config(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    config = shared_config(file, model_type, class_name)
    heads = config["num_attention_heads"]
    head_dim = metadata_value(file, "attention.key_length", config["hidden_size"] // heads)
    rotary = metadata_value(file, "rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UserError(f"{file.path}: rotates {rotary} of {head_dim} dimensions a head, which {model_type} does not")
    return config | {
        "num_key_value_heads": metadata_value(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": metadata_value(file, "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
    }


def llama_config(file: GgufFile) -> dict[str, Any]:
    """Llama, and Mistral, which llama.cpp stores as a Llama (a sliding window tells them apart)."""
    window = metadata_value(file, "attention.sliding_window", 0)
    if window:
        return llama_like_config(file, "mistral", "MistralForCausalLM") | {"sliding_window": window}
    config = llama_like_config(file, "llama", "LlamaForCausalLM")
    return config | biases_of(file)


def biases_of(file: GgufFile) -> dict[str, bool]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return {key: name in file.tensors for key, name in biases.items()}


def gpt_neox_config(file: GgufFile) -> dict[str, Any]:
    config = shared_config(file, "gpt_neox", "GPTNeoXForCausalLM")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "rotary_pct": metadata_value(file, "rope.dimension_count", head_dim) / head_dim,
        "layer_norm_eps": metadata_value(file, "attention.layer_norm_epsilon"),
        "use_parallel_residual": bool(metadata_value(file, "use_parallel_residual", True)),
        "hidden_act": "gelu",
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def gemma_config(file: GgufFile) -> dict[str, Any]:
    """Gemma 1. Its activation has had two names in Hugging Face's configs; both are given."""
    config = llama_like_config(file, "gemma", "GemmaForCausalLM")
    return config | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def gemma2_config(file: GgufFile) -> dict[str, Any]:
    """Gemma 2: every other layer looks through a window, beginning with the first."""
    return _windowed_gemma(file, "gemma2", "Gemma2ForCausalLM", period=2, largest=46, window=4096) | {
        "attn_logit_softcapping": metadata_value(file, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata_value(file, "final_logit_softcapping", 30.0),
    }


def gemma3_config(file: GgufFile) -> dict[str, Any]:
    """Gemma 3's text model: five layers with a window and their own rotary base, then one without."""
    return _windowed_gemma(file, "gemma3_text", "Gemma3ForCausalLM", period=6, largest=62, window=0) | {
        "rope_local_base_freq": float(metadata_value(file, "rope.freq_base_swa", 10000.0)),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": metadata_value(file, "final_logit_softcapping", None),
    }


def _windowed_gemma(
    file: GgufFile, model_type: str, class_name: str, period: int, largest: int, window: int
) -> dict[str, Any]:
    """What Gemma 2 and 3 share. llama.cpp knows the 27B models, which scale attention otherwise, by their layers."""
    config = llama_like_config(file, model_type, class_name)
    del config["hidden_act"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    window = metadata_value(file, "attention.sliding_window", window)
    period = metadata_value(file, "attention.sliding_window_pattern", period)
    full = [not window or period == 0 or (layer + 1) % period == 0 for layer in range(layers)]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == largest else config["head_dim"],
        "sliding_window": window or None,
        "layer_types": ["full_attention" if one else "sliding_attention" for one in full],
    }


def gpt2_config(file: GgufFile) -> dict[str, Any]:
    """GPT-2. The converter writes four times the width for the MLP whatever it is; the tensor tells."""
    hidden, positions = metadata_value(file, "embedding_length"), metadata_value(file, "context_length")
    inner = _rows(file, "blk.0.ffn_up.weight")
    return common_config(file, "gpt2", "GPT2LMHeadModel") | {
        "n_embd": hidden,
        "n_layer": metadata_value(file, "block_count"),
        "n_head": metadata_value(file, "attention.head_count"),
        "n_positions": positions,
        "n_ctx": positions,
        "n_inner": None if inner == 4 * hidden else inner,
        "layer_norm_epsilon": metadata_value(file, "attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def phi_config(file: GgufFile) -> dict[str, Any]:
    """Phi 1, 1.5 and 2, which llama.cpp calls phi2."""
    config = shared_config(file, "phi", "PhiForCausalLM")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "intermediate_size": _rows(file, "blk.0.ffn_up.weight"),
        "num_key_value_heads": metadata_value(file, "attention.head_count_kv", config["num_attention_heads"]),
        "partial_rotary_factor": metadata_value(file, "rope.dimension_count", head_dim) / head_dim,
        "layer_norm_eps": metadata_value(file, "attention.layer_norm_epsilon"),
        "hidden_act": "gelu_new",
        "qk_layernorm": False,
    }


def phi3_config(file: GgufFile) -> dict[str, Any]:
    """Phi 3 and 4; the factors that stretch its rotary embedding for long texts are tensors of the file."""
    config = shared_config(file, "phi3", "Phi3ForCausalLM")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if "rope_factors_long.weight" in file.tensors:
        config["rope_scaling"] = {"rope_type": "longrope"} | {
            f"{length}_factor": read_gguf_tensor(file, f"rope_factors_{length}.weight").astype(float).tolist()
            for length in ("short", "long")
        }
        # As transformers computes it where the config does not say, so that it need not be said again.
        attention = metadata_value(file, "rope.scaling.attn_factor", None)
        trained = metadata_value(file, "rope.scaling.original_context_length")
        if attention is not None and not math.isclose(
            attention, longrope_attention_factor(config["max_position_embeddings"], trained), rel_tol=1e-5
        ):
            config["rope_scaling"]["attention_factor"] = attention
    return config | {
        "num_key_value_heads": metadata_value(file, "attention.head_count_kv", config["num_attention_heads"]),
        "original_max_position_embeddings": metadata_value(
            file, "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "partial_rotary_factor": metadata_value(file, "rope.dimension_count", head_dim) / head_dim,
        "rms_norm_eps": metadata_value(file, "attention.layer_norm_rms_epsilon"),
        "sliding_window": metadata_value(file, "attention.sliding_window", 0) or None,
        "hidden_act": "silu",
    }


def longrope_attention_factor(length: int, trained: int) -> float:
    """Return what LongRoPE multiplies queries and keys with (transformers, `_compute_longrope_parameters`)."""
    return math.sqrt(1 + math.log(length / trained) / math.log(trained)) if length > trained else 1.0


def t5_config(file: GgufFile) -> dict[str, Any]:
    """T5, T5 1.1 and FLAN-T5. A gate in the file means GELU, none ReLU, and an untied head is not scaled."""
    if "enc.blk.1.attn_rel_b.weight" in file.tensors:
        raise UserError(f"{file.path}: has a relative position bias in every layer (UMT5), which is not supported")
    layers = metadata_value(file, "block_count")
    return common_config(file, "t5", "T5ForConditionalGeneration") | {
        "is_encoder_decoder": True,
        "d_model": metadata_value(file, "embedding_length"),
        "d_kv": metadata_value(file, "attention.key_length"),
        "d_ff": metadata_value(file, "feed_forward_length"),
        "num_layers": layers,
        "num_decoder_layers": metadata_value(file, "decoder_block_count", layers),
        "num_heads": metadata_value(file, "attention.head_count"),
        "n_positions": metadata_value(file, "context_length"),
        "relative_attention_num_buckets": metadata_value(file, "attention.relative_buckets_count"),
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": metadata_value(file, "attention.layer_norm_rms_epsilon"),
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in file.tensors else "relu",
        "decoder_start_token_id": metadata_value(file, "decoder_start_token_id", 0),
    }


def _rows(file: GgufFile, name: str) -> int:
    if name not in file.tensors:
        raise UserError(f"{file.path}: lacks {name}")
    shape = file.tensors[name].shape
    if len(shape) != 2:
        raise UserError(f"{file.path}: {name} has the shape {shape} where a matrix is expected")
    return shape[0]


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling; Llama 3's is told from the frequency factors that stand in its place."""
    trained = metadata_value(file, "rope.scaling.original_context_length", None)
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, trained or 8192)
    kind = metadata_value(file, "rope.scaling.type", "none")
    factor = metadata_value(file, "rope.scaling.factor", metadata_value(file, "rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    kind = "linear" if kind == "none" else kind
    scaling = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        keys = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        found = {key: metadata_value(file, f"rope.scaling.yarn_{name}", None) for key, name in keys.items()}
        scaling |= {key: float(value) for key, value in found.items() if value is not None}
    return scaling | ({"original_max_position_embeddings": trained} if trained else {})


def _llama3_scaling(file: GgufFile, trained: int) -> dict[str, Any]:
    """The parameters whose factors the file has."""
    factors = read_gguf_tensor(file, "rope_freqs.weight").astype(np.float64).reshape(-1)
    base, factor = float(metadata_value(file, "rope.freq_base", 10000.0)), float(factors.max())
    if not np.allclose(factors, llama3_factors(base, 2 * factors.size, factor, trained), rtol=1e-3):
        raise UserError(f"{file.path}: its rope_freqs.weight are not Llama 3's, and no other kind is known")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": trained,
    }


def llama3_factors(base: float, head_dim: int, factor: float, trained: int) -> np.ndarray:
    """Return what Llama 3 divides its rotary frequencies by (transformers, `_compute_llama3_parameters`).

    Its `low_freq_factor` is 1 and its `high_freq_factor` 4, as in every published model.
    """
    wavelengths = 2 * math.pi * base ** (np.arange(head_dim // 2) / (head_dim // 2))
    smooth = np.clip((trained / wavelengths - 1) / 3, 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
