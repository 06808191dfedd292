"""Which way to run a step is taken where the configuration leaves it open, and what becomes of the choice."""

from __future__ import annotations

import dataclasses
import importlib

import jax
import pytest

from tpu_tune import config as configuration
from tpu_tune import planning
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.cli.memory_check import as_planned
from tpu_tune.curves import report
from tpu_tune.curves.runs import CurveRun
from tpu_tune.planning import choice, compile_step
from tpu_tune.planning.suggest import suggest
from tpu_tune.training.execution import REMAT, remat, token_chunk
from tpu_tune.training.run_start import open_run

GB = 1e9


def settings(**changes):
    """A full fine-tuning of SmolLM2-135M, two rows of 2,048 tokens; `changes` are dotted keys with `__` for the dot."""
    config = configuration.default()
    config.method, config.model.path, config.data.max_length = "full", "smollm2-135m", 2048
    config.train.per_device_train_batch_size = config.train.per_device_eval_batch_size = 2
    for key, value in changes.items():
        configuration.assign(config, key.replace("__", "."), value)
    return configuration.check(config)


@pytest.fixture(autouse=True)
def bytes_are_counted_here(monkeypatch):
    module = importlib.import_module("tpu_tune.planning.figures")
    monkeypatch.setattr(
        module, "run_job", lambda job, kind, timeout=0.0: compile_step.measure({**job, "compile": False})
    )


def within(capacity, **changes):
    """The plan for a GPU of so many bytes."""
    device = dataclasses.replace(planning.find_device("h200"), capacity=int(capacity))
    return planning.plan(settings(**changes), device)


def test_the_ways_go_from_the_fastest_to_the_smallest_and_leave_alone_what_is_set():
    keys = [tuple(way.values()) for way in choice.ways(settings())]
    assert keys == [("none", 0), ("dots", 0), ("full", 0), ("full", 512)]
    assert choice.ways(settings(model__remat="dots")) == [{"model.remat": "dots", "model.token_chunk_size": 0}]
    assert [way["model.token_chunk_size"] for way in choice.ways(settings(model__token_chunk_size=64))] == [64] * 3
    full = [tuple(way.values()) for way in choice.ways(settings(model__remat="full"))]
    assert full == [("full", 0), ("full", 512)]
    assert len(choice.ways(settings(model__remat="full", model__token_chunk_size=512))) == 1
    many = [tuple(way.values()) for way in choice.ways(settings(data__max_length=8192))]
    assert many[2:] == [("full", 16384), ("full", 4096), ("full", 512)]  # 0 would stand for 4,096 there


def test_the_fastest_way_that_fits_is_taken_and_said():
    plenty = within(100 * GB)
    assert plenty["chosen"]["model.remat"] == "none" and plenty["fits"]
    assert "model.token_chunk_size" not in plenty["chosen"]
    # The same estimate of bytes, with the margin of one that no compiler confirms, decides of less memory.
    tight = within(plenty["peak_bytes_per_device"])
    assert tight["chosen"]["model.remat"] == "dots" and "none needs" in tight["chosen"]["why"]
    assert tight["step"]["hardware_flops"] > plenty["step"]["hardware_flops"]
    least = within(3 * GB)
    assert (least["chosen"]["model.remat"], least["chosen"]["model.token_chunk_size"]) == ("full", 512)
    assert "model.remat=dots: the fastest that fits, by an estimate of its bytes" in planning.table(tight)
    assert within(3 * GB, model__remat="none")["chosen"] is None
    chunks = within(3 * GB, model__remat="full")["chosen"]  # of what is set, only the tokens are left open
    assert chunks["model.token_chunk_size"] == 512 and "model.remat" not in chunks


