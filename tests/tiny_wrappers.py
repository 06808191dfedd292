"""Tiny random multimodal models, made and saved by torch transformers, for the tests of `wrappers.py`."""

from __future__ import annotations

import pathlib
import zlib
from typing import Any

import numpy as np

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
_SIGLIP, _CLIP = {"model_type": "siglip_vision_model", **SIGHT}, {"model_type": "clip_vision_model", **SIGHT}
_QWEN_SIGHT = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
_AUDIO = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "d_model": 16,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 8,
}  # fmt: skip
_LLAMA, _QWEN2 = {"model_type": "llama", **TEXT}, {"model_type": "qwen2", **TEXT}
_MROPE = {"rope_type": "default", "rope_theta": 20000.0, "mrope_section": [1, 1, 2]}


def _mistral(**changes: Any) -> dict[str, Any]:
    return {"model_type": "mistral", **TEXT, "head_dim": 8, "sliding_window": None, **changes}


# case -> class and keyword arguments of its config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3",
        {
            "text_config": {
                "model_type": "gemma3_text", **TEXT, "head_dim": 16, "num_hidden_layers": 3, "sliding_window": 5,
                "sliding_window_pattern": 3, "query_pre_attn_scalar": 16, "vocab_size": 104,
            },
            "vision_config": _SIGLIP, "mm_tokens_per_image": 4, "image_token_index": 97, "boi_token_index": 98,
            "eoi_token_index": 99,
        },
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": _mistral(), "tie_word_embeddings": False, "image_token_index": 90,
            "vision_config": {"model_type": "pixtral", **SIGHT, "head_dim": 8},
        },
    ),
    "mistral3_tied": (
        "Mistral3",
        {
            "text_config": _mistral(), "tie_word_embeddings": True, "image_token_index": 90,
            "vision_config": {"model_type": "pixtral", **SIGHT, "head_dim": 8},
        },
    ),
    "ministral3": (
        "Mistral3",
        {
            "text_config": _mistral(
                model_type="ministral3",
                rope_parameters={
                    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 8,
                    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                    "llama_4_scaling_beta": 0.1,
                },
            ),
            "tie_word_embeddings": False, "image_token_index": 90,
            "vision_config": {"model_type": "pixtral", **SIGHT, "head_dim": 8},
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "text_config": {**TEXT, "rope_parameters": _MROPE}, "tie_word_embeddings": True,
            "vision_config": {**_QWEN_SIGHT, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
                              "window_size": 16, "fullatt_block_indexes": [0]},
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "text_config": {**TEXT, "head_dim": 8, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
            "tie_word_embeddings": False,
            "vision_config": {**_QWEN_SIGHT, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
                              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "text_config": {
                **TEXT, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                "linear_key_head_dim": 8, "linear_value_head_dim": 6,
                "layer_types": ["linear_attention", "full_attention"],
                "rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
            },
            "tie_word_embeddings": False,
            "vision_config": {**_QWEN_SIGHT, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
                              "num_position_embeddings": 16},
        },
    ),
    "llava": ("Llava", {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": 90}),
    "smolvlm": (
        "SmolVLM",
        {"text_config": _LLAMA, "vision_config": SIGHT, "image_token_id": 90, "scale_factor": 1},
    ),
}  # fmt: skip
_GEMMA4_TEXT = {
    **TEXT, "head_dim": 8, "global_head_dim": 16, "num_hidden_layers": 6, "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 20.0,
}  # fmt: skip
_GEMMA4_IDS = {f"{name}_token_id": 90 + number for number, name in enumerate(("boi", "eoi", "image", "video", "boa"))}
CASES["gemma4"] = (
    "Gemma4",
    {
        "text_config": {
            **_GEMMA4_TEXT, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
            "num_kv_shared_layers": 3,
        },
        "vision_config": {**SIGHT, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16},
        "audio_config": None, **_GEMMA4_IDS,
    },
)  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 6,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 16,
                "layer_types": ["linear_attention", "full_attention"],
                "rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5},
            },
            "tie_word_embeddings": False,
            "vision_config": {
                **_QWEN_SIGHT,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {**TEXT, "rope_parameters": _MROPE},
            "vision_config": {**_QWEN_SIGHT, "embed_dim": 16, "hidden_size": 32},
        },
    ),
    "gemma4_unified": (
        "Gemma4Unified",
        {
            "text_config": {**_GEMMA4_TEXT, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
            "vision_config": {
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 8,
                "output_proj_dims": 32,
            },
            "audio_config": {"audio_embed_dim": 16},
            **_GEMMA4_IDS,
        },
    ),  # fmt: skip
    "llava_next": (
        "LlavaNext",
        {"text_config": _mistral(sliding_window=6), "vision_config": _CLIP, "image_token_index": 90},
    ),
    "llava_next_video": (
        "LlavaNextVideo",
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_index": 90},
    ),
    "vipllava": (
        "VipLlava",
        {
            "text_config": _LLAMA,
            "vision_config": {**_CLIP, "num_hidden_layers": 1},
            "vision_feature_layers": [0],
            "image_token_index": 90,
        },
    ),
    "llava_onevision": (
        "LlavaOnevision",
        {"text_config": _QWEN2, "vision_config": _SIGLIP, "image_token_index": 90},
    ),
    "internvl": (
        "InternVL",
        {
            "text_config": _QWEN2,
            "vision_config": {**SIGHT, "image_size": [8, 8], "patch_size": [4, 4]},
            "image_token_id": 90,
            "tie_word_embeddings": False,
        },
    ),
    "idefics2": (
        "Idefics2",
        {
            "text_config": _mistral(),
            "vision_config": SIGHT,
            "perceiver_config": {
                "hidden_size": 32,
                "n_latents": 2,
                "depth": 1,
                "n_heads": 2,
                "head_dim": 8,
                "num_key_value_heads": 1,
            },
            "image_token_id": 90,
        },
    ),
    "idefics3": (
        "Idefics3",
        {
            "text_config": _LLAMA,
            "vision_config": SIGHT,
            "image_token_id": 90,
            "scale_factor": 1,
        },
    ),
    "voxtral": (
        "Voxtral",
        {"text_config": _LLAMA, "audio_config": _AUDIO, "audio_token_id": 90},
    ),
    "qwen2_audio": (
        "Qwen2Audio",
        {"text_config": _QWEN2, "audio_config": _AUDIO, "audio_token_index": 90},
    ),
}


def torch_class(case: str) -> Any:
    """Return the multimodal class of a case."""
    import transformers

    return getattr(transformers, f"{(CASES | MORE)[case][0]}ForConditionalGeneration")


def save(case: str, directory: pathlib.Path) -> str:
    """Make a case's model with weights that are far from linear, save it as transformers does, and return where."""
    import torch
    import transformers

    name, settings = (CASES | MORE)[case]
    config = getattr(transformers, f"{name}Config")(**settings)
    model = torch_class(case)(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            shape = tuple(value.shape)
            random = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
            spread, middle = (1.5 / np.sqrt(shape[-1]), 0.0) if len(shape) > 1 else (0.2, float("norm" in name))
            value.copy_(torch.tensor(random * (1.0 if "embed_tokens" in name else spread) + middle))
    model.save_pretrained(directory)
    return str(directory)


def opened(case: str, directory: Any) -> Any:
    """Load a saved model with its multimodal class; nothing may be missing or left over."""
    import torch

    model, info = torch_class(case).from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()
