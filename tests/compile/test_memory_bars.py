"""The promised jobs stay below their bars, by the devices' own compilers: the commands of benchmarks/memory.py.

One of a TPU's takes minutes. A bar that does not hold yet is not listed here; benchmarks/MEMORY.md shows it.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import pytest
from compile_skips import needs_cuda, needs_libtpu
from tiny_models import mostly_slow

HOLD: tuple[str, ...] = ("33b-rtx3090", "65b-rtx6000ada", "8b-rtx4080")  # of a GPU, compiled in seconds
HOLD_SLOWLY: tuple[str, ...] = (
    "7b-v5e-1",
    "13b-v5e-1",
    "20b-v5e-1",
    "7b-v2-8",
    "7b-v3-8",
    "65b-v2-8",
    "7b-full-v3-8",
)  # of a TPU, compiled in minutes


def memory():
    """Return benchmarks/memory.py, which is a script and not part of the package."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("benchmark_memory", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def check(name):
    benchmark = memory()
    job = next(job for job in benchmark.JOBS if job.name == name)
    figures = benchmark.measure(job)
    assert benchmark.holds(job, figures), f"{figures['peak_bytes_per_device'] / 1e9:.2f} GB, the bar is {job.bar}"


@needs_cuda
@pytest.mark.parametrize("name", mostly_slow(HOLD, ("8b-rtx4080",)))
def test_a_job_on_a_gpu_stays_below_its_bar(name):
    check(name)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", HOLD_SLOWLY)
def test_a_job_on_a_tpu_stays_below_its_bar(name):
    check(name)
