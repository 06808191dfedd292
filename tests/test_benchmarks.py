"""The benchmarks themselves: selected jobs leave the file's other rows alone; the GPU's benchmark with tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import shlex
import subprocess
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def script(name):
    """Import one of the scripts, which are not part of the package and import each other from their folder."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def memory():
    return script("memory")


def figures(peak, fits=True, compiler="libtpu 1"):
    parts = dict.fromkeys(("frozen", "trainable", "gradients", "optimizer", "batch", "padding"), 1_000_000_000)
    return {
        "peak_bytes_per_device": peak,
        "capacity_bytes_per_device": 16_000_000_000,
        "fits": fits,
        "compiler": compiler,
        "breakdown": {**parts, "scratch": 2_500_000_000},
        "host_bytes_per_device": 0,
    }


def test_a_selection_renews_its_rows_and_keeps_the_others(memory, tmp_path, monkeypatch):
    file = tmp_path / "MEMORY.md"
    first, second = memory.JOBS[:2]
    found = {first.name: figures(5_000_000_000), second.name: figures(9_600_000_000)}
    monkeypatch.setattr(memory, "measure", lambda job: found[job.name])
    assert memory.main(["--only", second.name, "--output", str(file)]) == 1  # above its bar of 9.5
    assert memory.main(["--only", first.name, "--output", str(file)]) == 0
    rows = memory.read(file.read_text())
    assert list(rows) == [first.name, second.name]  # in the jobs' order, whatever the order of measuring
    assert (rows[first.name]["peak"], rows[first.name][""]) == ("5.00", "holds")
    assert (rows[second.name]["peak"], rows[second.name][""]) == ("9.60", "**fails**")
    found[second.name] = figures(9_500_000_000)
    assert memory.main(["--only", second.name, "--output", str(file)]) == 0
    again = memory.read(file.read_text())
    assert again[first.name] == rows[first.name] and again[second.name][""] == "holds"
    assert memory.write(again) == file.read_text()
    for job in (first, second):
        assert shlex.split(again[job.name]["command"]) == ["tpu-tune", *job.arguments]


def test_what_does_not_fit_or_was_not_compiled_is_no_success(memory, tmp_path, monkeypatch, capsys):
    file = tmp_path / "MEMORY.md"
    job = next(job for job in memory.JOBS if job.bar is None)
    assert not memory.holds(job, figures(None, fits=False)) and memory.holds(job, figures(1))
    done = subprocess.CompletedProcess([], 0, stdout=memory.json.dumps(figures(1, compiler="none (not there)")))
    monkeypatch.setattr(memory.subprocess, "run", lambda *arguments, **words: done)
    assert memory.main(["--only", job.name, "--output", str(file)]) == 1
    assert "no compiler" in capsys.readouterr().err and not file.exists()


def test_the_bars_are_the_issues(memory):
    bars = {job.name: job.bar for job in memory.JOBS}
    assert bars == {
        "7b-v5e-1": 5.4,
        "13b-v5e-1": 9.5,
        "20b-v5e-1": None,
        "7b-v2-8": 2.0,
        "7b-v3-8": 2.0,
        "33b-rtx3090": 21.6,
        "65b-rtx6000ada": 41.0,
        "65b-v2-8": None,
        "7b-full-v3-8": None,
        "8b-rtx4080": None,
        "8b-rtx4090": None,
    }
    longest = {job.name: job.overrides["data.max_length"] for job in memory.JOBS}
    assert longest["8b-rtx4080"] > 40_724 and longest["8b-rtx4090"] > 78_475


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_shapes(capfd):
    gpu = script("gpu")
    words = "--model tiny --method qlora full --tokens 32 --rows 2 --steps 1 --rounds 2 --warm 0 --json"
    assert gpu.main(words.split()) == 0
    results = {each["method"]: each for each in json.loads(capfd.readouterr().out)["results"]}
    assert list(results) == ["qlora", "full"]
    layer = 4 * 128 * 128 + 3 * 128 * 256
    weights = 2 * layer + 512 * 128  # what a token is multiplied with
    adapters = 2 * 16 * (4 * (128 + 128) + 3 * (128 + 256))
    seen = 12 * 128 * 2 * 64 * (32 + 1) / 2
    assert results["full"]["facts"]["flops"] == pytest.approx(6 * weights * 64 + seen)
    assert results["qlora"]["facts"]["flops"] == pytest.approx(4 * weights * 64 + 6 * adapters * 64 + seen)
    for method, result in results.items():
        sides = [side for side in ("ours", "theirs") if side in result]
        assert ("theirs" in sides) == (not gpu.missing(method))
        for side in sides:
            assert result[side]["trainable"] == (adapters if method == "qlora" else weights + 512 * 128 + 5 * 128)
            assert result[side]["tokens_per_second"] == pytest.approx(64 / result[side]["step_seconds"])
            # A fresh model knows nothing: the loss begins at ln(512). One batch again and again: it falls.
            assert result[side]["losses"][0] == pytest.approx(math.log(512), abs=0.1)
            assert result[side]["losses"][-1] < result[side]["losses"][0]
