"""The benchmarks themselves: selected jobs leave the file's other rows alone; the GPU's with tiny shapes; faults."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import random
import shlex
import subprocess
import sys

import pytest

from tpu_tune.errors import UserError

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
        "30b-a3b-v5e-8": None,
        "8x7b-v5e-8": None,
        "8x7b-a100": None,
        **dict.fromkeys(("qwen3.5-9b-v5e-1", "gemma-4-31b-v5e-8", "gpt-oss-20b-v5e-4", "gpt-oss-20b-v5e-1")),
        **dict.fromkeys(("qwen3-14b-t4x2", "qwen3-32b-v5e-8")),
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


@pytest.fixture(scope="module")
def fault_files():
    return script("fault_files")


def test_damage_follows_from_the_seed_and_is_damage(fault_files):
    whole = json.dumps({"a": [1, {"b": "c"}], "d": None}).encode()
    made = [fault_files.damage(whole, random.Random(seed), False, True) for seed in range(200)]
    assert made == [fault_files.damage(whole, random.Random(seed), False, True) for seed in range(200)]
    assert len(set(made)) > 100 and sum(content != whole for content in made) > 180
    rows = b'{"a": 1}\n{"a": 2}\n'
    assert len({fault_files.damage(rows, random.Random(seed), False, True) for seed in range(50)}) > 30


def test_the_outcomes_of_damaged_files(fault_files, tmp_path):
    def read(folder):
        content = (folder / "a.bin").read_bytes()
        if len(content) < 64:
            raise UserError("a.bin is cut short")
        assert content == bytes(64), "not what was written"

    kind = fault_files.Kind({"a.bin": bytes(64), "b": b""}, "a.bin", read)
    found = {fault_files.outcome(kind, random.Random(seed), tmp_path)[0] for seed in range(40)}
    assert found == {"right", "one line", "difference"}
    broken = fault_files.Kind({"a.bin": bytes(64)}, "a.bin", lambda folder: 1 / 0)
    assert fault_files.outcome(broken, random.Random(0), tmp_path)[0] == "traceback"


def test_damaged_files_of_a_run_are_one_line_or_right(fault_files, tmp_path):
    for name, kind in fault_files._run_kinds().items():
        for number in range(4):
            found = fault_files.outcome(kind, random.Random(f"{name} {number}"), tmp_path / f"{name} {number}")
            assert found[0] in ("right", "one line"), (name, number, found)


def test_the_table_of_the_campaign():
    faults = script("faults")
    results = {
        "kills": {"found": {"data run": {"right": 9, "lost": 1}}},
        "files": {"found": {"a": {"right": 2, "one line": 3}, "b": {"crash": 1, "right": 1}}},
    }
    assert faults.table(results).splitlines()[2:] == [
        "| kills | data run | 10 | 9 | 0 | 1 | 0 | 0 | 0 |",
        "| files | 2 kinds | 7 | 3 | 3 | 0 | 0 | 0 | 1 |",
    ]


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_kaggle_notebook_tells_its_row_of_the_memory_table(memory, kind):
    """The memory in its first cell is the compiler's for the notebook's own settings."""
    (job,) = [job for job in memory.JOBS if f"kaggle_{kind}_qlora" in job.words]
    row = memory.read(memory.TARGET.read_text())[job.name]
    text = (BENCHMARKS.parent / "notebooks" / f"kaggle_{kind}_qlora.ipynb").read_text()
    title, *cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    assert f"**{row['peak']} GB of" in title and row[""] == "holds"
    settings = next(cell for cell in cells if cell.startswith("%matplotlib"))
    length, dtype = job.overrides["data.max_length"], job.overrides.get("model.dtype", "bfloat16")
    assert f'DEVICE = device or "{job.device}"' in settings and f"TOKENS = {length} if device" in settings
    assert f'DTYPE = "{dtype}" if device' in settings and f'"{job.model}"' in settings
    assert f"ROWS = {job.overrides['train.per_device_train_batch_size']}  #" in settings


def test_a_peer_that_is_not_installed_is_one_line_that_says_what_to_install():
    command = [sys.executable, "-S", str(BENCHMARKS / "tunix_step.py"), "{}", "nowhere"]  # -S: no packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "has no jax: pip install google-tunix qwix" in done.stderr and "--python PATH" in done.stderr
