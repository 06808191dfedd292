"""The written result is read back and held against the run: what passes, what is refused, and with which numbers."""

import json

import jax
import numpy as np
import pytest
import tiny_models
from helpers_training import make_config, prepare, write_rows, write_stopped_run, write_tiny_llama

from tpu_tune.checkpoints import huggingface_write, peft
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.curves.report import page
from tpu_tune.curves.runs import read_run
from tpu_tune.errors import UserError
from tpu_tune.inference.export import export_merged
from tpu_tune.training.loop import train
from tpu_tune.training.read_back import check, read_back
from tpu_tune.training.result import write_result

LORA = {"method": "lora", "lora__rank": 4, "lora__target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


def written(base, out, devices=1, **keys):
    """Write the result of a run that has not made a step, with adapters that are not zero; return what reads it."""
    config = make_config(model__path=str(base), output_dir=str(out), data__train="none", **keys)
    model, steps = prepare(config, 4, devices)
    random = np.random.RandomState(0)
    moved = {
        path: jax.device_put(leaf + random.randn(*leaf.shape).astype(np.float32) / 16, leaf.sharding)
        for path, leaf in steps.initial_state.trainable.items()
    }
    state = jax.tree.map(lambda leaf: leaf, steps.initial_state)
    state.trainable.update(moved)
    directory = RunDirectory(str(out)).result(config.method)
    write_result(config, model, state, directory)
    return lambda: read_back(config, model, state, directory)


def spoiled(monkeypatch, module, name, factor):
    """Have one tensor written as another than was trained."""
    save = module.save_file

    def save_other(tensors, *args, **keys):
        save({key: value * (factor if name in key else 1) for key, value in tensors.items()}, *args, **keys)

    monkeypatch.setattr(module, "save_file", save_other)


@pytest.mark.parametrize("factor", [-3.0, 1.01])
def test_a_merged_model_whose_files_are_wrong_is_refused(base, tmp_path, monkeypatch, factor):
    written(base, tmp_path / "run", quantize__format="int4", **LORA)
    RunDirectory(str(tmp_path / "run")).write_config(make_config(
        model__path=str(base), output_dir=str(tmp_path / "run"), data__train="none", quantize__format="int4", **LORA
    ))  # fmt: skip
    spoiled(monkeypatch, huggingface_write, "o_proj", factor)
    with pytest.raises(UserError, match="wrong does not hold the merged model: .*o_proj.weight .*rounded to bfloat16"):
        export_merged(str(tmp_path / "run"), str(tmp_path / "wrong"), dtype="bfloat16")


@pytest.mark.parametrize(
    "keys",
    [
        {"quantize__format": "nf4"},
        {"lora__rank_pattern": {"layers.1.self_attn.q_proj": 2}, "lora__layers_to_transform": [1]},
        {"lora__use_rslora": True, "lora__use_dora": True, "lora__modules_to_save": ["norm"]},
    ],
)
def test_an_adapter_comes_back_bit_for_bit(base, tmp_path, keys):
    found = written(base, tmp_path, **LORA, **keys)()
    assert (found.failed, found.difference) == (False, 0.0) and "bit for bit" in found.words


@pytest.mark.parametrize("mesh", [{}, pytest.param({"mesh__fsdp": 2, "mesh__tensor": 2}, marks=pytest.mark.slow)])
def test_an_adapter_written_with_another_scale_is_refused_with_the_numbers(base, tmp_path, mesh):
    read = written(base, tmp_path, 4 if mesh else 1, **LORA, **mesh)
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "lora_alpha": 3 * settings["lora_alpha"]}))
    found = read()
    assert found.failed and 0 < found.difference < 5
    with pytest.raises(
        UserError, match=rf"adapter does not hold .* tensors or settings are not .* differ from .* {found.bound:.2%}"
    ):
        check(found.failed, found.words, str(tmp_path / "adapter"))


def test_a_model_rounded_to_bfloat16_is_within_its_bound_and_a_wrong_one_is_not(tmp_path, monkeypatch):
    base = write_tiny_llama(tmp_path / "base", torch_dtype="bfloat16")
    found = written(base, tmp_path / "run", method="full", model__dtype="float32")()
    assert not found.failed and 0 < found.difference < found.bound and "in bfloat16" in found.words
    spoiled(monkeypatch, huggingface_write, "down_proj", 1.5)
    assert written(base, tmp_path / "other", method="full", model__dtype="float32")().failed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tensor"), [("t5", "wi"), ("mixtral", "experts"), ("gemma2", "down_proj"), ("gpt2", "c_fc")]
)
def test_models_of_other_kinds_are_compared_too(tmp_path, monkeypatch, family, tensor):
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS[family])
    assert written(base, tmp_path / "run", method="full")().difference == 0.0
    spoiled(monkeypatch, huggingface_write, tensor, 1.5)
    assert written(base, tmp_path / "other", method="full", model__dtype="float32")().failed


def test_a_run_says_it_and_one_whose_files_are_wrong_ends_in_an_error_until_they_are_removed(
    base, tmp_path, monkeypatch
):
    """The run has made its one step, and has to write its result."""
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    config = make_config(
        model__path=str(base), output_dir=str(tmp_path / "run"), data__train=str(rows), data__max_length=64, **LORA,
        train__max_steps=1, train__save_steps=1, train__learning_rate=0.1, train__per_device_train_batch_size=2,
        data__eval_ratio=0.0,
    )  # fmt: skip
    write_stopped_run(config, {1: 6.0})
    with monkeypatch.context() as patch:
        spoiled(patch, peft, "lora_B", 100)
        with pytest.raises(UserError, match="adapter does not hold what was trained"):
            train(config, lambda line: None)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    with pytest.raises(UserError, match="adapter does not hold what was trained"):
        train(config, lambda line: None)
    for file in (tmp_path / "run" / "adapter").iterdir():
        file.unlink()
    (tmp_path / "run" / "adapter").rmdir()
    lines = []
    train(config, lines.append)
    assert any("adapter read back: equal to the run's bit for bit" in line for line in lines)
    assert RunDirectory(config.output_dir).summary()["result_read_back"]["failed"] is False
    run = read_run(config.output_dir)
    assert "what was trained: equal to the run&#39;s bit for bit" in page([run], [run.diagnosis()])
