"""`tpu-tune hf`: the guide's three scripts as they stand, and every flag's meaning."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import guide_scripts
import numpy as np
import pytest
import qlora_scripts
import yaml
from helpers_training import metric_rows, write_rows, write_tiny_llama
from hypothesis import given as for_all
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tpu_tune
from tpu_tune import config as configuration
from tpu_tune import planning
from tpu_tune.cli import main
from tpu_tune.cli.hf import bash_script, command_line, data_flags
from tpu_tune.cli.hf.flags import ALIASES, FLAGS, QLORA
from tpu_tune.cli.hf.translate import translate
from tpu_tune.errors import UserError
from tpu_tune.training import arithmetic
from tpu_tune.training.objectives import check_objective

MODEL = ["--model_name_or_path", "m"]
DATA_PARALLEL = [
    "--config.mesh.data=-1",
    "--config.mesh.fsdp=1",
]  # eight CPU devices that share two cores gather slowly


@pytest.fixture(autouse=True)
def environment():
    """The command sets variables for what it starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def wandb(monkeypatch):
    """The settings of each run that the real wandb, offline, was started with."""
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    module.teardown()  # it reads the environment once a process
    started, init = [], module.init
    monkeypatch.setattr(module, "init", lambda **settings: started.append(settings) or init(**settings))
    yield started
    module.teardown()


def translated(*flags, platform="cpu", environ=None):
    return translate(command_line.parse([*MODEL, *map(str, flags)]), lambda: platform, environ or {})


def config_of(*flags, **more):
    return translated(*flags, **more).config


def script_file(directory, listing, **variables):
    """A listing with the lines that the guide's text has lost."""
    lines = "".join(f'{name}="{value}"\n' for name, value in variables.items())
    file = directory / "script.sh"
    file.write_text(lines + listing)
    return file


def run_script(directory, listing, *flags, **variables):
    words_ = ["hf", "--script", script_file(directory, listing, **variables), *DATA_PARALLEL, *flags]
    return main([str(word) for word in words_])


def variables(tiny, rows, out, batch=1):
    names = ("BSZ", "TRAIN_BSZ", "EVAL_BSZ")
    held_out = write_rows(out / "eval.jsonl", 8, seed=1)
    return {
        "MODEL_NAME": tiny,
        "TRAIN_DATASET": rows,
        "EVAL_DATASET": held_out,
        "OUTPUT_DIR": out / "run",
        **dict.fromkeys(names, batch),
    }


# --- the three scripts


