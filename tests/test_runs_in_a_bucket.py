"""Every command that takes a run takes one in a bucket, and does the same with it as with one on a disk."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import fake_gcs
import fsspec
import jax
import numpy as np
import pytest
from helpers_training import make_config, write_rows, write_stopped_run, write_tiny_llama

import tpu_tune
from tpu_tune.checkpoints import huggingface_write, peft, storage
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.cli import main
from tpu_tune.training.evaluate_only import evaluate_only
from tpu_tune.transforms import LoraConfig, find_targets, lora

IDS = np.random.default_rng(0).integers(0, 258, (1, 12))


def write_run(directory: pathlib.Path, base: pathlib.Path, rows: pathlib.Path, method: str) -> None:
    """A finished run of random weights."""
    config = make_config(
        output_dir=str(directory),
        method=method,
        model__path=str(base),
        model__dtype="float32",
        data__train=str(rows),
        data__eval=str(rows),
        data__num_workers=1,
        data__max_length=64,
        data__cache_dir=str(directory.parent / "cache"),
        quantize__format="none" if method == "full" else "int8",
        lora__rank=2,
    )
    run = RunDirectory(directory)
    run.write_config(config)
    metrics = MetricsFile(run)
    for step in range(1, 9):
        metrics.append({"step": step, "epoch": step / 8, "loss": 3 - step / 8, "learning_rate": 1e-3})
    metrics.append({"step": 8, "epoch": 1.0, "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_token_accuracy": 0.5})
    run.update_summary({"trainable_parameters": 99, "vocab_size": 258, "data": {"train": {"format": "text"}}})
    (directory / "curves.png").write_bytes(b"\x89PNG of the curves")
    source = open_source(str(base))
    arch = open_architecture(source)
    random = np.random.default_rng(1)
    if method == "full":
        params = load_params(source, arch)
        trained = {path: leaf + random.standard_normal(leaf.shape).astype(np.float32) for path, leaf in params.items()}
        huggingface_write.write_model(str(directory / "model"), trained, source, arch)
        return
    targets = find_targets(arch.modules(), LoraConfig(rank=2, alpha=16.0), arch.default_targets)
    fresh = lora.init(targets, {}, jax.random.key(0))
    trained = {name: random.standard_normal(leaf.shape).astype(np.float32) / 4 for name, leaf in fresh.items()}
    peft.write_adapter(str(directory / "adapter"), trained, targets, arch, str(base))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    home = tmp_path_factory.mktemp("home")
    write_tiny_llama(home / "base")
    write_rows(home / "rows.jsonl", 8)
    for method in ("lora", "full"):
        write_run(home / method, home / "base", home / "rows.jsonl", method)
        config = RunDirectory(home / method).config()
        config.output_dir, config.mesh.fsdp = str(home / f"stopped-{method}"), 1
        write_stopped_run(config, {4: 2.0, 8: 2.5})
    return home


@pytest.fixture(scope="module")
def bucket(home: pathlib.Path) -> Iterator[str]:
    """`gs://bucket/runs` with what lies in `home`, for this process."""
    gcsfs = pytest.importorskip("gcsfs")
    server, store = fake_gcs.serve()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in fake_gcs.environment(server).items():
            patch.setenv(key, value)
        for scheme in ("gs", "gcs"):  # fsspec reads its part of the environment when it is imported
            patch.setitem(fsspec.config.conf, scheme, {"token": "anon"})
        gcsfs.GCSFileSystem.clear_instance_cache()
        for file in home.rglob("*"):
            if file.is_file():
                store.put(f"runs/{file.relative_to(home)}", file.read_bytes())
        yield "gs://bucket/runs"
        gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()


def told(capsys: pytest.CaptureFixture, *words: Any, status: int = 0) -> Any:
    """Run a command with --json; return what it prints, or the line that refuses."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == status
    captured = capsys.readouterr()
    if status:
        assert captured.err.count("\n") == 1
        return captured.err
    lines = captured.out.splitlines()
    return [json.loads(line) for line in lines] if len(lines) > 1 else json.loads(lines[0])


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_export_of_an_adapter(capsys, bucket, home, tmp_path):
    told(capsys, "export", f"{bucket}/lora", "--output", tmp_path / "adapter")
    assert files(tmp_path / "adapter") == files(home / "lora" / "adapter")
    told(capsys, "export", f"{bucket}/full", "--output", tmp_path / "model")  # which has no adapter
    assert files(tmp_path / "model") == files(home / "full" / "model")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stopped_run(capsys, bucket, home, tmp_path, method):
    for name, place in (("a", home), ("b", bucket)):
        (tmp_path / name).mkdir()
        told(capsys, "export", f"{place}/stopped-{method}", "--output", tmp_path / name / "last")
        told(capsys, "export", f"{place}/stopped-{method}", "--step", "4", "--output", tmp_path / name / "4")
    mine, theirs = files(tmp_path / "b"), files(tmp_path / "a")
    assert mine == theirs and len(set(mine.values())) < len(mine)
    near, far = (tpu_tune.load(f"{place}/stopped-{method}", step="best") for place in (home, bucket))
    np.testing.assert_array_equal(near(IDS), far(IDS))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("form", ["--merge", "--gguf"])
