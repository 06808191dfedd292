"""The QLoRA step of each family compiles for one v5e chip, and between layers keeps no dequantized weight.

The tests' tiny models, made wide. A stack of layers is one scan, compiled as quickly for hundreds of layers as for two;
hundreds leave no doubt what grows with them, and do not fit the chip's own fast memory, which is outside the count.
"""

from __future__ import annotations

import math

import pytest
from tiny_models import CONFIGS, FAMILY_CASES

from tpu_tune.models import FAMILIES, architecture

CASES = [*FAMILY_CASES, "opt"]
LAYERS = 401  # a prime: no pattern repeats evenly, and nothing but a stack has a multiple of it elements
TOKENS, ENCODER_TOKENS, RANK = 192, 320, 8
WIDTH, INNER, HEAD, VOCABULARY = 512, 1280, 128, 4096
WIDE = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "n_positions": 2048, "sliding_window": 64,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], WIDTH),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_dim", "d_ff"], INNER),
    **dict.fromkeys(["head_dim", "d_kv"], HEAD),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads"], WIDTH // HEAD),
    "rotary_dim": HEAD // 2, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip


def wide(case):
    """Return a tiny model's config with wide and many layers; ratios and facts stay."""
    tiny = CONFIGS[case]
    found = {key: WIDE.get(key, value) for key, value in tiny.items()}
    for key in {"num_hidden_layers", "n_layer", "num_layers"} & set(tiny):
        found[key] = LAYERS
    if "num_key_value_heads" in tiny:
        found["num_key_value_heads"] = WIDTH // HEAD * tiny["num_key_value_heads"] // tiny["num_attention_heads"]
    if "word_embed_proj_dim" in tiny:
        found["word_embed_proj_dim"] = WIDTH * tiny["word_embed_proj_dim"] // tiny["hidden_size"]
    if "layer_types" in tiny:
        found["layer_types"] = (tiny["layer_types"] * LAYERS)[:LAYERS]
    return found


def test_every_family_is_compiled() -> None:
    assert {CONFIGS[case]["model_type"] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_no_dequantized_weight_outlives_its_layer(case, compile_steps) -> None:
    model = wide(case)
    config = {
        "method": "lora",
        "model": {"dtype": "bfloat16", "remat": "full"},
        "quantize": {"format": "nf4", "double_quant": True},
        "lora": {"rank": RANK},
        "train": {"per_device_train_batch_size": 1},
        "mesh": {"fsdp": 1},
    }
    job = {"model": model, "config": config, "rows": 1, "tokens": TOKENS, "encoder_tokens": ENCODER_TOKENS}
    (found,) = compile_steps(job)
    assert not found["dequantized"], "stacks of dequantized weights in the compiled step"
    arch = architecture(model)
    matrices = [module for module in arch.modules() if module.layers and module.kind == "linear"]
    layer = 2 * sum(math.prod(module.shape) for module in matrices)  # weights of one layer (of each stack), bfloat16
    residuals = LAYERS * (TOKENS + bool(arch.encoder) * ENCODER_TOKENS) * WIDTH * 2  # each layer's input, bfloat16
    # What belongs to the adapters: their gradients, float32, and their copies in bfloat16, and half as much again. The
    # dequantized stack of the smallest matrix would be more than that half.
    allowed = residuals + 2 * found["trained"] + layer + 4 * VOCABULARY * WIDTH
    smallest = 2 * LAYERS * min(math.prod(module.shape) for module in matrices)
    print(
        f"CASE2 {case} temp {found['temp'] / 1e6:.1f} allowed {allowed / 1e6:.1f} resid {residuals / 1e6:.1f} trained {found['trained'] / 1e6:.1f} layer {layer / 1e6:.1f} smallest {smallest / 1e6:.1f}"
    )
    assert found["temp"] <= allowed, (
        f"{found['temp'] / 1e6:.1f} MB of scratch, of which {allowed / 1e6:.1f} are accounted for"
    )
