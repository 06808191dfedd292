"""Gemma 4's configuration as GGUF metadata, and back: keys that differ from layer to layer are arrays there."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpu_tune.checkpoints.gguf_config import common_config, metadata_value
from tpu_tune.checkpoints.gguf_file import GgufFile, read_gguf_tensor
from tpu_tune.errors import UserError
from tpu_tune.models import architecture

_STANDS_STILL = 1e30  # what the converter divides a frequency by that is not to turn


def gemma4_config(file: GgufFile) -> dict[str, Any]:
    """Return the content of config.json."""
    layers = metadata_value(file, "block_count")
    is_sliding = [bool(one) for one in _by_layer(file, "attention.sliding_window_pattern", layers)]
    inner = _by_layer(file, "feed_forward_length", layers)
    kv_heads = dict(zip(is_sliding, _by_layer(file, "attention.head_count_kv", layers), strict=True))
    shared = metadata_value(file, "attention.shared_kv_layers", 0)
    full = [layer for layer in range(layers - shared) if not is_sliding[layer]]
    k_eq_v = not any(f"blk.{layer}.attn_v.weight" in file.tensors for layer in full)
    head_dim = metadata_value(file, "attention.key_length")
    frequencies = read_gguf_tensor(file, "rope_freqs.weight") if "rope_freqs.weight" in file.tensors else np.ones(1)
    per_layer = file.tensors.get("per_layer_token_embd.weight")
    common = common_config(file, "gemma4_text", "Gemma4ForCausalLM")
    return common | {
        "hidden_size": metadata_value(file, "embedding_length"),
        "intermediate_size": inner[0],
        "use_double_wide_mlp": bool(shared) and inner[-1] == 2 * inner[0],
        "num_hidden_layers": layers,
        "num_kv_shared_layers": shared,
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in is_sliding],
        "num_attention_heads": metadata_value(file, "attention.head_count"),
        "num_key_value_heads": kv_heads.get(True, kv_heads.get(False)),
        "num_global_key_value_heads": kv_heads.get(False) if k_eq_v else None,
        "attention_k_eq_v": k_eq_v,
        "head_dim": metadata_value(file, "attention.key_length_swa", head_dim),
        "global_head_dim": head_dim,
        "hidden_size_per_layer_input": metadata_value(file, "embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": per_layer.shape[0] if per_layer else common["vocab_size"],
        "max_position_embeddings": metadata_value(file, "context_length"),
        "sliding_window": metadata_value(file, "attention.sliding_window"),
        "rms_norm_eps": metadata_value(file, "attention.layer_norm_rms_epsilon"),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "final_logit_softcapping": metadata_value(file, "final_logit_softcapping", None),
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(metadata_value(file, "rope.freq_base_swa", 10000.0)),
            },
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": float(metadata_value(file, "rope.freq_base", 1000000.0)),
                "partial_rotary_factor": float(np.mean(frequencies < _STANDS_STILL / 2)),
            },
        },
    }


def gemma4_metadata(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata, without the architecture's prefix, and the tensor that says which frequencies turn.

    Raises:
      UserError: llama.cpp has something else built in.
    """
    arch = architecture(config)
    kinds = arch.layer_kinds
    is_sliding = [kind.window is not None for kind in kinds]
    own = sum(kind.keys_from is None for kind in kinds)
    full, sliding = (next((kind for kind in kinds if (kind.window is None) == is_full), None) for is_full in (1, 0))
    if sliding is None or {arch.heads(kind)[1] for kind in kinds} != {arch.heads(one)[1] for one in (full, sliding)}:
        raise UserError("GGUF cannot express a Gemma 4 without windows, or with several sizes of heads beside them")
    if arch.qkv_bias or arch.activation != "gelu_tanh":
        raise UserError("GGUF cannot express biases or another activation in a Gemma 4; export it with --merge")
    if any(kind.keys_from not in (None, own - 1 - (kind.window is not None)) for kind in kinds):
        raise UserError(
            "llama.cpp shares the keys and values of the last two layers that have any; export with --merge"
        )
    if (sliding.rope.kind, full.rope.kind, full.rope.factor) != ("default", "proportional", 1.0):
        raise UserError("GGUF cannot express these rope_parameters of a Gemma 4; export it with --merge")
    inner = [kind.intermediate_size for kind in kinds]
    kv_heads = [arch.heads(kind)[0] for kind in kinds]
    (_, head_dim), (_, sliding_head_dim) = arch.heads(full), arch.heads(sliding)
    turning = np.arange(head_dim // 2) < full.rope.turning
    cap = {} if arch.logit_soft_cap is None else {"final_logit_softcapping": float(arch.logit_soft_cap)}
    return cap | {
        "context_length": arch.max_positions,
        "embedding_length": arch.hidden_size,
        "embedding_length_per_layer_input": arch.layer_input_size,
        "feed_forward_length": inner[0] if len({*inner}) == 1 else inner,
        "block_count": arch.num_layers,
        "vocab_size": arch.vocab_size,
        "attention.head_count": arch.num_heads,
        "attention.head_count_kv": kv_heads[0] if len({*kv_heads}) == 1 else kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.key_length_swa": sliding_head_dim,
        "attention.value_length_swa": sliding_head_dim,
        "attention.layer_norm_rms_epsilon": float(arch.norm_eps),
        "attention.sliding_window": sliding.window,
        "attention.sliding_window_pattern": is_sliding,
        "attention.shared_kv_layers": arch.num_layers - own,
        "rope.dimension_count": head_dim,
        "rope.dimension_count_swa": sliding_head_dim,
        "rope.freq_base": full.rope.theta,
        "rope.freq_base_swa": sliding.rope.theta,
    }, {"rope_freqs.weight": np.where(turning, 1.0, _STANDS_STILL).astype(np.float32)}


def _by_layer(file: GgufFile, key: str, layers: int) -> list[int]:
    """Return a value for each layer, of which the file has one or as many."""
    full = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(full)
    if not isinstance(value, (list, np.ndarray)):
        return [metadata_value(file, key)] * layers
    numbers = np.asarray(value)
    if numbers.shape != (layers,) or numbers.dtype.kind not in "biu" or (numbers < 0).any():
        raise UserError(f"{file.path}: {full} must have one whole number for each of the {layers} layers")
    return [int(number) for number in numbers]
