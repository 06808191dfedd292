"""Quantized products stay near the peak of a TPU's matrix units, by the instructions that its compiler writes."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from compile_skips import needs_libtpu

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "tpu_speed.py"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["4096x4096", "4096x11008", "11008x4096", "4096x14336", "14336x4096"])
def test_products_are_near_the_peak_forward_and_backward(shape):
    env = {**os.environ, "XLA_FLAGS": "", "JAX_DEFAULT_MATMUL_PRECISION": "default"}  # of the tests: the highest
    command = [sys.executable, str(BENCHMARK), "--kernel", "--format", "nf4,int4,int8", "--shape", shape]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found = re.findall(r"\| ([\d,]+) \| (forward|backward) \| .*\| ([\d.]+)% \|", done.stdout)
    print(done.stdout)
    assert len(found) == 12, done.stdout
    for tokens, _, peak in found:
        assert float(peak) >= (85 if tokens == "2,048" else 70), done.stdout