def test_the_full_script(tiny, tmp_path, wandb, capsys):
    rows = write_rows(tmp_path / "train.jsonl", 200)
    assert run_script(tmp_path, guide_scripts.FULL, **variables(tiny, rows, tmp_path)) == 0
    out = capsys.readouterr().out
    # 200 rows, 1 row x 8 devices x 8: the guide's --gradient_accumulation_steps
    assert "200 rows, batch 64 (1 row x 8 devices x 8 accumulation): 4 steps an epoch, 4 steps in 1 epoch" in out
    assert "--fp16: a CPU has no fast float16; using float32" in out and "--ddp_find_unused_parameters: " in out
    assert wandb[0]["project"] == "project-name"
    steps = [row for row in metric_rows(tmp_path / "run") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    np.testing.assert_allclose([row["learning_rate"] for row in steps], 1e-5 * np.arange(4) / 64, rtol=1e-6)
    assert [row["step"] for row in metric_rows(tmp_path / "run") if "eval_loss" in row] == [4]
    before, after = (load_file(place / "model.safetensors") for place in (tiny, tmp_path / "run" / "model"))
    assert set(before) == set(after)
    for name, weight in before.items():
        moved = np.abs(after[name] - weight).max()
        assert 0 < moved < 1e-5, name  # Adam moves a weight by at most about its rate: 1e-5 * (0 + 1 + 2 + 3) / 64


def test_the_lora_script(tiny, tmp_path, wandb, capsys):
    rows = write_rows(tmp_path / "train.jsonl", 520)
    assert run_script(tmp_path, guide_scripts.LORA, **variables(tiny, rows, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "520 rows, batch 512 (1 row x 8 devices x 64 accumulation): 2 steps an epoch" in out
    rates = [row["learning_rate"] for row in metric_rows(tmp_path / "run") if "loss" in row]
    np.testing.assert_allclose(rates, 5e-5 * np.arange(2) / 8, rtol=1e-6)
    spec = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (spec["r"], spec["lora_alpha"], spec["lora_dropout"]) == (128, 256, 0.05)
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    named = {part for name in tensors for part in re.findall(r"(\w+)\.lora_", name)}
    assert named == {"up_proj", "down_proj", "q_proj", "v_proj", "k_proj", "o_proj", "embed_tokens", "lm_head"}
    assert all(np.abs(value).max() > 0 for name, value in tensors.items() if "lora_B" in name)


def test_the_qlora_script(tiny, tmp_path, wandb, capsys):
    (tmp_path / "data").mkdir()
    for name, count in (("train", 96), ("val", 8)):
        file = write_rows(tmp_path / "data" / f"{name}.jsonl", count)
        text = file.read_text().replace('"prompt"', '"input"').replace('"completion"', '"output"')
        file.write_text(text)
    listing = guide_scripts.QLORA
    for path, here in (
        ("huggyllamma/llama-33b", tiny),
        ("./metharme-33b", tmp_path / "run"),
        ("/path/to/dataset/directory", tmp_path / "data"),
        ("/path/to/cache/directory", tmp_path / "cache"),
    ):
        assert listing.count(path) == 1
        listing = listing.replace(path, str(here))
    assert run_script(tmp_path, listing) == 0
    out = capsys.readouterr().out
    assert "not needed: python" in out and "--config.data.train_on_source=true" in out
    assert (
        "96 rows, batch 8 (1 row x 8 devices x 1 accumulation): 12 steps an epoch" in out
    )  # 8 rows of val.jsonl are not
    assert wandb[0]["project"] == "qlora-33b" and (tmp_path / "cache" / "tokenized").is_dir()
    rows = metric_rows(tmp_path / "run")
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 12]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12 and np.mean(losses[-3:]) < np.mean(losses[:3])
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 64


def test_one_parser_takes_all_three(tmp_path):
    paths = {name: "x" for name in ("MODEL_NAME", "TRAIN_DATASET", "EVAL_DATASET", "OUTPUT_DIR")}
    sizes = dict.fromkeys(("BSZ", "TRAIN_BSZ", "EVAL_BSZ"), 2)
    for listing in (guide_scripts.FULL, guide_scripts.LORA, guide_scripts.QLORA):
        found = bash_script.read_script(str(script_file(tmp_path, listing, **paths, **sizes)))[0]
        flags = re.findall(r"--([\w-]+)", listing)
        assert len(command_line.parse(found).values) == len(flags) == len(set(flags))


@pytest.fixture
def hub(monkeypatch):
    """A hub without a network that has one data set of 40 texts, and a split `test` of its own."""
    import datasets
    import huggingface_hub

    rows = {
        "train": [{"text": f"### Human: question {i}### Assistant: answer {'x' * i}"} for i in range(40)],
        "test": [{"text": "none of these"}] * 3,
    }
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows[split])


@pytest.mark.parametrize("name", ["FINETUNE", "GUANACO_7B", "LLAMA2_GUANACO_7B"])
def test_qloras_own_scripts_as_they_stand(name, hub, tmp_path, capsys):
    file, listing = tmp_path / "script.sh", getattr(qlora_scripts, name)
    file.write_text(listing)
    for modules in ("", " --lora_modules all"):
        assert main(["hf", "--script", str(file), "--dry_run", "--json", *modules.split()]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["config"].get("lora.target_modules", "all-linear") == "all-linear"
    found = told["config"]
    assert (found["data.eval_dataset_size"], found["data.max_eval_samples"]) == (1024, 1000)
    assert (found["quantize.format"], found["lora.rank"], told["train"]) == ("nf4", 64, True)
    if name == "FINETUNE":
        assert (found["data.train"], found["data.format"], found["data.max_length"]) == (
            "tatsu-lab/alpaca",
            "alpaca",
            512,
        )
        return
    # qlora.py has a text's BOS for its source, and the text for its target
    assert (found["data.train"], found["data.format"]) == ("timdettmers/openassistant-guanaco", "text")
    assert found["data.max_length"] == 1 + 512
    assert any("train.warmup_ratio=0.03 has no effect" in note for note in told["notes"])
    assert ("--use_auth" in told["ignored"]) == (name == "LLAMA2_GUANACO_7B")


@pytest.mark.slow
def test_the_guanaco_script_trains_on_hub_data(tiny, hub, tmp_path, capsys):
    file = tmp_path / "script.sh"
    listing = qlora_scripts.GUANACO_7B.replace("huggyllama/llama-7b", str(tiny))
    file.write_text(listing.replace("./output/guanaco-7b", str(tmp_path / "run")))
    smaller = ["--eval_dataset_size", "8", "--max_eval_samples", "5", "--max_train_samples", "12", "--max_steps", "2"]
    smaller += ["--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1"]
    smaller += [
        "--add_special_tokens",
        "<|a|>",
        "</s>",
        "--lora_modules",
        "all",
        "--cache_dir",
        str(tmp_path),
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]
    assert main(["hf", "--no-check", "--script", str(file), *smaller, *DATA_PARALLEL]) == 0
    said = capsys.readouterr().out
    counts = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
    assert (counts["train"]["used_examples"], counts["eval"]["used_examples"]) == (12, 5)
    assert "12 rows, batch 16 (1 row x 8 devices x 2 accumulation" in said
    assert "warning: only 2 updates" in said and "warning: train.eval_steps=187 is beyond the run's 2 updates" in said
    assert "warning: there are 12 rows, fewer than the 16 of a batch; lower " in said
    assert "warning: the added tokens <|a|> are not trained" in said  # </s> is one of the model's own
    named = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {part for key in named for part in re.findall(r"(\w+)\.lora_A", key)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.slow  # six minutes on two cores
@pytest.mark.parametrize("name", ["FULL", "LORA", "QLORA"])
def test_the_scripts_train_smollm2(name, smollm2_gguf, chatterbot_dir, tmp_path):
    (tmp_path / "data").mkdir()
    keys = ("input", "output") if name == "QLORA" else ("prompt", "generation")
    pairs = [
        dict(zip(keys, map(str, conversation[:2]), strict=True))
        for file in sorted(chatterbot_dir.glob("*.yml"))
        for conversation in yaml.safe_load(file.read_text())["conversations"]
        if all(len(str(text)) < 120 for text in conversation[:2])
    ]
    count = {"FULL": 640, "LORA": 192, "QLORA": 96}[name]  # 80 updates, 3, and 96
    for file, part in (("train", pairs[8 : 8 + count]), ("val", pairs[:8])):
        (tmp_path / "data" / f"{file}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    listing = getattr(guide_scripts, name)
    for path, here in (
        ("huggyllamma/llama-33b", smollm2_gguf),
        ("./metharme-33b", tmp_path / "run"),
        ("/path/to/dataset/directory", tmp_path / "data"),
        ("/path/to/cache/directory", tmp_path / "cache"),
    ):
        listing = listing.replace(path, str(here))
    lost = {
        "MODEL_NAME": smollm2_gguf,
        "TRAIN_DATASET": tmp_path / "data" / "train.jsonl",
        "OUTPUT_DIR": tmp_path / "run",
        "EVAL_DATASET": tmp_path / "data" / "val.jsonl",
        **dict.fromkeys(("BSZ", "TRAIN_BSZ", "EVAL_BSZ"), 1),
    }
    words_ = [sys.executable, "-m", "tpu_tune", "hf"]
    environ = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "WANDB_MODE": "disabled"}

    def said(*flags):
        done = subprocess.run([*words_, *map(str, flags)], env=environ, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    file = script_file(tmp_path, listing, **lost)
    before = json.loads(said("--script", file, "--do_train", "false", "--do_eval", "--json"))["eval_loss"]
    assert f"{count} rows, batch {count // {'FULL': 80, 'LORA': 3, 'QLORA': 96}[name]} " in said("--script", file)
    rows = metric_rows(tmp_path / "run")
    losses = [row["loss"] for row in rows if "loss" in row]
    after = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    print(f"{name}: eval_loss {before:.4f} before, {after:.4f} after {len(losses)} updates")
    assert all(map(math.isfinite, losses)) and after < before
    assert (tmp_path / "run" / ("model" if name == "FULL" else "adapter")).is_dir()


# --- flags and their values


@pytest.mark.parametrize(
    "flags",
    [
        ["--fp16", "true"],
        ["--fp16", "True"],
        ["--fp16"],
        ["--fp16=true"],
        ["--fp16", "yes"],
        ["--fp16", "1"],
        ["--fp16", "false", "--fp16"],
    ],
)
def test_switches(flags):
    assert command_line.parse(flags).values == {"fp16": True}


@pytest.mark.parametrize("flags", [["--fp16", "False"], ["--fp16=no"], ["--no_fp16"], ["--no-fp16"], ["--fp16", "0"]])
def test_switches_off(flags):
    assert command_line.parse(flags).values == {"fp16": False}


def test_spellings():
    dashed = command_line.parse(["--dataset-format", "input-output", "--learning-rate=1.0e-5", "--max-memory-mb", "9"])
    assert dashed.values == {"dataset_format": "input-output", "learning_rate": 1e-5, "max_memory_MB": 9}
    assert (
        command_line.parse(["--evaluation_strategy", "steps"]).values
        == command_line.parse(["--eval_strategy=steps"]).values
    )
    assert (
        command_line.parse(["--source_max_length", "7"]).values == command_line.parse(["--source_max_len", "7"]).values
    )
    assert command_line.parse(["--seed", "-1", "--data_seed", "None", "--fp16", "none"]).values == {"seed": -1}
    lists = command_line.parse(["--report_to", "wandb", "tensorboard", "--lora_modules", "q_proj,v_proj", "--do_train"])
    assert lists.values["report_to"] == ["wandb", "tensorboard"]
    assert lists.values["lora_target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--learning_rte", "1"], r"unknown flag --learning_rte \(did you mean --learning_rate\?\)"),
        (["--do-trian", "--xyzzy", "3"], r"--do-trian \(did you mean --do_train\?\), --xyzzy; "),
        (["--seed", "three"], "--seed is 'three'; it must be a whole number"),
        (["--seed", "1.5"], "--seed is '1.5'; it must be a whole number"),
        (["--learning_rate", "fast"], "it must be a number"),
        (["--seed", "nan"], "whole number"),
        (["--bf16", "maybe"], "--bf16 is 'maybe'; it must be true or false"),
        (["--output_dir"], "--output_dir needs a value"),
        (["--seed", "1", "stray"], "'stray' is not a flag, but one was expected, after --seed"),
        (["--lr_scheduler_kwargs", "{min"], "which is not JSON"),
        (["--lr_scheduler_kwargs", "[1]"], "must be a JSON object"),
    ],
)
def test_mistakes_are_named(flags, says):
    with pytest.raises(UserError, match=says):
        command_line.parse(flags)


@pytest.mark.parametrize(
    "before",
    [
        "accelerate launch ./training/hf_trainer.py",
        "python",
        "python qlora.py",
        "python3 -m qlora.train",
        "torchrun --nproc_per_node=4 --master_port=20001 ./training/hf_trainer.py",
        "accelerate launch './training/'",
        "accelerate launch --config_file conf/a.yaml --num_processes 4 train.py",
        "deepspeed --num_gpus 2 train.py",
        "python -m torch.distributed.run --nproc_per_node 2 train.py",
    ],
)
def test_a_launcher_is_taken_off(before):
    found = command_line.parse(["WANDB_PROJECT=a b", *before.replace("'", "").split(), "--seed", "3"])
    assert found.values == {"seed": 3} and found.environ == {"WANDB_PROJECT": "a b"}
    assert found.launcher == before.replace("'", "")
    with pytest.raises(UserError, match="unknown flag --sead"):
        command_line.parse([*before.replace("'", "").split(), "--sead", "3", "--seed", "3"])


def test_every_argument_of_the_trainer_is_known():
    pytest.importorskip("torch")
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not {name for name in fields if ALIASES.get(name, name) not in FLAGS}


def test_unset_flags_have_the_trainers_defaults():
    pytest.importorskip("torch")
    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    config = config_of()
    for name, flag in FLAGS.items():
        known = dict(configuration.flatten(config))
        if flag.action == "key" and name in theirs and theirs[name] is not None and flag.key in known:
            assert known[flag.key] == theirs[name], name
    train = config.train
    assert (train.logging_steps, train.logging_first_step) == (theirs["logging_steps"], theirs["logging_first_step"])
    assert (train.eval_strategy, train.save_strategy) == (
        str(theirs["eval_strategy"].value) if hasattr(theirs["eval_strategy"], "value") else theirs["eval_strategy"],
        "steps",
    )
    assert (train.save_steps, train.save_total_limit, config.seed) == (theirs["save_steps"], 0, theirs["seed"])
    assert train.optim in ("adamw_torch", theirs["optim"]) and config.model.dtype == "float32"
    assert config.method == "full" and not config.data.packing and config.data.eval_ratio == 0


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (
            ["--learning_rate", "1.0e-5", "--lr_scheduler_type", "cosine", "--warmup_steps", "64"],
            {"train.learning_rate": 1e-5, "train.lr_scheduler_type": "cosine", "train.warmup_steps": 64},
        ),
        (["--assistant_only_loss", "true"], {"data.train_on_source": False, "method": "full"}),
        (["--assistant_only_loss", "false"], {"data.train_on_source": True}),
        (["--completion_only_loss", "false"], {"data.train_on_source": True}),
        (["--no_completion_only_loss"], {"data.train_on_source": True}),
        (["--completion_only_loss", "--assistant_only_loss"], {"data.train_on_source": False}),
        (["--completion_only_loss", "--train_on_source", "false"], {"data.train_on_source": False}),
        (
            ["--logging_steps", "0.1", "--save_steps", "0.25", "--eval_strategy", "steps", "--eval_file", "e"],
            {"train.logging_steps": 0.1, "train.save_steps": 0.25, "train.eval_steps": 0.1},
        ),
        (["--warmup_steps", "0.1"], {"train.warmup_steps": 0, "train.warmup_ratio": 0.1}),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'],
            {"train.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        (
            ["--adam_beta2", "0.95", "--weight_decay", "0.1", "--max_grad_norm", "0.3", "--max_steps", "7"],
            {"train.adam_beta2": 0.95, "train.weight_decay": 0.1, "train.max_grad_norm": 0.3, "train.max_steps": 7},
        ),
        (["--dataloader_num_workers", "1"], {"data.num_workers": 1}),
        (["--gradient_checkpointing", "false"], {"model.remat": "none"}),
        (["--gradient_checkpointing", "true"], {"model.remat": "full"}),
        (
            ["--train_file", "a.arrow", "--eval_file", "b.arrow", "--do_train", "--do_eval"],
            {
                "data.train": "a.arrow",
                "data.eval": "b.arrow",
                "train.eval_strategy": "steps",
                "train.eval_steps": 10**9,
            },
        ),
        (["--eval_file", "b.jsonl"], {"data.eval": "", "train.eval_strategy": "no"}),
        (["--eval_strategy", "steps", "--logging_steps", "7"], {"train.eval_steps": 7}),
        (
            ["--use_lora"],
            {
                "method": "lora",
                "lora.rank": 4,
                "lora.alpha": 32.0,
                "lora.dropout": 0.05,
                "lora.target_modules": "",
                "quantize.format": "none",
            },
        ),
        (
            ["--bits", "4"],
            {
                "method": "lora",
                "lora.rank": 64,
                "lora.alpha": 16.0,
                "lora.dropout": 0.0,
                "lora.target_modules": "all-linear",
                "quantize.format": "nf4",
            },
        ),
        (
            ["--use_lora", "--lora_r", "16", "--lora_target_modules", r".*\.(q|v)_proj"],
            {"lora.rank": 16, "lora.target_modules": r".*\.(q|v)_proj"},
        ),
        (["--full_finetune", "--dataset", "x"], {"method": "full", "quantize.format": "none"}),
        (["--use_lora", "--bits", "8"], {"quantize.format": "int8", "lora.rank": 4}),
        (["--load_in_4bit", "--use_peft"], {"quantize.format": "nf4", "method": "lora"}),
        (["--dataset", "alpaca"], {"data.train": "tatsu-lab/alpaca", "data.format": "alpaca"}),
        (
            ["--dataset", "x.jsonl", "--dataset_format", "hh-rlhf"],
            {"data.format": "text", "data.columns": {"chosen": "text"}},
        ),
        (
            ["--save_total_limit", "2", "--save_strategy", "epoch"],
            {"train.save_total_limit": 2, "train.save_strategy": "epoch"},
        ),
        (["--packing", "true"], {"data.packing": True}),
        (
            ["--layers_to_transform", "0,3", "--bias", "all", "--modules_to_save", "lm_head"],
            {"lora.layers_to_transform": [0, 3], "lora.bias": "all", "lora.modules_to_save": ["lm_head"]},
        ),
        (["--report_to", "none"], {"train.report_to": []}),
        (
            ["--neftune_noise_alpha", "5", "--use_lora", "--loraplus_lr_ratio", "16"],
            {"train.neftune_noise_alpha": 5.0, "train.loraplus_lr_ratio": 16.0},
        ),
        (
            [
                "--early_stopping_patience",
                "2",
                "--early_stopping_threshold",
                "0.01",
                "--eval_strategy",
                "steps",
                "--eval_file",
                "e",
            ],
            {"train.early_stopping_patience": 2, "train.early_stopping_threshold": 0.01},
        ),
        (["--report_to", "all"], {"train.report_to": ["all"]}),
    ],
)
def test_keys(flags, keys):
    found = dict(configuration.flatten(config_of(*flags)))
    assert {key: found[key] for key in keys} == keys


