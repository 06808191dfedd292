"""The QLoRA step of each family compiles for one v5e chip, and between layers keeps no dequantized weight.

The tests' tiny models, made wide. A stack of layers is one scan, compiled as quickly for hundreds of layers as for two;
hundreds leave no doubt what grows with them, and do not fit the chip's own fast memory, which is outside the count.
"""

from __future__ import annotations

import math

import pytest
from compile_skips import needs_cuda, needs_libtpu
from tiny_models import CONFIGS, FAMILY_CASES, mostly_slow

from tpu_tune.models import FAMILIES, architecture

CASES = [*FAMILY_CASES, "opt"]
COMPILED = mostly_slow(CASES, ("llama2", "t5"))
LAYERS = 401  # a prime: no pattern repeats evenly, and nothing but a stack has a multiple of it elements
TOKENS, ENCODER_TOKENS, RANK = 192, 320, 8
WIDTH, INNER, HEAD, VOCABULARY = 512, 1280, 128, 4096
WIDE = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "n_positions": 2048,
    "sliding_window": 64,
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], WIDTH),
    **dict.fromkeys(["intermediate_size", "shared_intermediate_size", "n_inner", "ffn_dim", "d_ff"], INNER),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 6 * HEAD),
    **dict.fromkeys(["head_dim", "d_kv"], HEAD),
    "global_head_dim": 2 * HEAD,
    "hidden_size_per_layer_input": 2 * HEAD,
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads"], WIDTH // HEAD),
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    "rotary_dim": HEAD // 2,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def wide(case, layers=LAYERS):
    """Return a tiny model's config with wide and many layers; ratios and facts stay."""
    tiny = CONFIGS[case]
    if tiny.get("num_kv_shared_layers"):  # there must be layers to share with
        layers = max(layers, tiny["num_hidden_layers"])
    found = {key: value and WIDE.get(key, value) for key, value in tiny.items()}  # what is not there stays away
    for key in {"num_hidden_layers", "n_layer", "num_layers"} & set(tiny):
        found[key] = layers
    if "num_key_value_heads" in tiny:
        found["num_key_value_heads"] = WIDTH // HEAD * tiny["num_key_value_heads"] // tiny["num_attention_heads"]
    if "word_embed_proj_dim" in tiny:
        found["word_embed_proj_dim"] = WIDTH * tiny["word_embed_proj_dim"] // tiny["hidden_size"]
    if "layer_types" in tiny:
        found["layer_types"] = (tiny["layer_types"] * layers)[:layers]
    return found


def test_every_family_is_compiled() -> None:
    assert {CONFIGS[case]["model_type"] for case in CASES} == set(FAMILIES)


def job(case, layers=LAYERS):
    """Return what `program.py` compiles."""
    config = {
        "method": "lora",
        "model": {"dtype": "bfloat16", "remat": "full"},
        "quantize": {"format": "nf4", "double_quant": True},
        "lora": {"rank": RANK},
        "train": {"per_device_train_batch_size": 1},
        "mesh": {"fsdp": 1},
    }
    return {
        "model": wide(case, layers),
        "config": config,
        "rows": 1,
        "tokens": TOKENS,
        "encoder_tokens": ENCODER_TOKENS,
    }


@pytest.fixture(scope="module")
def compiled(compile_steps, request):
    """What was found of each case that is to run, all compiled in one go."""
    here = [item for item in request.session.items if item.path == request.path]
    params = [item.callspec.params for item in here if hasattr(item, "callspec")]
    cases = [each["case"] for each in params if "case" in each]
    return dict(zip(cases, compile_steps(*map(job, cases)), strict=True))


@needs_libtpu
@pytest.mark.parametrize("case", COMPILED)
def test_no_dequantized_weight_outlives_its_layer(case, compiled) -> None:
    check(case, compiled[case])


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("h100", marks=needs_cuda), pytest.param("v5e-8", marks=needs_libtpu)])
def test_no_stack_of_experts_is_dequantized_on_a_gpu_or_a_mesh(compile_steps, device) -> None:
    """Neither all layers' nor one layer's; on a mesh the codes are gathered."""
    shards = 8 if device == "v5e-8" else 1
    one = job("qwen3_moe", 31)
    one |= {"device": device, "rows": shards}
    one["config"]["mesh"]["fsdp"] = shards
    (found,) = compile_steps(one)
    assert not found["dequantized"]
    if shards > 1:
        arch = architecture(wide("qwen3_moe", 31))
        inner = arch.experts.width * arch.hidden_size * arch.experts.count // 2  # bytes of a layer's codes
        assert any(
            shape.startswith("u8") and math.prod(map(int, shape[3:-1].split(","))) == inner
            for shape in found["gathered"]
        )


def check(case, found) -> None:
    """Hold what the compiler said against what a step has to keep."""
    assert not found["dequantized"], "stacks of dequantized weights in the compiled step"
    arch = architecture(wide(case))
    matrices = [module for module in arch.modules() if module.layers and module.kind == "linear"]
    # one layer's weights (of each stack) in bfloat16
    layer = 2 * sum(math.prod(module.shape) * (module.experts or 1) for module in matrices)
    # XLA turns the experts' biases, a layer's few rows of them padded to eight
    biases = 4 * LAYERS * sum(module.shape[1] * -(-module.experts // 8) * 8 for module in matrices if module.bias)
    embedding = 2 * VOCABULARY * WIDTH
    residuals = LAYERS * (TOKENS + bool(arch.encoder) * ENCODER_TOKENS) * WIDTH * 2  # each layer's input, bfloat16
    # each layer's own input (Gemma 4's): the projection, its norm, their sum and a gradient, in float32
    inputs = 16 * LAYERS * TOKENS * arch.layer_input_size
    # What belongs to the adapters: their gradients in float32, their copies in bfloat16, and half as much again.
    allowed = residuals + 2 * found["trained"] + layer + 2 * embedding + biases + inputs
    assert LAYERS * layer > 5 * allowed  # else the next line would say little
    assert found["temp"] <= allowed, f"{found['temp'] / 1e6:.1f} MB of scratch; {allowed / 1e6:.1f} are accounted for"
