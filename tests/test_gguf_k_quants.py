"""Q4_K, Q5_K and Q6_K as ggml writes them, and llama-quantize's mixtures of formats.

`goldens/ggml_k_quants.npz` has the bytes that ggml's `ggml_quantize_chunk` (llama.cpp 11434) makes of `golden_values`.
Whole files are held against llama-quantize's in test_llama_cpp.py.
"""

import pathlib

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_tune.checkpoints.gguf_k_quants import QUANTIZERS, quantize
from tpu_tune.checkpoints.gguf_mixtures import FORMATS, fitting, formats_of

Format = gguf.GGMLQuantizationType
GOLDEN = pathlib.Path(__file__).parent / "goldens" / "ggml_k_quants.npz"
NUMBERS = sorted(QUANTIZERS)


def golden_values() -> np.ndarray:
    """Rows of 512: weights as models have them, and what a search may stumble over."""
    values = (np.random.default_rng(5).standard_normal((10, 512)) * 0.02).astype(np.float32)
    values[2] = 0
    values[3, :256] = 0.5
    values[3, 256:288] = 0
    values[4], values[5] = np.abs(values[4]), -np.abs(values[5])
    values[6] *= 1e4
    values[7, ::7] = 1
    values[8] = np.round(values[8] * 100) / 100
    return values


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_blocks_are_ggmls_to_the_byte(number):
    with np.load(GOLDEN) as golden:
        assert np.array_equal(quantize(golden_values(), number), golden[number.name])


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@given(seed=st.integers(0, 2**31), power=st.integers(-3, 6))
def test_values_times_a_power_of_two_are_read_back_times_it(number, seed, power):
    values = np.random.default_rng(seed).standard_normal((2, 256)).astype(np.float32)
    read, scaled = (
        gguf.dequantize(quantize(part, number), number) for part in (values, values * np.float32(2.0**power))
    )
    assert np.array_equal(scaled, read * np.float32(2.0**power))


def names_of(layers: int, tied: bool = False, fused: bool = False) -> list[str]:
    parts = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    parts += ["attn_norm", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    inside = [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in parts]
    return ["token_embd.weight", "output_norm.weight", *inside, *([] if tied else ["output.weight"])]


def metadata_of(layers: int, **more: int) -> dict[str, object]:
    """Metadata of a Llama; `more` by the keys' last parts."""
    own = {f"llama.{key.replace('head_', 'attention.head_')}": value for key, value in more.items()}
    return {"general.architecture": "llama", "llama.block_count": layers, **own}


def layers_with(formats: dict[str, Format], part: str, number: Format) -> list[int]:
    return [int(name.split(".")[1]) for name, found in formats.items() if part in name and found == number]


@pytest.mark.parametrize("kind", ["q4_k_m", "q5_k_m"])
def test_values_and_down_projections_of_some_layers_have_more_bits(kind):
    """The layers that llama-quantize chose in SmolLM2-135M, whose 30 layers are tied to their head."""
    formats = formats_of(names_of(30, tied=True), metadata_of(30, head_count=9, head_count_kv=3), kind)
    chosen = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert layers_with(formats, "attn_v", Format.Q6_K) == layers_with(formats, "ffn_down", Format.Q6_K) == chosen
    assert formats["token_embd.weight"] == Format.Q6_K
    assert formats["blk.0.ffn_up.weight"] == FORMATS[kind][0]


def test_fused_attention_counts_as_values_and_an_untied_head_leaves_the_embedding_at_the_default():
    formats = formats_of(names_of(8, fused=True), metadata_of(8), "q4_k_m")
    assert layers_with(formats, "attn_qkv", Format.Q6_K) == [0, 3, 6, 7]
    assert formats["output.weight"] == Format.Q6_K
    assert formats["token_embd.weight"] == Format.Q4_K


def test_shared_values_of_70b_and_attention_beside_eight_experts_have_more_bits():
    large = formats_of(names_of(80), metadata_of(80, head_count=64, head_count_kv=8), "q4_k_m")
    assert large["blk.10.attn_v.weight"] == Format.Q5_K
    mixtral = formats_of(names_of(4), metadata_of(4, expert_count=8), "q4_k_m")
    assert mixtral["blk.1.attn_k.weight"] == mixtral["blk.1.attn_v.weight"] == Format.Q8_0
    assert mixtral["blk.1.attn_output.weight"] == Format.Q5_K


@pytest.mark.parametrize(
    ("number", "row", "found"),
    [
        (Format.Q4_K, 512, Format.Q4_K),
        (Format.Q4_K, 576, Format.Q5_0),
        (Format.Q5_K, 576, Format.Q5_1),
        (Format.Q6_K, 576, Format.Q8_0),
        (Format.Q6_K, 40, Format.F16),
        (Format.Q4_0, 40, Format.F16),
        (Format.BF16, 40, Format.BF16),
    ],
)
def test_rows_that_blocks_do_not_divide_have_smaller_blocks(number, row, found):
    assert fitting(number, row) == found
