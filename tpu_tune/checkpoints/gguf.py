"""GGUF files as a source of weights: configuration, tensor names and layouts back to Hugging Face's.

llama.cpp's converter (convert_hf_to_gguf.py) renames tensors and, for some families, reorders rows; each entry of
`FAMILIES` undoes that for one `general.architecture`. Adding a family is one entry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tpu_tune.checkpoints.gguf_file import GgufFile, open_gguf_file, read_gguf_tensor
from tpu_tune.checkpoints.gguf_tokenizer import build_tokenizer
from tpu_tune.checkpoints.source import WeightSource
from tpu_tune.errors import UserError


@dataclasses.dataclass(frozen=True)
class GgufFamily:
    """How one architecture differs between GGUF and Hugging Face.

    Attributes:
      config: builds the content of config.json.
      names: GGUF module name -> Hugging Face's; `{}` stands for the layer's index.
      restore: (Hugging Face name, tensor, config) -> the tensor with its rows in Hugging Face's order.
      skip: GGUF tensors that are not weights (their content is in the configuration).
    """

    config: Callable[[GgufFile], dict[str, Any]]
    names: dict[str, str]
    restore: Callable[[str, np.ndarray, dict[str, Any]], np.ndarray]
    skip: tuple[str, ...] = ("rope_freqs.weight",)


def open_gguf(path: str) -> WeightSource:
    """Open a GGUF file; only its header is read.

    `read` gives F32, F16 and BF16 tensors as stored and everything else dequantized to float32.

    Raises:
      UserError: the file is missing, cut short or not GGUF, or of an architecture, version or number format that is
        not known here.
    """
    file = open_gguf_file(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{path}: architecture {architecture!r} is not known in GGUF files (known: {known})")
    family = FAMILIES[architecture]
    stored = _stored_names(file, family)
    config = family.config(file)
    return WeightSource(
        path=file.path,
        config=config,
        shapes={name: file.tensors[original].shape for name, original in stored.items()},
        read=functools.partial(_read, file, stored, family, config),
        load_tokenizer=functools.partial(build_tokenizer, file.path, file.metadata),
        fingerprint=file.fingerprint,
    )


def _read(file: GgufFile, stored: dict[str, str], family: GgufFamily, config: dict[str, Any], name: str) -> np.ndarray:
    return family.restore(name, read_gguf_tensor(file, stored[name]), config)


def _stored_names(file: GgufFile, family: GgufFamily) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name."""
    stored, unknown = {}, []
    for original in file.tensors:
        module, _, kind = original.rpartition(".")
        layer = re.match(r"blk\.(\d+)\.", module)
        key = f"blk.{{}}.{module[layer.end() :]}" if layer else module
        if original in family.skip:
            continue
        if key not in family.names:
            unknown.append(original)
        else:
            stored[f"{family.names[key].format(layer[1] if layer else '')}.{kind}"] = original
    if unknown:
        names = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise UserError(f"{file.path}: {len(unknown)} tensors have no place in this architecture: {names}")
    return stored


# Configuration


def _value(file: GgufFile, key: str, *default: Any) -> Any:
    """A metadata value under the architecture's own prefix; required where no default is given."""
    full = f"{file.metadata['general.architecture']}.{key}"
    if full in file.metadata:
        value = file.metadata[full]
        if isinstance(value, (list, np.ndarray)):
            raise UserError(f"{file.path}: {full} differs from layer to layer, which is not supported")
        return value
    if not default:
        raise UserError(f"{file.path}: its metadata lacks {full}")
    return default[0]


