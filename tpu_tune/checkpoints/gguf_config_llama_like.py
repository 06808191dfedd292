"""From GGUF metadata to config.json, as in gguf_config.py, for the families of 2024 to 2026 that descend from Llama."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpu_tune.checkpoints.gguf_config import biases_of, llama_like_config, metadata_value, shared_config
from tpu_tune.checkpoints.gguf_file import GgufFile
from tpu_tune.errors import UserError


def smollm3_config(file: GgufFile) -> dict[str, Any]:
    """SmolLM3: llama.cpp leaves every fourth layer without rotary positions."""
    config = llama_like_config(file, "smollm3", "SmolLM3ForCausalLM")
    rotated = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    return config | biases_of(file) | {"no_rope_layers": rotated, "use_sliding_window": False}


def olmo2_config(file: GgufFile) -> dict[str, Any]:
    """OLMo 2, and OLMo 3, which llama.cpp stores as an OLMo 2 with windows; only the others' rope is stretched."""
    window = metadata_value(file, "attention.sliding_window", 0)
    if not window:
        return llama_like_config(file, "olmo2", "Olmo2ForCausalLM") | {"attention_bias": False}
    config = llama_like_config(file, "olmo3", "Olmo3ForCausalLM")
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    return config | {
        "attention_bias": False,
        "sliding_window": window,
        "layer_types": _layer_types(file, 4),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": theta, **(scaling or {})},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(metadata_value(file, "rope.freq_base_swa", theta)),
            },
        },
    }


def granite_config(file: GgufFile) -> dict[str, Any]:
    """Granite 3 and Granite 4's dense models, which llama.cpp stores alike."""
    if not metadata_value(file, "rope.scaling.finetuned", True):
        raise UserError(f"{file.path}: a Granite without rotary positions, which is not supported")
    config = llama_like_config(file, "granite", "GraniteForCausalLM") | biases_of(file)
    return config | {
        "attention_multiplier": metadata_value(file, "attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": metadata_value(file, "embedding_scale", 1.0),
        "residual_multiplier": metadata_value(file, "residual_scale", 1.0),
        "logits_scaling": metadata_value(file, "logit_scale"),
    }


def glm_config(file: GgufFile) -> dict[str, Any]:
    """GLM-4 of 2024, which llama.cpp calls chatglm."""
    return _glm(file, "glm", "GlmForCausalLM")


def glm4_config(file: GgufFile) -> dict[str, Any]:
    """GLM-4 of 2025."""
    return _glm(file, "glm4", "Glm4ForCausalLM")


def _glm(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    config = shared_config(file, model_type, class_name)
    heads = config["num_attention_heads"]
    head_dim = metadata_value(file, "attention.key_length", config["hidden_size"] // heads)
    return config | {
        "num_key_value_heads": metadata_value(file, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "partial_rotary_factor": metadata_value(file, "rope.dimension_count", head_dim) / head_dim,
        "rms_norm_eps": metadata_value(file, "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }


def ministral3_config(file: GgufFile) -> dict[str, Any]:
    """Ministral 3's text model."""
    config = llama_like_config(file, "ministral3", "Ministral3ForCausalLM")
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    multiplier = metadata_value(file, "rope.scaling.yarn_log_multiplier", 0)
    if multiplier:
        scaling |= {"mscale": 1.0, "mscale_all_dim": float(multiplier)}
    scaling["llama_4_scaling_beta"] = float(metadata_value(file, "attention.temperature_scale", 0.0))
    return config | {"rope_scaling": scaling, "sliding_window": None}


def cohere_config(file: GgufFile) -> dict[str, Any]:
    """Command R and Aya, which llama.cpp calls command-r."""
    return _cohere(file, "cohere", "CohereForCausalLM")


def cohere2_config(file: GgufFile) -> dict[str, Any]:
    """Command R7B: three layers with a window to each one without."""
    return _cohere(file, "cohere2", "Cohere2ForCausalLM") | {
        "sliding_window": metadata_value(file, "attention.sliding_window"),
        "layer_types": _layer_types(file, 4),
    }


def _cohere(file: GgufFile, model_type: str, class_name: str) -> dict[str, Any]:
    config = shared_config(file, model_type, class_name)
    return config | {
        "num_key_value_heads": metadata_value(file, "attention.head_count_kv", config["num_attention_heads"]),
        "layer_norm_eps": metadata_value(file, "attention.layer_norm_epsilon"),
        "logit_scale": metadata_value(file, "logit_scale"),
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
    }


def seed_oss_config(file: GgufFile) -> dict[str, Any]:
    config = llama_like_config(file, "seed_oss", "SeedOssForCausalLM")
    biases = {"attention_bias": "blk.0.attn_q.bias", "attention_out_bias": "blk.0.attn_output.bias"}
    return config | {key: name in file.tensors for key, name in biases.items()} | {"mlp_bias": False}


def exaone4_config(file: GgufFile) -> dict[str, Any]:
    """EXAONE 4: llama.cpp knows the 32B model, the one with windows, by its layers."""
    config = llama_like_config(file, "exaone4", "Exaone4ForCausalLM")
    layers = config["num_hidden_layers"]
    if layers != 64:
        types = ["full_attention"] * layers
        return config | {"sliding_window": None, "sliding_window_pattern": None, "layer_types": types}
    window = metadata_value(file, "attention.sliding_window", 4096)
    return config | {"sliding_window": window, "sliding_window_pattern": "LLLG", "layer_types": _layer_types(file, 4)}


def _layer_types(file: GgufFile, period: int) -> list[str]:
    """Hugging Face's layer_types, from a flag for each layer or the period of the layers without a window."""
    layers, key = metadata_value(file, "block_count"), "attention.sliding_window_pattern"
    windows = file.metadata.get(f"{file.metadata['general.architecture']}.{key}")
    if not isinstance(windows, (list, np.ndarray)):
        period = metadata_value(file, key, period)
        windows = [bool(period) and (layer + 1) % period != 0 for layer in range(layers)]
    if len(windows) != layers:
        raise UserError(f"{file.path}: {key} has {len(windows)} entries for {layers} layers")
    return ["sliding_attention" if one else "full_attention" for one in windows]
