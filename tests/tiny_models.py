"""Tiny random models for the tests: a table of configs, and weights that NumPy makes from each tensor's name.

A new family is new rows in `CONFIGS`; `make_goldens.py` asks torch `transformers` for their logits.
"""

from __future__ import annotations

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file

from tpu_tune.checkpoints.params import load_params, torch_shapes
from tpu_tune.checkpoints.source import WeightSource
from tpu_tune.models import architecture

GOLDENS = pathlib.Path(__file__).parent / "goldens"
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
        "qwen3", head_dim=8, num_hidden_layers=4, use_sliding_window=True, sliding_window=4, attention_bias=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "neox_parallel": _neox(use_parallel_residual=True),
    "neox_sequential": _neox(use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=20000),
    "neox_full_rotary": _neox(rotary_pct=1.0, attention_bias=False, tie_word_embeddings=True),
    "neox_parameters": _neox(
        rope_parameters={"rope_type": "default", "rope_theta": 15000.0, "partial_rotary_factor": 0.5}
    ),
}  # fmt: skip
FAMILY_CASES = ["llama2", "mistral_window", "qwen2_upper_windows", "qwen3_alternating", "neox_parallel"]


def input_ids(case="", rows=2, length=TOKENS):
    """Return (rows, length) token ids that depend on the case's name alone."""
    return np.random.default_rng(zlib.crc32(case.encode())).integers(3, _SIZES["vocab_size"], (rows, length))


def weights(config):
    """Return Hugging Face tensor name -> float32 array in torch layout; large enough that nothing is nearly linear."""
    tensors = {}
    for name, shape in torch_shapes(architecture(config)).items():
        random = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if "embed_tokens" in name or "embed_in" in name:
            scale, shift = 1.0, 0.0
        elif "norm" in name and name.endswith(".weight"):
            scale, shift = 0.2, 1.0
        else:
            scale, shift = (1.5 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.2), 0.0
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


def torch_model(directory):
    """Load a directory with torch transformers, in float32; nothing may be missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def torch_logits(model, ids):
    """Return a torch model's float32 logits as NumPy."""
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(ids)), use_cache=False).logits.float().numpy()


def difference(found, expected):
    """Return max|found - expected| / max|expected|, the measure of `within 1e-4`."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()
