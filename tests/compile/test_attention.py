"""Attention as the devices' own compilers see it: rows that are cut over TPUs, and the GPUs' kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
from compile_skips import needs_cuda

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
TOKENS, HEADS, GROUPS = 8192, 16, 4


def scratch(*jobs: tuple[str, str]) -> list[int]:
    """Return the bytes of scratch of (device, implementation) each."""
    code = (
        "import json, sys; from attention_memory import scratch; "
        f"print(json.dumps([scratch(*one, {TOKENS}, {HEADS}, {GROUPS}) for one in json.loads(sys.argv[1])]))"
    )
    path = [str(BENCHMARKS.parent), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "XLA_FLAGS": "",
        "JAX_DEFAULT_MATMUL_PRECISION": "default",
    }
    words = [sys.executable, "-c", code, json.dumps(jobs)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_row_over_eight_devices_takes_less_than_what_the_partitioner_makes_of_it() -> None:
    """The ring where there is no kernel, splash where there is."""
    ring, partitioned, splash, also_partitioned = scratch(
        ("v2-8", "ring"), ("v2-8", "partitioner"), ("v5e-8", "splash"), ("v5e-8", "partitioner")
    )
    assert ring < 0.6 * partitioned and splash < 0.6 * also_partitioned


def holds_linear_memory(kernel: str) -> None:
    names = [(card, each) for card in ("rtx3090", "h100") for each in ("blockwise", kernel)]
    found = dict(zip(names, scratch(*names), strict=True))
    states = TOKENS * HEADS * 128 * 2  # what the queries take, bfloat16
    for card in ("rtx3090", "h100"):
        assert found[card, kernel] < 5 * states and found[card, kernel] < found[card, "blockwise"]


@needs_cuda
def test_the_pallas_kernel_compiles_for_old_and_new_cards_and_takes_linear_memory() -> None:
    holds_linear_memory("pallas")


@needs_cuda
@pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.cudnn") is None,
    reason="needs cuDNN, which '.[cuda-compiler]' leaves out: pip install '.[cuda13]'",
)
def test_cudnn_compiles_for_old_and_new_cards_and_takes_linear_memory() -> None:
    holds_linear_memory("cudnn")
