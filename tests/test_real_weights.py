"""Bits per byte of real models on a real text, against values that were measured outside this project."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest

from tpu_tune.checkpoints.source import open_source

EXPECTED = {"smollm2_gguf": 1.116, "gemma3_gguf": 0.972}  # bfloat16 weights, windows of 512 tokens of Brown

spec = importlib.util.spec_from_file_location(
    "quantized_perplexity", pathlib.Path(__file__).parent.parent / "benchmarks" / "quantized_perplexity.py"
)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


@pytest.mark.parametrize("fixture", EXPECTED)
def test_bits_per_byte(fixture, request, brown_dir):
    source = open_source(str(request.getfixturevalue(fixture)))
    text = benchmark.brown_text(brown_dir, 16_000)
    ids, targets = benchmark.encode(source, text, 512)
    found = benchmark.measure(source, ids, targets, benchmark.VARIANTS["bfloat16"], 4)
    assert found["tokens"] == np.sum(targets >= 0) > 3000
    bits = found["loss"] / math.log(2) / len(text.encode())
    assert abs(bits / EXPECTED[fixture] - 1) < 0.005
