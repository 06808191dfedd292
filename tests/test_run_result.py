"""A run that was stopped can be used: its checkpoints are exported, loaded, judged and pushed like a result."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from typing import Any

import helpers_training as helpers
import numpy as np
import pytest

import tpu_tune
from tpu_tune import UserError
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.cli import main
from tpu_tune.inference.run_result import find_step

IDS = np.random.default_rng(0).integers(0, 258, (1, 12))
LOSSES = {3: 2.0, 6: 1.5, 9: 1.8}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """`lora`, `full`, `ends` (with adapted embedding): runs stopped at step 9; `reference/RUN/STEP`: their results."""
    home = tmp_path_factory.mktemp("home")
    base = helpers.write_tiny_llama(home / "base")
    rows = helpers.write_rows(home / "rows.jsonl", 8)
    (home / "own.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}")
    ends = {"lora__target_modules": ["q_proj", "embed_tokens"], "lora__modules_to_save": ["norm"]}
    for name, keys in (
        ("lora", {"quantize__format": "int8", "data__chat_template": str(home / "own.jinja")}),
        ("full", {"method": "full"}),
        ("ends", ends),
    ):
        config = helpers.make_config(
            output_dir=str(home / name),
            model__path=str(base),
            model__dtype="float32",
            lora__rank=2,
            data__train=str(rows),
            data__eval=str(rows),
            data__num_workers=1,
            data__cache_dir=str(home / "cache"),
            mesh__fsdp=1,
            **keys,
        )
        helpers.write_stopped_run(config, LOSSES, home / "reference" / name)
    return home


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def changed(home: pathlib.Path, folder: pathlib.Path, name: str = "lora", **keys: Any) -> pathlib.Path:
    """A copy of a run with other settings in its config.json."""
    shutil.copytree(home / name, folder / "run")
    config = json.loads((folder / "run" / "config.json").read_text())
    for key, value in keys.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (folder / "run" / "config.json").write_text(json.dumps(config))
    return folder / "run"


def refusal(capsys: pytest.CaptureFixture, *words: Any) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", ["lora", "full", "ends"])
def test_a_checkpoint_exports_what_training_would_have_written(caplog, home, tmp_path, name):
    for words, step in (([], 9), (["--step", "3"], 3), (["--step", "best"], 6), (["--step", "last"], 9)):
        caplog.clear()
        out = tmp_path / f"of {step} {len(words)}"
        assert main(["export", str(home / name), *words, "--output", str(out)]) == 0
        assert files(out) == files(home / "reference" / name / str(step))
        assert ("has not ended: these are the weights of its last checkpoint, step 9 of 18" in caplog.text) == (
            not words
        )


@pytest.mark.parametrize("name", ["lora", "full", "ends"])
def test_merged_and_gguf_exports_are_those_of_the_result(capsys, home, tmp_path, name):
    run = RunDirectory(home / name)
    shutil.copytree(home / name, tmp_path / "ended")
    result = pathlib.Path(RunDirectory(tmp_path / "ended").result(run.config().method))
    shutil.copytree(home / "reference" / name / "6", result)
    for form, output in (["--merge"], "merged"), (["--merge", "--dtype", "bfloat16"], "half"), (["--gguf"], "m.gguf"):
        figures = []
        for source, words in ((tmp_path / "ended", []), (home / name, ["--step", "6"])):
            out = tmp_path / f"{source.name}-{len(words)}" / output
            out.parent.mkdir(exist_ok=True)
            capsys.readouterr()
            assert main(["export", str(source), *form, *words, "--output", str(out), "--json"]) == 0
            held = files(out) if out.is_dir() else out.read_bytes()
            figures.append((held, {**json.loads(capsys.readouterr().out), "output": ""}))
        assert figures[0] == figures[1]
    assert (tmp_path / "ended-0" / "m.Modelfile").read_text().startswith("FROM ./m.gguf\n")
    stored = json.loads((tmp_path / "ended-0" / "half" / "config.json").read_text())
    assert stored["torch_dtype"] == "bfloat16"  # of a run that trained every weight too


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_run_is_loaded_by_its_name(capsys, home, name):
    for step in (None, 3, "best"):
        reference = str(home / "reference" / name / {None: "9", 3: "3", "best": "6"}[step])
        model = tpu_tune.load(str(home / name), step=step)
        if name == "full":
            expected = tpu_tune.load(reference)
        else:  # as it was trained: over its quantized base, with its own template
            expected = tpu_tune.load(str(home / "base"), quantize="int8", adapter=reference)
            assert model.tokenizer.chat_template.startswith("{% for m in messages %}[")
            over_base = tpu_tune.load(str(home / "base"), quantize="int8", adapter=str(home / name), step=step)
            np.testing.assert_array_equal(over_base(IDS), expected(IDS))
        np.testing.assert_array_equal(model(IDS), expected(IDS))
    words = ["--no-chat", "--greedy", "--max-new-tokens", "4", "--prompt", "a", "--json"]
    assert main(["generate", "--model", str(home / name), "--step", "6", *words]) == 0
    assert (
        json.loads(capsys.readouterr().out)["answer"]
        == model.generate(["a"], tpu_tune.inference.Sampling(max_new_tokens=4), chat=False)[0]
    )


def test_evaluation_takes_a_checkpoint(capsys, home):
    losses = []
    for words in (
        ["--model", str(home / "lora"), "--step", "6"],
        ["--model", str(home / "lora"), "--adapter", str(home / "reference" / "lora" / "6")],
    ):
        assert main(["eval", *words, "--limit", "2", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        losses.append(report["eval_loss"])
        assert report["model"] == str(home / "lora") + (", step 6" if "--step" in words else f" + {words[-1]}")
    assert losses[0] == losses[1]


def test_push_says_which_step(capsys, home):
    assert main(["push", str(home / "lora"), "--step", "6", "--repo", "me/x", "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "the checkpoint of step 6 of 18" in told["card"] and "6 steps, 0.60 epochs" in told["card"]
    assert "| **6** | **0.60** | **1.5000** |" in told["card"] and "- loss\n" not in told["card"]
    sizes = {file["name"]: file["bytes"] for file in told["files"]}
    weights = home / "reference" / "lora" / "6" / "adapter_model.safetensors"
    assert sizes["adapter_model.safetensors"] == weights.stat().st_size


def test_the_best_is_the_default_where_the_run_would_end_with_it(caplog, home, tmp_path):
    run = RunDirectory(changed(home, tmp_path, train__load_best_model_at_end=True))
    assert find_step(run, run.config()) == 6
    assert "the weights of its best checkpoint, step 6" in caplog.text
    shutil.rmtree(run.file("checkpoints", "6"))
    caplog.clear()
    assert find_step(run, run.config()) == 9
    assert "lowest at step 6 (1.5000), of which no checkpoint is left; step 9 has 1.8000" in caplog.text


def test_a_result_that_the_run_has_gone_on_from_is_not_taken(caplog, home, tmp_path):
    run = RunDirectory(changed(home, tmp_path))
    shutil.copytree(home / "reference" / "lora" / "6", run.file("adapter"))
    run.update_summary({"result_step": 9})
    assert find_step(run, run.config()) is None
    run.update_summary({"result_step": 6})
    assert find_step(run, run.config()) == 9 and "has not ended" in caplog.text


def test_what_cannot_be_taken_is_one_line(capsys, caplog, home, tmp_path):
    caplog.set_level(logging.ERROR)
    lora, out = home / "lora", str(tmp_path / "out")
    said = refusal(capsys, "export", lora, "--step", "4", "--output", out)
    assert "has no checkpoint of step 4; it has 3, 6, 9" in said
    assert "no run directory" in refusal(capsys, "generate", "--model", home / "base", "--step", "4", "--prompt", "a")
    assert "the base is the same at every step" in refusal(
        capsys, "export", lora, "--base", "--step", "3", "--output", out
    )
    with pytest.raises(SystemExit):
        main(["export", str(lora), "--step", "-1", "--output", out])
    with pytest.raises(UserError, match="step 3 is a checkpoint of the run, which --adapter replaces"):
        tpu_tune.load(str(lora), adapter=str(home / "reference" / "lora" / "3"), step=3)
    with pytest.raises(UserError, match="full trained every weight, so it has no adapter"):
        tpu_tune.load(str(home / "base"), adapter=str(home / "full"))
    empty = RunDirectory(changed(home, tmp_path))
    shutil.rmtree(empty.checkpoints)
    with pytest.raises(UserError, match="has no adapter/ yet, and no checkpoint; let the training go on"):
        tpu_tune.load(str(empty.path))


def test_a_changed_base_and_a_damaged_checkpoint_are_refused(capsys, home, tmp_path):
    helpers.write_tiny_llama(tmp_path / "other", seed=5)
    run = changed(home, tmp_path, model__path=str(tmp_path / "other"))
    said = refusal(capsys, "export", run, "--step", "3", "--output", tmp_path / "x")
    assert "the base model" in said and "has changed since it was written" in said
    for file in (run / "checkpoints" / "9" / "state").rglob("*"):
        if file.is_file() and "d" in file.parent.name:
            file.write_bytes(file.read_bytes()[:10])
    said = refusal(capsys, "export", run, "--step", "9", "--output", tmp_path / "x")
    assert "checkpoints/9 cannot be read" in said and not (tmp_path / "x").exists()
