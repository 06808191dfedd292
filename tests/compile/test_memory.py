"""The TPU compiler's own figures at the sizes of a small Llama: what the scratch of a QLoRA step grows by with layers."""

from __future__ import annotations

from compile_skips import needs_libtpu

WIDTH, INNER, TOKENS, ROWS = 512, 1408, 512, 4
DEEP, SHALLOW = 192, 96  # the residuals of fewer layers fit the fast memory of the chip, which is outside this count


def job(layers):
    """Return what `program.py` compiles."""
    llama = dict(
        model_type="llama", vocab_size=4096, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
        rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
    )  # fmt: skip
    config = dict(
        method="lora", model=dict(dtype="bfloat16", remat="full"), quantize=dict(format="nf4", double_quant=True),
        lora=dict(rank=8), train=dict(per_device_train_batch_size=ROWS), mesh=dict(fsdp=1),
    )  # fmt: skip
    return dict(model=llama, config=config, rows=ROWS, tokens=TOKENS)


@needs_libtpu
def test_the_scratch_of_a_qlora_step_holds_no_dequantized_weight(compile_steps) -> None:
    shallow, deep = compile_steps(job(SHALLOW), job(DEEP))
    assert not shallow["dequantized"] and not deep["dequantized"], "stacks of dequantized weights in the compiled step"
    residuals = (DEEP - SHALLOW) * ROWS * TOKENS * WIDTH * 2  # each layer's input, bfloat16
    adapters = deep["trained"] - shallow["trained"]  # float32
    weights = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)  # one layer, bfloat16
    grown = deep["temp"] - shallow["temp"] - residuals
    # What belongs to the adapters: their gradients, their updates, their copies in bfloat16. The codes of as many layers
    # would be five times these, the dequantized stack of the smallest matrix nearly twice.
    assert grown <= 2 * adapters, f"{grown / 1e6:.1f} MB more than the residuals; the adapters are {adapters / 1e6:.1f}"
    # The codes are what is passed in: half a byte a weight, scales on top.
    per_layer = (deep["frozen"] - shallow["frozen"]) / (DEEP - SHALLOW)
    assert per_layer < 0.27 * weights
