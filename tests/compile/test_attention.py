"""Attention as the devices' own compilers see it: rows that are cut over TPUs, and the GPUs' kernels."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
TOKENS, HEADS, GROUPS = 8192, 16, 4


def scratch(*jobs: tuple[str, str]) -> list[int]:
    """Return the bytes of scratch of (device, implementation) each."""
    code = (
        "import json, sys; from attention_memory import scratch; "
        f"print(json.dumps([scratch(*one, {TOKENS}, {HEADS}, {GROUPS}) for one in json.loads(sys.argv[1])]))"
    )
    env = os.environ | {
        "PYTHONPATH": f"{BENCHMARKS.parent}{os.pathsep}{BENCHMARKS}", "XLA_FLAGS": "",
        "JAX_DEFAULT_MATMUL_PRECISION": "default",
    }  # fmt: skip
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


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jax[cuda13], the compiler")
def test_gpu_kernels_compile_for_old_and_new_cards_and_take_linear_memory() -> None:
    names = [(card, kernel) for card in ("rtx3090", "h100") for kernel in ("blockwise", "pallas", "cudnn")]
    found = dict(zip(names, scratch(*names), strict=True))
    states = TOKENS * HEADS * 128 * 2  # what the queries take, bfloat16
    for card, kernel in names:
        if kernel != "blockwise":
            assert found[card, kernel] < 5 * states and found[card, kernel] < found[card, "blockwise"]