def test_the_compiler_has_the_last_word(monkeypatch):
    """It finds the first way too large, refuses the second, and takes the third."""
    answers = [
        {"fits": True, "peak": int(200 * GB), "arguments": 0, "host": 0, "program": ""},
        jax.errors.JaxRuntimeError("a kernel is too large"),
        {"fits": True, "peak": int(9 * GB), "arguments": 0, "host": 0, "program": ""},
    ]

    def compile_one(*_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    module = importlib.import_module("tpu_tune.planning.figures")
    monkeypatch.setattr(module, "run_job", lambda job, kind, timeout=0.0: compile_step.measure(job))
    monkeypatch.setattr(compile_step, "find_devices", lambda job: (jax.devices("cpu")[:1], "a compiler", ""))
    monkeypatch.setattr(compile_step, "compile_one", compile_one)
    found = planning.plan(settings(), "h100", evaluate=False)
    assert found["chosen"]["model.remat"] == "full" and not answers
    assert found["chosen"]["why"] == "the fastest that fits, by the compiler; none needs 200.0 GB, dots needs more"


def test_a_plan_says_what_its_time_is_from():
    found = within(100 * GB)
    time = found["step"]["time"]
    assert time["how"] == "by FLOPs at 40% of the device's peak"
    assert time["mfu"] == pytest.approx(found["step"]["flops"] / time["seconds"] / 989e12)
    assert time["tokens_per_second"] == pytest.approx(found["step"]["tokens"] / time["seconds"])
    assert "tokens a second, MFU" in planning.table(found) and "not measured" in planning.table(found)
    found["step"]["time"] = {**time, "kinds": {"products": 0.75 * time["seconds"], "copies": 0.25 * time["seconds"]}}
    assert "(75%), copies" in planning.table(found)


def test_training_takes_the_choice_records_why_and_keeps_it_when_it_resumes(tmp_path, capsys):
    figures = within(100 * GB)
    config, facts = as_planned(settings(output_dir=str(tmp_path / "run")), figures)
    assert config.model.remat == "none" and facts["chosen"]["why"].startswith("the fastest that fits")
    said = capsys.readouterr().err
    assert "model.remat=none: the fastest that fits" in said and "tokens a second" in said
    RunDirectory(config.output_dir).write_config(config)
    resumed = open_run(settings(output_dir=config.output_dir), write=False)
    assert resumed.config.model.remat == "none" and "model.remat = none, as this run has it" in resumed.notes
    assert open_run(settings(output_dir=config.output_dir, model__remat="dots")).config.model.remat == "dots"
    assert as_planned(config, None) == (config, {})


def test_where_nobody_has_chosen_auto_is_what_it_was():
    assert remat(configuration.default()) == REMAT == "full"
    assert token_chunk(settings(data__max_length=8192), 2, 1) == 2048  # of each row, 4,096 in all


def test_the_report_shows_the_estimate_beside_what_was_measured():
    _, facts = as_planned(settings(), within(100 * GB))
    facts["estimate"]["tokens_per_second"] = 2000.0
    rows = [{"step": step, "loss": 1.0, "tokens_per_second": 1500.0} for step in range(1, 4)]
    run = CurveRun("run", "run", rows, summary=facts)
    section = {row[0]: row[1] for row in report._speed([run]).rows}
    assert section["tokens a second, median"] == "1,500" and section["tokens a second, as estimated before"] == "2,000"
    assert section["measured, of the estimate"] == "75%" and section["the estimate is"].startswith("by FLOPs")
    assert section["taken for what was left open"].startswith("model.remat=none: the fastest")


def test_suggest_recommends_most_tokens_a_second_not_the_largest_batch(monkeypatch):
    """Rows beyond two make each token slower, as where they no longer fit a cache; recomputing makes all slower."""
    module = importlib.import_module("tpu_tune.planning.figures")

    def run(job, kind, timeout=0.0):
        found = compile_step.measure({**job, "compile": False, "ways": None})
        config = job["config"]
        rows, again = config["train"]["per_device_train_batch_size"], config["model"]["remat"]
        fixed = sum(found["held"].values()) + found["gradients"]  # 2.2 GB
        peak = fixed + int(GB * rows * {"full": 1, "dots": 3, "none": 20}[again])
        seconds = found["rows"] * {"full": 1.3, "dots": 1.1, "none": 1.0}[again] * (1 + 0.1 * max(0, rows - 2))
        time = {"seconds": seconds, "kinds": {}, "how": "by the compiler"}
        found["train"] |= {"peak": peak, "fits": True, "time": time}
        return found | {"compiler": "a compiler" if job["compile"] else ""}

    monkeypatch.setattr(module, "run_job", run)
    device = dataclasses.replace(planning.find_device("h200"), capacity=int(10.7 * GB))
    found = suggest(settings(train__gradient_accumulation_steps=4), device, max_compiles=20)
    assert found["overrides"]["train.per_device_train_batch_size"] == 8  # the largest batch
    best = found["recommended"]
    assert best["why"] == "the fastest by estimate" and best["overrides"]["model.remat"] == "dots"
    assert best["figures"]["step"]["micro_batch_rows"] == 2
    assert any("model.remat" not in other["overrides"] for other in found["alternatives"])