def test_export_of_a_model(capsys, bucket, home, tmp_path, method, form):
    ending = ".gguf" if form == "--gguf" else ""
    figures = []
    for name, run in (("a", home / method), ("b", f"{bucket}/{method}")):
        (tmp_path / name).mkdir()
        figures.append(told(capsys, "export", run, form, "--output", tmp_path / name / f"model{ending}"))
    mine, theirs = files(tmp_path / "b"), files(tmp_path / "a")
    assert mine == theirs and mine
    assert {**figures[0], "output": ""} == {**figures[1], "output": ""}


@pytest.mark.parametrize("form", [[], ["--merge"], ["--gguf"]])
def test_export_into_a_bucket(capsys, bucket, tmp_path, form):
    name, there = "result.gguf" if form == ["--gguf"] else "result", f"{bucket}/{tmp_path.name}"
    for place in (there, tmp_path):
        told(capsys, "export", f"{bucket}/lora", *form, "--output", f"{place}/{name}")
    assert files(pathlib.Path(storage.local_copy(there))) == files(tmp_path)
    text = told(capsys, "export", f"{bucket}/lora", *form, "--output", f"{there}/{name}", status=1)
    assert "is there already" in text


@pytest.mark.parametrize("method", ["lora", "full"])
def test_generate_with_a_run(capsys, bucket, home, method):
    words = ("--prompt", "Hello", "--no-chat", "--greedy", "--max-new-tokens", 8)
    there = told(capsys, "generate", "--model", f"{bucket}/{method}", *words)
    assert there == told(capsys, "generate", "--model", home / method, *words)


def test_generate_with_an_adapter(capsys, bucket, home):
    words = ("--prompt", "Hello", "--no-chat", "--greedy", "--max-new-tokens", 8, "--model", home / "base")
    there = told(capsys, "generate", "--adapter", f"{bucket}/lora/adapter", *words)
    assert there == told(capsys, "generate", "--adapter", home / "lora" / "adapter", *words)


def test_load_with_an_adapter(bucket, home):
    near, far = (tpu_tune.load(str(home / "base"), adapter=f"{place}/lora/adapter") for place in (home, bucket))
    np.testing.assert_array_equal(near(IDS), far(IDS))
    near, far = (tpu_tune.load(f"{place}/full/model") for place in (home, bucket))
    np.testing.assert_array_equal(near(IDS), far(IDS))
    with pytest.raises(tpu_tune.UserError, match=f"{bucket}/absent/adapter_config.json: there is no such file"):
        tpu_tune.load(str(home / "base"), adapter=f"{bucket}/absent")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_eval_of_a_run_beside_its_base(capsys, bucket, home, method):
    near, far = (told(capsys, "eval", "--model", f"{place}/{method}", "--base") for place in (home, bucket))
    assert near.pop("model") == str(home / method) and far.pop("model") == f"{bucket}/{method}"
    assert near == far and near["difference"]["eval_loss"]["value"] != 0


@pytest.mark.parametrize("method", ["lora", "full"])
def test_eval_of_a_configs_own_run(bucket, home, method):
    config = RunDirectory(home / method).config()
    near = evaluate_only(config, lambda line: None)
    config.output_dir = f"{bucket}/{method}"
    far = evaluate_only(config, lambda line: None)
    assert far.pop("evaluated").startswith(bucket) and near.pop("evaluated").startswith(str(home))
    assert far.pop("eval_runtime") and near.pop("eval_runtime") and near == far


@pytest.mark.parametrize("form", [[], ["--merge"], ["--gguf"], ["--card-only"]])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_push_dry_run(capsys, bucket, home, method, form):
    near, far = (
        told(capsys, "push", f"{place}/{method}", "--repo", "me/x", "--dry-run", *form) for place in (home, bucket)
    )
    assert near == far and "curves.png" in [file["name"] for file in far["files"]]
    assert "gs://" not in far["card"] and str(home) not in far["card"]


def test_curves_of_runs(capsys, bucket, home, tmp_path):
    near, far = (told(capsys, "curves", f"{place}/lora", f"{place}/full") for place in (home, bucket))
    for place, runs in ((home, near["runs"]), (bucket, far["runs"])):
        assert [run.pop("run") for run in runs] == [f"{place}/lora", f"{place}/full"]
    assert json.loads(json.dumps(near).replace(str(home), bucket)) == far
    told(capsys, "curves", f"{bucket}/lora", "--output", tmp_path / "c.png", "--html", f"{bucket}/report.html")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert b"<html" in storage.read_bytes(f"{bucket}/report.html")


@pytest.mark.parametrize(
    "words", [["export", "RUN", "--output", "x"], ["push", "RUN", "--repo", "me/x", "--dry-run"], ["curves", "RUN"]]
)
def test_a_run_that_is_not_there_is_one_line(capsys, bucket, words):
    run = f"{bucket}/absent"
    assert run in told(capsys, *[run if word == "RUN" else word for word in words], status=1)