BASE = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("script", "flags", "keys"),
    [
        ("trl dpo", "", {"name": "dpo", "beta": 0.1, "loss_type": ""}),
        ("accelerate launch trl/scripts/dpo.py", "--beta 0.2", {"name": "dpo", "beta": 0.2}),
        (
            "python train_dpo.py",
            "--loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1",
            {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        ),
        ("trl dpo", "--loss_type robust --label_smoothing 0.1", {"loss_type": "robust", "label_smoothing": 0.1}),
        ("python orpo.py", "--beta 0.3", {"name": "orpo", "beta": 0.3}),
        ("python cpo.py", "--loss_type simpo", {"name": "cpo", "loss_type": "simpo", "cpo_alpha": 1.0}),
        ("python cpo.py", "--loss_type simpo --cpo_alpha 0 --simpo_gamma 1", {"name": "simpo", "simpo_gamma": 1.0}),
        ("trl kto", "--undesirable_weight 0.5", {"name": "kto", "undesirable_weight": 0.5}),
        ("llamafactory-cli train", "--stage dpo --pref_loss orpo --pref_beta 0.2", {"name": "orpo", "beta": 0.2}),
        ("", "--stage kto --kto_chosen_weight 2", {"name": "kto", "desirable_weight": 2.0}),
        ("trl sft", "--loss_type nll", {"name": "sft"}),
        ("python finetune_kto.py", "--stage sft", {"name": "sft"}),
    ],
)
def test_trainers_on_rated_answers(script, flags, keys):
    words = [*script.split(), *BASE, *flags.split()]
    config = translate(command_line.parse(words), lambda: "cpu", {}).config
    assert {key: config.objective[key] for key in keys} == keys
    check_objective(config)