def _shared_config(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    """What every decoder's config has."""
    if _value(file, "expert_count", 0):
        raise UserError(f"{file.path}: a mixture of experts, which is not supported")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{file.path}: lacks token_embd.weight, so it holds no language model")
    config = {
        "model_type": model_type,
        "architectures": [class_name],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": _value(file, "embedding_length"),
        "intermediate_size": _value(file, "feed_forward_length"),
        "num_hidden_layers": _value(file, "block_count"),
        "num_attention_heads": _value(file, "attention.head_count"),
        "max_position_embeddings": _value(file, "context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": float(_value(file, "rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file),
    }
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    for key, name in ids.items():
        config[key] = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return config


def _llama_like_config(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    config = _shared_config(file, model_type, class_name)
    heads = config["num_attention_heads"]
    head_dim = _value(file, "attention.key_length", config["hidden_size"] // heads)
    rotary = _value(file, "rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise UserError(f"{file.path}: rotates {rotary} of {head_dim} dimensions a head, which {model_type} does not")
    return config | {
        "num_key_value_heads": _value(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _value(file, "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
    }


def _llama_config(file: GgufFile) -> dict[str, Any]:
    """Llama, and Mistral, which llama.cpp stores as a Llama (a sliding window tells them apart)."""
    window = _value(file, "attention.sliding_window", 0)
    if window:
        return _llama_like_config(file, "mistral", "MistralForCausalLM") | {"sliding_window": window}
    config = _llama_like_config(file, "llama", "LlamaForCausalLM")
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return config | {key: name in file.tensors for key, name in biases.items()}


def _neox_config(file: GgufFile) -> dict[str, Any]:
    config = _shared_config(file, "gpt_neox", "GPTNeoXForCausalLM")
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "rotary_pct": _value(file, "rope.dimension_count", head_dim) / head_dim,
        "layer_norm_eps": _value(file, "attention.layer_norm_epsilon"),
        "use_parallel_residual": bool(_value(file, "use_parallel_residual", True)),
        "hidden_act": "gelu",
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling; Llama 3's is told from the frequency factors that stand in its place."""
    trained = _value(file, "rope.scaling.original_context_length", None)
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, trained or 8192)
    kind = _value(file, "rope.scaling.type", "none")
    factor = _value(file, "rope.scaling.factor", _value(file, "rope.scale_linear", 1.0))
    if kind == "none" and factor == 1.0:
        return None
    kind = "linear" if kind == "none" else kind
    scaling = {"rope_type": kind, "factor": float(factor)}
    return scaling | ({"original_max_position_embeddings": trained} if trained else {})


def _llama3_scaling(file: GgufFile, trained: int) -> dict[str, Any]:
    """The parameters whose factors (transformers, modeling_rope_utils, `_compute_llama3_parameters`) the file has."""
    factors = read_gguf_tensor(file, "rope_freqs.weight").astype(np.float64).reshape(-1)
    base = float(_value(file, "rope.freq_base", 10000.0))
    factor, low, high = float(factors.max()), 1.0, 4.0
    wavelengths = 2 * math.pi * base ** (np.arange(factors.size) / factors.size)
    smooth = np.clip((trained / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UserError(f"{file.path}: its rope_freqs.weight are not Llama 3's, and no other kind is known")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }


# Row order


def _as_stored(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return tensor


def _unpermute_rotary(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of q and k: from pairs (i, i + 1) rotated together back to halves (i, i + head_dim / 2)."""
    if ".q_proj." in name:
        heads = config["num_attention_heads"]
    elif ".k_proj." in name:
        heads = config["num_key_value_heads"]
    else:
        return tensor
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def _interleave_qkv(name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Rows of query_key_value: from all of q, all of k, all of v back to q, k, v of each head in turn."""
    if ".query_key_value." not in name:
        return tensor
    heads = config["num_attention_heads"]
    parts = tensor.reshape(3, heads, tensor.shape[0] // heads // 3, *tensor.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(tensor.shape)


_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.attn_q": "model.layers.{}.self_attn.q_proj",
    "blk.{}.attn_k": "model.layers.{}.self_attn.k_proj",
    "blk.{}.attn_v": "model.layers.{}.self_attn.v_proj",
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_gate": "model.layers.{}.mlp.gate_proj",
    "blk.{}.ffn_up": "model.layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
}
_HEAD_NORMS = {
    "blk.{}.attn_q_norm": "model.layers.{}.self_attn.q_norm",
    "blk.{}.attn_k_norm": "model.layers.{}.self_attn.k_norm",
}
_NEOX_NAMES = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "blk.{}.attn_norm": "gpt_neox.layers.{}.input_layernorm",
    "blk.{}.attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
    "blk.{}.attn_output": "gpt_neox.layers.{}.attention.dense",
    "blk.{}.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "blk.{}.ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
}

FAMILIES = {
    "llama": GgufFamily(_llama_config, _LLAMA_NAMES, _unpermute_rotary),
    "qwen2": GgufFamily(
        functools.partial(_llama_like_config, model_type="qwen2", class_name="Qwen2ForCausalLM"),
        _LLAMA_NAMES,
        _as_stored,
    ),
    "qwen3": GgufFamily(
        functools.partial(_llama_like_config, model_type="qwen3", class_name="Qwen3ForCausalLM"),
        _LLAMA_NAMES | _HEAD_NORMS,
        _as_stored,
    ),
    "gptneox": GgufFamily(_neox_config, _NEOX_NAMES, _interleave_qkv),
}
