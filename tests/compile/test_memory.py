"""The TPU compiler's own figures at a small Llama's sizes: how the scratch of a QLoRA step grows with the layers."""

from __future__ import annotations

import pytest
from compile_skips import needs_libtpu

WIDTH, INNER, TOKENS, ROWS = 512, 1408, 512, 4
DEEP, SHALLOW = 192, 96  # the residuals of fewer layers fit the fast memory of the chip, which is outside this count


def job(layers, remat="full", offload=False):
    """Return what `program.py` compiles."""
    llama = dict(
        model_type="llama",
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        hidden_act="silu",
        tie_word_embeddings=False,
    )
    config = dict(
        method="lora",
        model=dict(dtype="bfloat16", remat=remat),
        quantize=dict(format="nf4", double_quant=True),
        lora=dict(rank=8),
        train=dict(per_device_train_batch_size=ROWS, optim_offload=offload),
        mesh=dict(fsdp=1),
    )
    return dict(model=llama, config=config, rows=ROWS, tokens=TOKENS)


@pytest.fixture(scope="module")
def steps(compile_steps):
    """What was found of few layers, of many, and of many with what can wait in host memory there."""
    return compile_steps(job(SHALLOW), job(DEEP), job(DEEP, remat="offload", offload=True))


@needs_libtpu
def test_the_scratch_of_a_qlora_step_holds_no_dequantized_weight(steps) -> None:
    shallow, deep, _ = steps
    assert not shallow["dequantized"] and not deep["dequantized"], "stacks of dequantized weights in the compiled step"
    residuals = (DEEP - SHALLOW) * ROWS * TOKENS * WIDTH * 2  # each layer's input, bfloat16
    adapters = deep["trained"] - shallow["trained"]  # float32
    weights = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # one layer, bfloat16
    grown = deep["temp"] - shallow["temp"] - residuals
    # What belongs to the adapters: their gradients, their updates, their copies in bfloat16. The codes of as many
    # layers would be five times these, the dequantized stack of the smallest matrix nearly twice.
    assert grown <= 2 * adapters, f"{grown / 1e6:.1f} MB more than the residuals; the adapters are {adapters / 1e6:.1f}"
    # The codes are what is passed in: half a byte a weight, scales on top.
    per_layer = (deep["frozen"] - shallow["frozen"]) / (DEEP - SHALLOW)
    assert per_layer < 0.27 * weights


@needs_libtpu
def test_layer_inputs_and_optimizer_state_go_to_the_host(steps) -> None:
    _, here, host = steps
    residuals, state = DEEP * ROWS * TOKENS * WIDTH * 2, 2 * here["trained"]
    assert here["host"] == 0 and 0 <= host["host"] - residuals - state < 0.15 * state  # thin matrices are padded
    assert here["arguments"] - host["arguments"] > 0.99 * state
    assert here["temp"] - host["temp"] > 0.8 * (residuals - 100e6)  # some of them lay in the chip's fast memory before