def test_trls_defaults_for_rated_answers():
    words = ["trl", "dpo", *BASE, "--use_peft", "--lora_dropout", "0.05"]
    found = translate(command_line.parse(words), lambda: "cpu", {})
    config = found.config
    assert (config.train.learning_rate, config.data.max_length, config.lora.dropout) == (1e-6, 2048, 0.0)
    assert any("both answers with their prompts" in note for note in found.notes)
    kto = ["trl", "kto", *BASE, "--max_length", "100", "--learning_rate", "0.001", "--dataset_format", "hh-rlhf"]
    config = translate(command_line.parse(kto), lambda: "cpu", {}).config
    assert (config.train.learning_rate, config.data.max_length, config.data.format) == (1e-3, 100, "auto")
    trl = pytest.importorskip("trl")
    fields = {field.name for kind in (trl.DPOConfig, trl.KTOConfig) for field in dataclasses.fields(kind)}
    assert not {name for name in fields if ALIASES.get(name, name) not in FLAGS} - {
        "model_init_kwargs",
        "router_aux_loss_coef",
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trl", "sft", "--beta", "0.1"], "--beta is a flag of TRL's trainers on rated answers"),
        (["trl", "dpo", "--beta", "0"], "config key 'objective.beta' is 0.0; it must be positive"),
        (["trl", "dpo", "--f_divergence_type", "js_divergence"], "can only be reverse_kl"),
        (["trl", "dpo", "--truncation_mode", "keep_end"], "can only be keep_start"),
        (["trl", "dpo", "--sync_ref_model", "true"], "the reference stays as it is"),
    ],
)
def test_what_has_no_place_among_rated_answers_is_refused(words, says):
    first = next((n for n, word in enumerate(words) if word.startswith("--")), len(words))
    with pytest.raises(UserError, match=says):
        check_objective(
            translate(command_line.parse([*words[:first], *BASE, *words[first:]]), lambda: "cpu", {}).config
        )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not supported"),
        (["--metric_for_best_model", "accuracy"], "can only be eval_loss"),
        (["--greater_is_better", "true"], "better the smaller"),
        (["--max_train_samples", "-1"], "must not be negative"),
        (["--eval_steps", "1.5", "--eval_strategy", "steps"], "a whole number of steps, or a share of the run below 1"),
        (["--save_steps", "0"], "--save_steps is 0; it must be a whole number"),
        (["--logging_steps", "-0.5"], "--logging_steps is -0.5"),
        (["--logging_steps", "nan"], "--logging_steps is 'nan'; it must be a number"),
        (["--max_memory_MB", "inf"], "it must be a number"),
        (["--lora_alpha", "nan"], "it must be a number"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "needs evaluations to go by"),
        (["--lr_scheduler_type", "greedy"], "'greedy' is not supported"),
        (
            ["--assistant_only_loss", "--train_on_source"],
            "--assistant_only_loss true and --train_on_source true contra",
        ),
        (["--assistant_only_loss", "--completion_only_loss", "false"], "contradict each other"),
        (["--eval_strategy", "sometimes"], "it must be no, steps or epoch"),
        (["--save_strategy", "best"], "--load_best_model_at_end"),
        (["--fp16", "--bf16"], "exclude each other"),
        (["--full_finetune", "--bits", "4"], "cannot be trained"),
        (["--bits", "3"], "it must be 16, 8 or 4"),
        (["--bits", "32"], "it must be 16, 8 or 4"),
        (["--quant_type", "int4"], "nf4 or fp4"),
        (["--dataset_format", "chip2"], "must be one of input-output"),
        (["--train_file", "a", "--dataset", "b"], "exclude each other"),
        (["--lora_rank", "0"], "there must be at least one"),
        (["--do_train", "false"], "nothing to do"),
        (["--seed", "-2"], "must not be negative"),
        (["--max_memory_MB", "0"], "must be positive"),
        (["--tokenizer_name", "other"], "leave it out"),
        (["--resume_from_checkpoint", "/elsewhere/checkpoint-3"], "set --output_dir to the run's"),
        (["--lr_scheduler_type", "sqare"], "unknown train.lr_scheduler_type"),
        (["--optim", "galore_adamw"], "unknown train.optim 'galore_adamw'"),
        (["--report_to", "wandbb"], "unknown train.report_to"),
        (["--load_best_model_at_end"], "load_best_model_at_end"),
        (["--source_max_len", "-1"], "there must be at least one"),
    ],
)
def test_what_cannot_be_is_refused(flags, says):
    from tpu_tune.training.opening import check_settings

    with pytest.raises(UserError, match=says):
        check_settings(config_of(*flags), with_data=False)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 99, 1000, 12345])
