"""`tpu-tune plan` for a card of so much memory, for several devices at once, and what it advises where nothing fits."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from helpers_training import write_tiny_llama
from safetensors.numpy import load_file, save_file

from tpu_tune import config as configuration
from tpu_tune import planning
from tpu_tune.cli import main
from tpu_tune.errors import UserError
from tpu_tune.planning import compile_process, compile_step
from tpu_tune.planning.cards import CARDS

GB = 1e9
MODEL = "--config.model.path=smollm2-135m"
FULL = {
    "method": "full",
    "model": {"path": "llama-3.2-1b"},
    "data": {"max_length": 2048},
    "train": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 1},
}


def fake_compiler(parameters: float, per_row: float, asked: list[dict]):
    """A stand-in for the compiling process: bytes by method, optimizer, rows and tokens."""

    def run(job, kind, timeout=0.0):
        config = job["config"]
        if job["compile"]:
            asked.append(config)
        bits = {"none": 16, "int8": 8, "int4": 4, "nf4": 4}[config["quantize"]["format"]]
        full, train = config["method"] == "full", config["train"]
        state = 0 if train["optim_offload"] else 2 if train["optim"] == "adamw_8bit" else 8
        held = {
            "frozen": 0 if full else int(parameters * bits / 8),
            "trainable": int(4 * parameters) if full else 0,
            "optimizer": int(state * parameters) if full else 0,
            "batch": 0,
        }
        gradients = held["trainable"]
        scratch = per_row * train["per_device_train_batch_size"] * config["data"]["max_length"] / 2048
        scratch *= {"full": 1, "dots": 2, "none": 4}[config["model"]["remat"]]
        arguments = sum(held.values())
        program = {"fits": True, "arguments": arguments, "peak": arguments + gradients + int(scratch), "host": 0}
        return {
            "compiler": "a compiler" if job["compile"] else "", "why": "", "held": held, "gradients": gradients,
            "train": program, "evaluate": program, "parameters": int(parameters), "trainable": 1,
            "width": config["data"]["max_length"], "encoder_width": 0,
            "rows": train["per_device_train_batch_size"] * train["gradient_accumulation_steps"],
            "mesh": {"data": 1, "fsdp": job["count"], "tensor": 1, "sequence": 1},
        }  # fmt: skip

    return run


@pytest.fixture
def compiler(monkeypatch):
    """Set the fake compiler for so many parameters and bytes a row; returns the configurations that it was asked."""
    asked: list[dict] = []
    module = importlib.import_module("tpu_tune.planning.figures")
    return lambda parameters, per_row: (
        monkeypatch.setattr(module, "run_job", fake_compiler(parameters, per_row, asked)),
        asked,
    )[1]


# Cards


def test_cards_of_8_10_and_12_gb_have_names():
    sizes = {"rtx3070": 8, "rtx4060": 8, "rtx3080": 10, "rtx2080ti": 11, "rtx3060": 12, "rtx4070": 12, "rtx5070": 12}
    for name, size in sizes.items():
        device = planning.find_device(name)
        assert CARDS[name].size == size and 0.8 * size < device.capacity / 2**30 < size, name
        assert planning.device_of(device.device_kind, 1).name == name and name in planning.NAMES
    assert not planning.find_device("rtx2080ti").bfloat16 and planning.find_device("rtx5070").bfloat16


def test_a_card_by_its_memory_is_the_named_one_of_that_generation():
    named = {"ampere-12g": "rtx3060", "ada-12g": "rtx4070", "ada-8g": "rtx4060", "blackwell-12g": "rtx5070",
             "turing-16g": "t4", "ampere-24g": "rtx3090", "ampere-80g": "a100-80g"}  # fmt: skip
    for name, card in named.items():
        given, known = planning.find_device(name), planning.find_device(card)
        assert (given.capacity, given.flops, given.bandwidth) == (known.capacity, known.flops, known.bandwidth), name
        assert given.name == name and card in given.capacity_note
    six = planning.find_device("ampere-6g x2")  # no named one has 6 GB
    assert six.count == 2 and 5 < six.capacity / 2**30 < 6 and "rtx3070" in six.capacity_note
    assert planning.by_memory(12) == "ampere-12g" and planning.by_memory(10.5, "ada") == "ada-10.5g"


@pytest.mark.parametrize("name", ["t4x999999999", "h100 x1025", "ampere-12g x100000", "h100x" + 6000 * "9"])
def test_more_devices_than_a_plan_is_for_are_refused(name):
    with pytest.raises(UserError, match="at least one, and 1024 at most") as error:
        planning.find_device(name)
    assert len(str(error.value)) < 150
    assert planning.find_device("h100 x1024").count == 1024


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "plan for what? give --device NAME"),
        (["--memory", "12", "kepler"], "there is no generation 'kepler'; choose ampere, ada"),
        (["--memory", "twelve"], "--memory is 'twelve'"),
        (["--memory", "nan"], "--memory is 'nan'"),
        (["--memory", "99999"], "from 1 to 1024"),
        (["--device", "t4x999999999"], "1024 at most"),
        (["--device", "t4", "rtx9", "--memory", "12"], "unknown device 'rtx9'"),
        (["--device", "v5e-" + 5000 * "9"], "unknown device 'v5e-9"),
    ],
)
def test_what_cannot_be_planned_for_is_one_line(words, said, capfd):
    assert main(["plan", "--no-compile", MODEL, *words]) == 1
    captured = capfd.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out


# Several devices, and the line before a compilation


def test_several_devices_make_one_table(compiler, capsys):
    compiler(1 * GB, 0.5 * GB)
    words = ["plan", "--rows=1000", "--config.method=full", "--config.train.per_device_train_batch_size=1", MODEL]
    devices = ["--device", "rtx3060", "h100", "x2", "--device=rtx4090", "--memory", "8", "24", "ada"]
    assert main([*words, *devices]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split()[-7:] for line in lines[3:8]}
    assert list(rows) == ["rtx3060", "h100 x2", "rtx4090", "ampere-8g", "ada-24g"]
    assert lines[2].split()[:2] == ["device", "fits"] and not any("device " in line for line in lines[8:])
    fits = [next(word for word in line.split() if word in ("yes", "no")) for line in lines[3:8]]
    assert fits == ["no", "yes", "yes", "no", "yes"]  # 16 bytes a parameter, and half a GB
    assert rows["rtx4090"][0] == "16.50" and rows["rtx4090"] == rows["ada-24g"]
    assert main([*words, *devices, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [figures["device"] for figures in found] == list(rows) and [figures["fits"] for figures in found][0] is False


def test_a_device_that_cannot_be_planned_for_does_not_hide_the_others(compiler, capsys):
    compiler(1 * GB, 0.5 * GB)
    words = ["plan", MODEL, "--config.mesh.fsdp=2", "--device", "rtx4090", "rtx4090", "x2"]
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "rtx4090           no plan: mesh." in table and "rtx4090 x2        yes" in table, table
    assert main([*words[:-1], "t4"]) == 1  # none of them
    assert "no plan for any of these" in capsys.readouterr().err


def test_one_line_before_a_compilation_says_what_is_done_and_about_how_long(compiler, capsys, monkeypatch):
    compiler(1 * GB, 0.5 * GB)
    monkeypatch.setattr(compile_process, "missing_compiler", lambda platform: "")
    assert main(["plan", MODEL, "--device", "rtx3060"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("compiling the training step for rtx3060") and "minute" in said[0]
    assert main(["plan", MODEL, "--device", "rtx3060", "--no-compile"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(compile_process, "missing_compiler", lambda platform: "not installed")
    assert main(["plan", MODEL, "--device", "v5e-1"]) == 0
    assert "whose compiler is not installed: seconds" in capsys.readouterr().err
    monkeypatch.setattr(compile_process, "missing_compiler", lambda platform: "")
    assert main(["plan", MODEL, "--device", "v5e-1", "--suggest"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert "at most 8 compilations" in said[0] and "minutes" in said[0]


# What would fit


def ways_of(found):
    return {way["way"]: way["fits"] for way in found["ways"]}


def test_where_nothing_fits_each_way_out_is_asked_of_the_compiler(compiler):
    asked = compiler(1.2 * GB, 1 * GB)  # 19.2 GB in full: 8-bit Adam 12, its state elsewhere 9.6, LoRA 2.4, and a row
    found = planning.suggest(configuration.from_dict(FULL), "rtx3060", max_compiles=20)
    assert found["overrides"] is None and found["ways"][0]["overrides"]["train.optim"] == "adamw_8bit"
    assert ways_of(found) == {
        "8-bit Adam": False, "the optimizer's state in host memory (slower)": True, "LoRA": True, "QLoRA": True,
    }  # fmt: skip
    settings = [(job["method"], job["quantize"]["format"], job["train"]["optim"]) for job in asked]
    assert {("full", "none", "adamw_8bit"), ("lora", "none", "adamw"), ("lora", "nf4", "adamw")} <= set(settings)
    best = found["recommended"]  # the first that trains the same weights
    assert best["overrides"]["train.optim_offload"] and "method" not in best["overrides"] and best["figures"]["fits"]
    lines = planning.advice(found).splitlines()
    assert any(line.startswith("  8-bit Adam: DOES NOT FIT: it needs 13.00 GB of 11.22") for line in lines)
    assert lines[-2].startswith("recommended (the optimizer's state in host memory") and "fits:" in lines[-2]
    assert lines[-1].split()[0].startswith("--config.") and "--config.train.optim_offload=True" in lines[-1]


def test_qlora_is_recommended_where_only_that_fits_with_as_many_rows_as_fit(compiler):
    compiler(7 * GB, 1 * GB)
    found = planning.suggest(configuration.from_dict(FULL), "rtx3060", max_compiles=20)
    assert [way for way, fits in ways_of(found).items() if fits] == ["QLoRA"]
    best = found["recommended"]["overrides"]
    assert best["method"] == "lora" and best["quantize.format"] == "nf4"
    assert found["recommended"]["figures"]["step"]["micro_batch_rows"] == 1  # 3.5 GB and a row of 4 without remat
    text = planning.advice(found).splitlines()
    assert text[-3].startswith("recommended (QLoRA, ") and "set train.learning_rate too" in text[-1]


def test_shorter_rows_are_what_is_left_for_qlora(compiler):
    compiler(7 * GB, 60 * GB)
    config = configuration.from_dict({**FULL, "method": "lora", "quantize": {"format": "nf4"}})
    found = planning.suggest(config, "rtx3060", max_compiles=20)
    assert ways_of(found) == {"shorter rows: 256 tokens": True}  # 3.5 GB and 60 / 8
    assert found["recommended"]["overrides"]["data.max_length"] == 256


def test_a_way_for_which_no_compilation_is_left_is_said_to_be_untried(compiler):
    asked = compiler(1.2 * GB, 1 * GB)
    found = planning.suggest(configuration.from_dict(FULL), "rtx3060", max_compiles=1)
    assert len(asked) <= 1 and None in ways_of(found).values()
    assert "not tried; raise --max-compiles" in planning.advice(found)


def test_larger_devices_are_named_where_no_way_fits(compiler):
    compiler(60 * GB, 1 * GB)
    found = planning.suggest(configuration.from_dict(FULL), "rtx3060", max_compiles=2)
    assert not any(ways_of(found).values()) and found["devices"]
    assert planning.advice(found).splitlines()[-1].startswith("recommended: another device, ")


def test_suggest_ends_with_one_recommendation(compiler, capsys):
    compiler(1 * GB, 4 * GB)
    words = ["plan", "--suggest", "--max-compiles=4", "--config.method=lora", MODEL]
    assert main([*words, "--device", "rtx3060"]) == 0
    text = capsys.readouterr().out
    assert text.count("recommended") == 1 and text.splitlines()[-2].startswith("recommended (the fastest by estimate)")
    assert "--config.model.remat=dots" in text.splitlines()[-1]
    assert main([*words, "--device", "rtx3060", "h100"]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "recommended of these devices, the fastest by estimate: h100" and "--config." in last[1]


def test_a_plan_that_does_not_fit_says_how_to_find_what_would(compiler, capsys):
    compiler(60 * GB, 1 * GB)
    assert main(["plan", MODEL, "--memory", "12"]) == 0
    assert "--suggest" in capsys.readouterr().err


# Parameters


def test_a_head_that_a_tied_models_files_hold_is_counted(tmp_path, monkeypatch, caplog):
    module = importlib.import_module("tpu_tune.planning.figures")
    monkeypatch.setattr(module, "run_job", lambda job, *_: compile_step.measure(job))

    def parameters() -> int:
        found = planning.plan({"method": "full", "model": {"path": str(tmp_path)}}, "h200", compile=False)
        return found["model"]["parameters"]

    write_tiny_llama(tmp_path)
    tied = parameters()
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.copy()}, file)
    assert parameters() == tied  # the same one, stored twice
    save_file({**tensors, "lm_head.weight": embedding + np.float32(1)}, file)
    assert parameters() == tied + embedding.size and "its files hold another" in caplog.text
    file.write_bytes(b"cut short")
    assert parameters() == tied  # a plan needs no weights; what is wrong with them is training's to say