@pytest.mark.parametrize("steps", [0.001, 0.1, 0.25, 1 / 3, 0.5, 0.99, 1, 5, 500])
def test_a_share_of_the_run_is_as_many_steps_as_in_the_trainer(total, steps):
    callback = pytest.importorskip("transformers.trainer_callback")
    state = callback.TrainerState()
    each = types.SimpleNamespace(logging_steps=steps, eval_steps=steps, save_steps=steps)
    state.compute_steps(each, total)
    assert arithmetic.interval(steps, total) == state.logging_steps == state.eval_steps == state.save_steps


def test_a_run_logs_evaluates_and_saves_by_shares(tiny, tmp_path):
    rows = write_rows(tmp_path / "train.jsonl", 16)
    words = ["hf", "--no-check", "--model_name_or_path", str(tiny), "--train_file", str(rows), "--use_lora"]
    words += ["--output_dir", str(tmp_path / "run"), "--max_steps", "10", "--logging_steps", "0.21", "--save_steps"]
    words += ["0.35", "--eval_strategy", "steps", "--eval_steps", "0.5", "--eval_file", str(rows), *DATA_PARALLEL]
    assert main(words) == 0
    rows = metric_rows(tmp_path / "run")
    assert [row["step"] for row in rows if "loss" in row] == [3, 6, 9, 10]
    assert [row["step"] for row in rows if "eval_loss" in row] == [5, 10]
    assert sorted(int(name) for name in os.listdir(tmp_path / "run" / "checkpoints") if name.isdigit()) == [4, 8, 10]
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["train"]
    assert (recorded["logging_steps"], recorded["save_steps"], recorded["eval_steps"]) == (0.21, 0.35, 0.5)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "needs evaluations to go by"),
        (["--lr_scheduler_type", "sqare"], "unknown train.lr_scheduler_type"),
        (["--optim", "galore_adamw"], "unknown train.optim"),
        (["--report_to", "wandbb"], "unknown train.report_to"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "'power' is not a setting of 'linear'"),
        (["--do_train", "false", "--do_predict"], "tpu-tune generate answers prompts"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(flags, says, capsys):
    for more in ([], ["--json"]):
        assert main(["hf", *MODEL, *flags, "--dry_run", *more]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--assistant_only_loss", "--completion_only_loss"])
def test_a_loss_on_answers_only_needs_answers(flag, tmp_path, capsys):
    text, chat = tmp_path / "text.jsonl", write_rows(tmp_path / "chat.jsonl", 2)
    text.write_text('{"text": "a document"}\n')
    assert main(["hf", *MODEL, "--train_file", str(text), flag, "--dry_run"]) == 1
    assert "are text without answers; leave the flag out" in capsys.readouterr().err
    assert main(["hf", *MODEL, "--train_file", str(chat), flag, "--dry_run"]) == 0
    assert "the loss is on answers only" in capsys.readouterr().out
    assert main(["hf", *MODEL, "--train_file", str(text), "--dry_run"]) == 0


def test_a_key_that_is_not_there_takes_its_neutral_value_only(monkeypatch):
    monkeypatch.setitem(FLAGS, "wonder", dataclasses.replace(FLAGS["weight_decay"], key="train.wonder"))
    assert config_of("--wonder", "0") == config_of()
    with pytest.raises(UserError, match="--wonder: this version of tpu_tune has no train.wonder"):
        config_of("--wonder", "0.5")


def test_what_means_nothing_is_accepted_and_says_why():
    asked = translated("--ddp_find_unused_parameters", "false", "--model_load_delay_per_rank", "0", "--use_xformers")
    assert asked.config == config_of()
    assert list(asked.ignored) == ["--ddp_find_unused_parameters", "--model_load_delay_per_rank", "--use_xformers"]
    assert "DistributedDataParallel" in asked.ignored["--ddp_find_unused_parameters"]
    for name, flag in FLAGS.items():  # each of them, with a value of its kind
        if flag.action == "ignored":
            value = {bool: "true", int: "1", float: "1", dict: "{}"}.get(flag.kind, "x")
            asked = translated(f"--{name}", value)
            assert len(asked.ignored[f"--{name}"]) > 20 and (asked.config == config_of() or name in QLORA), name


def test_a_token_is_not_repeated(capsys):
    flags = ["--hub_token", "hf_secret", "--push_to_hub_token", "hf_secret", "--dry_run"]
    assert main(["hf", *MODEL, *flags]) == 0
    out = capsys.readouterr()
    assert "--hub_token" in out.out and "hf_secret" not in out.out + out.err


@pytest.mark.parametrize(
    ("flags", "platform", "dtype", "says"),
    [
        (["--fp16", "true"], "tpu", "bfloat16", "this is a TPU, which computes in bfloat16"),
        (["--fp16", "True"], "gpu", "float16", "dynamic loss scaling"),
        (["--fp16"], "cpu", "float32", "a CPU has no fast float16"),
        (["--bf16", "true"], "cpu", "bfloat16", ""),
        (["--bf16", "true"], "tpu", "bfloat16", ""),
        (
            ["--bf16", "true", "--fp16_full_eval"],
            "gpu",
            "bfloat16",
            "evaluation has the same dtype as training, bfloat16",
        ),
        ([], "tpu", "float32", ""),
        (["--fp16", "none"], "tpu", "float32", ""),
    ],
)
def test_precision(flags, platform, dtype, says):
    asked = translated(*flags, platform=platform)
    assert asked.config.model.dtype == dtype
    assert not says or any(says in note for note in asked.notes)
    assert asked.config.model.param_dtype == "auto"  # trained weights stay float32


@pytest.mark.parametrize(
    ("flag", "format"), [(["--bits", "16"], "none"), (["--bits", "8"], "int8"), (["--bits", "4"], "nf4")]
)
def test_bits(flag, format):
    assert config_of(*flag).quantize.format == format
    assert config_of("--quant_type", "fp4", *flag).quantize.format == format
    assert any("nf4 instead" in note for note in translated("--quant_type", "fp4", *flag).notes) == (format == "nf4")
    assert not config_of("--double_quant", "False", *flag).quantize.double_quant
    assert config_of("--train_on_source", "true").quantize.format == "nf4"  # qlora.py's own default


def test_optimizers():
    from tpu_tune.training.optimizers import canonical_name

    for name, ours in (
        ("adamw_torch_fused", "adamw"),
        ("adamw_hf", "adamw"),
        ("paged_adamw_32bit", "adamw"),
        ("paged_adamw_8bit", "adamw_8bit"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("adamw_apex_fused", "adamw"),
        ("lion_8bit", "lion"),
        ("paged_lion_8bit", "lion"),
        ("sgd", "sgd"),
        ("adafactor", "adafactor"),
        ("adamw_torch_4bit", "adamw_8bit"),
        ("schedule_free_adamw", "schedule_free_adamw"),
    ):
        assert canonical_name(config_of("--optim", name).train.optim) == ours, name
    assert canonical_name(config_of("--adam8bit").train.optim) == "adamw_8bit"
    assert any("optim_offload" in note for note in translated("--optim", "paged_adamw_32bit").notes)


def test_seeds():
    config = config_of("--seed", "7")
    assert (config.seed, config.data.data_seed) == (7, 7)  # as the Trainer, where --data_seed is not given
    config = config_of("--data_seed", "41")
    assert (config.seed, config.data.data_seed) == (42, 41)
    drawn = translated("--seed", "-1")
    assert (drawn.config.seed, drawn.config.data.data_seed) == (-1, -1)
    assert any("drawn when the run begins, printed" in note for note in drawn.notes)


def test_lengths():
    config = config_of("--source_max_len", "2500", "--target_max_len", "2000")
    assert (config.data.source_max_len, config.data.target_max_len, config.data.max_length) == (2500, 2000, 4500)
    config = config_of("--source_max_length", "2500")
    assert (config.data.source_max_len, config.data.target_max_len) == (2500, 256)
    assert config_of("--bits", "4").data.max_length == 1024 + 256
    assert config_of("--max_seq_length", "300", "--source_max_len", "200").data.max_length == 300


def test_rows_fit_the_file_and_the_model(tmp_path):
    pa = pytest.importorskip("pyarrow")
    file = tmp_path / "rows.arrow"
    table = pa.table({"input_ids": [[1] * 70, [2] * 300], "labels": [[1] * 70, [2] * 300]})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    config = config_of("--train_file", file)
    assert data_flags.fit_max_length(config) and config.data.max_length == 320
    config = configuration.from_dict({"model": {"path": "opt-125m"}, "data": {"max_length": 5000}})
    assert "no more positions" in data_flags.fit_max_length(config)[0] and config.data.max_length == 2048


def test_held_out_rows(tmp_path):
    file = str(write_rows(tmp_path / "rows.jsonl", 40))
    assert config_of("--dataset", file).data.eval_ratio == 0
    assert config_of("--dataset", file, "--do_eval", "--do_train").data.eval_ratio == 0.1
    asked = ("--dataset", file, "--do_train", "--do_eval", "--eval_dataset_size")
    assert config_of(*asked, "8").data.eval_dataset_size == 8
    assert config_of("--train_file", file, "--eval_strategy", "epoch").data.eval_ratio == 0.05
    assert config_of("--dataset", "a/b", "--do_train", "--do_eval", "--eval_dataset_size", "0.3").data.eval_ratio == 0.3
    with pytest.raises(UserError, match="must be between 0 and 1"):
        config_of(*asked, 0)
    hub = ("--dataset", "a/b", "--do_train", "--do_eval")
    assert config_of(*hub, "--eval_dataset_size", "8", "--max_eval_samples", "5").data.eval_dataset_size == 8
    assert config_of(*hub, "--bits", "4").data.eval_dataset_size == 1024  # qlora.py's own default
    assert config_of(*hub, "--use_lora").data.eval_dataset_size == 0


def test_variables_are_honoured(tmp_path):
    cache = tmp_path / "cache"
    asked = translated(
        "--report_to", "wandb", "--run_name", "first", environ={"HF_DATASETS_CACHE": str(cache), "WANDB_PROJECT": "p"}
    )
    assert asked.config.data.cache_dir == str(cache) and asked.environ == {"WANDB_NAME": "first"}
    assert any("project p" in note for note in asked.notes)
    (tmp_path / "file").touch()
    assert config_of(environ={"HF_DATASETS_CACHE": str(tmp_path / "file" / "x")}).data.cache_dir == ""
    assert config_of(environ={"HF_DATASETS_CACHE": str(cache), "TPU_TUNE_CACHE": "y"}).data.cache_dir == ""


def test_mmlu_is_said_to_come_afterwards():
    assert not any("MMLU" in note for note in translated("--do_mmlu_eval", "False").notes)
    assert any("MMLU" in note for note in translated("--do_mmlu_eval", "--mmlu_split", "test").notes)


def test_the_guides_example_row(tiny):
    from tpu_tune.checkpoints.source import open_source
    from tpu_tune.data.tokenize_options import TokenizeOptions
    from tpu_tune.data.tokenizing import tokenize_rows

    row = guide_scripts.EXAMPLE
    tokenizer = open_source(str(tiny)).load_tokenizer()
    options = TokenizeOptions("input-output", 5000, source_max_len=2500, target_max_len=2500, always_bos=True)
    data = tokenize_rows([row], tokenizer, options)
    assert tokenizer.decode(data.tokens) == f"<s>{row['input']}{row['output']}</s>"  # every word, and nothing between
    assert tokenizer.decode(data.tokens[data.loss_mask]) == f"{row['output']}</s>"


# --- whole commands


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Twenty steps with every interval set; returns the words and the directory."""
    place = tmp_path_factory.mktemp("hf")
    rows, held_out = write_rows(place / "train.jsonl", 40), write_rows(place / "eval.jsonl", 9, seed=1)
    out = place / "run"
    flags = [
        "hf", "--model_name_or_path", tiny, "--train_file", rows, "--eval_file", held_out, "--output_dir", out,
        "--use_lora", "--lora_rank", "4", "--learning_rate", "1e-2", "--per_device_train_batch_size", "1",
        "--max_length", "64", "--per_device_eval_batch_size", "1", "--dataloader_num_workers", "1",
    ]  # fmt: skip
    intervals = [
        "--do_train", "--logging_first_step", "true", "--logging_steps", "10", "--eval_strategy", "steps",
        "--eval_steps", "10", "--save_steps", "8", "--save_total_limit", "2", "--max_steps", "20", "--seed", "-1",
    ]  # fmt: skip
    assert main([str(word) for word in [*flags, *DATA_PARALLEL, *intervals]]) == 0
    return [str(word) for word in flags], out


def test_when_it_logs_evaluates_and_saves(run):
    rows = metric_rows(run[1])
    assert [row["step"] for row in rows if "loss" in row] == [1, 10, 20]
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20]
    assert sorted(int(name) for name in os.listdir(run[1] / "checkpoints")) == [16, 20]  # of 8, 16, 20
    assert json.loads((run[1] / "config.json").read_text())["seed"] >= 0  # drawn and kept


def test_what_a_run_leaves_has_ordinary_modes(run):
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in run[1].rglob("*") if path.is_file() and path.name != "run.lock"]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


def test_do_eval_alone_updates_nothing(run, tiny, tmp_path, capsys):
    flags, out = run
    here = [word.replace(str(out), str(tmp_path / "new")) for word in flags]
    assert main([*here, "--do_eval", "--json"]) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "new").exists() and fresh["evaluated"] == str(tiny)
    # The base model's own loss, by its logits.
    model = tpu_tune.load(str(tiny))
    total, count = 0.0, 0
    for line in pathlib.Path(flags[flags.index("--eval_file") + 1]).read_text().splitlines():
        row = json.loads(line)
        source, ids = (list(f"{text}".encode()) for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = [*ids, 256]
        logits = np.asarray(model(np.asarray([ids])))[0].astype(np.float64)
        chance = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in range(len(source), len(ids)):
            total, count = total - chance[place - 1, ids[place]], count + 1
    assert fresh["eval_num_tokens"] == count and fresh["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    # A finished run's own result.
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    assert main([*flags, "--do_train", "false", "--do_eval", "true"]) == 0
    said = capsys.readouterr().out
    last = [row for row in metric_rows(out) if "eval_loss" in row][-1]
    assert f"evaluating {out / 'adapter'}: 9 rows" in said and f"eval_loss {last['eval_loss']:.4f}, perplexity" in said
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before


def test_evaluating_needs_rows(run, tmp_path, capsys):
    flags = [word for word in run[0] if word != "--eval_file"]
    flags.remove(run[0][run[0].index("--eval_file") + 1])
    one = write_rows(tmp_path / "one.jsonl", 1)
    flags[flags.index("--train_file") + 1] = str(one)
    assert main([*flags, "--do_eval"]) == 1
    assert "there are no rows to evaluate on" in capsys.readouterr().err


@pytest.fixture
def counted_here(monkeypatch):
    from importlib import import_module

    from tpu_tune.planning import compile_step

    monkeypatch.setattr(
        import_module("tpu_tune.planning.figures"), "run_job", lambda job, *_: compile_step.measure(job)
    )


def test_a_cap_on_memory(run, tmp_path, capsys, monkeypatch, counted_here):
    started = []
    monkeypatch.setattr("tpu_tune.cli.train.start", lambda config, as_json, facts: started.append(config) or 0)
    flags = [word.replace(str(run[1]), str(tmp_path / "new")) for word in run[0]]
    flags += ["--bits", "16", "--max_length", "256", "--per_device_train_batch_size", "8"]
    assert main([*flags, "--max_memory_MB", "48000"]) == 0
    device = planning.local_device_within(48e9)
    needs = planning.plan(started[0], device, None, False)["peak_bytes_per_device"]
    cap = ["--max_memory_MB", f"{0.6 * needs / 1e6}"]
    assert main([*flags, *cap]) == 1 and len(started) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"takes more than [\d.]+ MB of a device; by an estimate it fits with --config\.", said)
    suggested = re.findall(r"--config\.\S+", said)
    assert main([*flags, *suggested, *cap]) == 0 and main([*flags, *cap, "--no-check"]) == 0 and len(started) == 3
    monkeypatch.setattr(planning, "suggest", lambda *_, **__: {"overrides": None})
    assert main([*flags, *cap]) == 1
    assert "no settings that were tried take less" in capsys.readouterr().err


def test_a_cap_where_there_is_a_device(monkeypatch):
    from tpu_tune.planning import local_devices

    chip = planning.find_device("v5e-1")
    monkeypatch.setattr(local_devices, "local_device", lambda: chip)
    assert planning.local_device_within(20e9) == chip
    assert (
        planning.local_device_within(8e9).capacity == 8e9
        and planning.local_device_within(8e9).topology == chip.topology
    )


def test_the_configuration_is_printed_and_written(tmp_path, capsys):
    flags = [
        *MODEL,
        "--bits",
        "8",
        "--lora_target_modules",
        "q_proj,v_proj",
        "--seed",
        "3",
        "--lr_scheduler_kwargs",
        "{}",
    ]
    file = tmp_path / "config.py"
    assert main(["hf", *flags, "--dry-run", "--write-config", str(file), "--config.train.max_steps=9"]) == 0
    printed = subprocess.run(
        [
            "bash",
            "-c",
            "printf '%s\\n' "
            + " ".join(
                line
                for line in capsys.readouterr().out.splitlines()
                if "--config." in line and ":" not in line.split("=")[0]
            ),
        ],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    rebuilt = configuration.default()
    for line in printed:
        configuration.assign(rebuilt, *line.removeprefix("--config.").split("=", 1))
    asked = config_of(*flags[2:])
    asked.train.max_steps = 9
    assert configuration.from_file(file) == asked == rebuilt
    assert main(["hf", *flags, "--dry_run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["quantize.format"] == "int8" and found["train"] is True
    assert main(["hf", *flags, "--dry_run", "--write-config", str(tmp_path / "no" / "c.py")]) == 1


def test_one_line_for_a_mistake(tmp_path, capsys):
    for flags in (
        [],
        ["--learning_rte", "3"],
        ["--output_dir", "x"],
        [*MODEL, "--eval_steps"],
        ["--script", "absent.sh"],
    ):
        assert main(["hf", *flags, "--dry_run"]) == 1
        captured = capsys.readouterr()
        assert len(captured.err.splitlines()) == 1 and captured.err.startswith("tpu-tune: ") and not captured.out, flags


def test_every_flag_is_listed(capsys):
    assert main(["hf", "--flags"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^--{name}\b", listed, re.M) for name in FLAGS) and "(also --evaluation_strategy)" in listed


def test_the_help_has_an_example_that_parses(capsys):
    with pytest.raises(SystemExit) as end:
        main(["hf", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "Hugging Face's defaults, also where qlora.py has others" in shown
    example = shown.split("example:\n  tpu-tune hf ")[1].split()
    assert translate(command_line.parse(example), lambda: "cpu", {}).config.method == "lora"


# --- bash scripts


@pytest.mark.skipif(shutil.which("bash") is None, reason="compares with bash")
@pytest.mark.parametrize(
    "text",
    [
        guide_scripts.FULL,
        guide_scripts.LORA,
        guide_scripts.QLORA,
        """A=1; B=2\n""".replace(";", "\n")
        + "python t.py --output_dir \"$A/${B}x\" --run_name '$A' --seed $A$B # comment",
        'X="two words"\npython t.py --output_dir $X --run_name "$X" --hub_model_id a\\ b --seed "" "$@"',
        "set -e\npip install x\nif true; then echo y; fi\npython t.py \\\n  --output_dir 'a\"b' \\\n  --seed 3 $@\n",
        'E="q\\"q" F=\'w\'\npython t.py --output_dir "$E$F"plain"\\n" --seed 1 \\\n\n',
    ],
    ids=["full", "lora", "qlora", "variables", "splitting", "others", "quotes"],
)
def test_scripts_are_read_as_bash_reads_them(text, tmp_path):
    names = "MODEL_NAME TRAIN_DATASET EVAL_DATASET OUTPUT_DIR BSZ TRAIN_BSZ EVAL_BSZ".split()
    environ = {name: f"of {name}" for name in names}
    file = tmp_path / "script.sh"
    file.write_text(text)
    show = 'show() { printf \'%s\\0\' "$@"; }; pip() { :; }; python() { show python "$@"; }; '
    show += 'accelerate() { show accelerate "$@"; }\n'
    done = subprocess.run(
        ["bash", "-c", show + text], env={**environ, "PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    theirs = done.stdout.split("\0")[:-1]
    ours, _, _ = bash_script.read_script(str(file), environ)
    assert ours == [word.removeprefix("y\n") for word in theirs] and len(ours) > 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("python t.py --output_dir $(pwd)", "script.sh:1: a command substitution"),
        ("X=`date`\npython t.py --output_dir $X", "script.sh:1: a command substitution"),
        ("\npython t.py --output_dir $NOWHERE", r"script.sh:2: \$NOWHERE is not set; write NOWHERE="),
        ("python t.py --output_dir 'x", "a quote is not closed"),
        ("python t.py --output_dir x | tee log", "'\\|' needs a shell"),
        ("echo hello", "has no command with --model_name_or_path"),
        ("python t.py --output_dir a\npython t.py --output_dir b", "has 2 training commands"),
    ],
)
def test_scripts_that_would_have_to_be_run(text, says, tmp_path):
    (tmp_path / "script.sh").write_text(text)
    with pytest.raises(UserError, match=says):
        bash_script.read_script(str(tmp_path / "script.sh"), {})


# --- the arithmetic


def test_the_guides_numbers():
    found = arithmetic.run_length(200, 5, epochs=1000)
    assert (found.steps_per_epoch, found.total_steps, found.kind) == (40, 40_000, "mini-batch")
    assert arithmetic.words(found) == (
        "200 rows, batch 5 (5 rows x 1 device x 1 accumulation): 40 steps an epoch, 40,000 steps in 1,000 epochs; "
        "mini-batch gradient descent"
    )
    assert arithmetic.run_length(200, 8, accumulation=4).batch == 32
    assert arithmetic.run_length(203, 5).steps_per_epoch == 41
    kinds = [arithmetic.run_length(200, size).kind for size in (1, 5, 199, 200, 300)]
    assert kinds == ["stochastic", "mini-batch", "mini-batch", "batch", "batch"]
    assert "there are only 5 rows" in arithmetic.words(arithmetic.run_length(5, 8))
    assert "60 steps in 1.50 epochs" in arithmetic.words(arithmetic.run_length(200, 5, max_steps=60))
    assert "40 steps in 1 epoch;" in arithmetic.words(arithmetic.run_length(200, 5))


@for_all(st.integers(1, 300), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.floats(0.01, 4))
def test_steps_are_the_batches_there_are(rows, each, devices, accumulation, epochs):
    micro = [range(rows)[start : start + each * devices] for start in range(0, rows, each * devices)]
    steps = [micro[start : start + accumulation] for start in range(0, len(micro), accumulation)]
    found = arithmetic.run_length(rows, each, devices, accumulation, epochs)
    assert found.steps_per_epoch == len(steps) and sum(len(part) for step in steps for part in step) == rows
    assert found.total_steps - 1 < epochs * len(steps) <= found.total_steps


def test_batches_and_epochs_have_bounds(tmp_path):
    for words_, says in (
        ({"per_device": 0}, "per_device_train_batch_size is 0"),
        ({"rows": 0}, "training rows is 0"),
        ({"accumulation": 0}, "gradient_accumulation_steps is 0"),
        ({"epochs": 0}, "num_train_epochs is 0"),
        ({"epochs": float("nan")}, "must be positive"),
    ):
        with pytest.raises(UserError, match=says):
            arithmetic.run_length(**{"rows": 10, "per_device": 1, **words_})
    assert arithmetic.run_length(10, 1, epochs=0, max_steps=3).total_steps == 3  # another criterion
    for flag in ("--per_device_train_batch_size", "--gradient_accumulation_steps"):
        with pytest.raises(UserError, match=f"{flag} is 0; there must be at least one"):
            config_of(flag, "0")
    with pytest.raises(UserError, match="--num_train_epochs is 0; it must be positive"):
        config_of("--num_train_epochs", "0")
    with pytest.raises(UserError, match="a step takes 64 rows and there are only 5"):
        planning.plan(configuration.from_dict({"model": {"path": "smollm2-135m"}}), "v5e-8", 5, False)
