"""Layers that differ in their leaves: groups, and a model with three kinds of layers against the Llama it equals."""

from __future__ import annotations

import pathlib

import helpers_training as helpers
import jax
import mixed_family
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import tpu_tune
from tpu_tune.checkpoints import huggingface_write
from tpu_tune.inference.generation import Sampling
from tpu_tune.models import FAMILIES
from tpu_tune.models.groups import LayerGroup, layer_groups

WIDTH = 24


@pytest.fixture(scope="module", autouse=True)
def families():
    added = {"mixed": mixed_family.mixed, "windowed_llama": mixed_family.windowed_llama}
    FAMILIES.update(added)
    yield
    for name in added:
        del FAMILIES[name]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of the mixed model and of the Llama."""
    return mixed_family.write_both(tmp_path_factory.mktemp("models"))


def test_groups_by_hand():
    assert layer_groups("aaaa") == (LayerGroup(0, 1, 4),)
    assert layer_groups("dddadddaddda") == (LayerGroup(0, 4, 3),)
    assert layer_groups("fmmmm") == (LayerGroup(0, 1, 1), LayerGroup(1, 1, 4))
    assert layer_groups("dddaddda" + "dd") == (LayerGroup(0, 4, 2), LayerGroup(8, 1, 2))
    assert layer_groups("ab") == (LayerGroup(0, 1, 1), LayerGroup(1, 1, 1))
    assert layer_groups("") == ()


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_groups_cover_all_layers_once_and_each_repeats_its_pattern(kinds):
    groups = layer_groups(kinds)
    assert [layer for group in groups for layer in group.layers] == list(range(len(kinds)))
    for group in groups:
        for layer in group.layers:
            assert kinds[layer] == kinds[group.first + (layer - group.first) % group.period]
        assert group.period == 1 or group.repeats > 1


def test_the_tree_has_one_stack_for_all_layers_with_the_same_module(both):
    model = tpu_tune.load(both[0])
    assert model.architecture.groups == (LayerGroup(0, 1, 1), LayerGroup(1, 3, 2), LayerGroup(7, 1, 1))
    layers = {module.path: module.layers for module in model.architecture.modules() if module.layers}
    separate = (0, 1, 2, 4, 5, 7)
    assert layers["model.layers.self_attn.q_proj"] == separate
    assert layers["model.layers.self_attn.qkv_proj"] == mixed_family.FUSED_LAYERS
    assert layers["model.layers.self_attn.o_proj"] == tuple(range(mixed_family.LAYERS))
    # Two shapes under one name are two stacks, and both keep the names of the file.
    assert layers["model.layers.mlp.gate_proj"] == (0,) and layers["model.layers[1].mlp.gate_proj"] == (1, 2, 4, 5, 7)
    module = next(one for one in model.architecture.modules() if one.path == "model.layers[1].mlp.gate_proj")
    assert module.name(4) == "model.layers.4.mlp.gate_proj"
    assert model.params["model.layers[1].mlp.gate_proj.weight"].shape == (5, 32, 64)


def test_logits_and_generated_tokens_are_the_llamas(both):
    ours, reference = (tpu_tune.load(folder) for folder in both)
    ids = np.random.default_rng(0).integers(0, 256, (2, WIDTH))
    expected = np.asarray(reference(ids))
    np.testing.assert_allclose(ours(ids), expected, atol=1e-5 * np.abs(expected).max())
    sampling = Sampling(max_new_tokens=12)
    assert ours.generate(["some words", "b"], sampling, chat=False) == reference.generate(
        ["some words", "b"], sampling, chat=False
    )


SETTINGS = {
    "full": {"method": "full"},
    # A is drawn, and dropout masks too, by path and layer: the same for o_proj, one stack in both models.
    "lora": {"lora__target_modules": ["o_proj"], "lora__dropout": 0.1, "lora__layers_to_transform": [0, 2, 3, 7]},
    "qlora": {"lora__target_modules": ["o_proj"], "quantize__format": "nf4", "quantize__group_size": 16},
}


def trained(path: str, folder: pathlib.Path, devices: int, **keys):
    """Return (model, state, losses) after three steps."""
    config = helpers.make_config(
        model__path=path,
        model__dtype="float32",
        output_dir=str(folder),
        lora__init_lora_weights="gaussian",
        train__learning_rate=1e-3,
        train__lr_scheduler_type="constant",
        train__per_device_train_batch_size=8 // devices,
        mesh__data=1,
        mesh__fsdp=devices,
        **keys,
    )
    model, steps = helpers.prepare(config, 3, devices)
    rows = helpers.rows_of([[one] for one in helpers.documents(24, 6, WIDTH, 8, 0)], WIDTH)
    state, metrics = helpers.run_steps(model, steps, [helpers.window(rows, 1)] * 3)
    return model, state, [row["loss"] for row in metrics]


@pytest.mark.parametrize(
    "method, devices",
    [
        ("full", 1),
        ("qlora", 8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("full", 8), ("lora", 8), ("lora", 1), ("qlora", 1))
        ),
    ],
)
def test_training_is_the_llamas(both, method, devices, tmp_path):
    keys = {**SETTINGS[method], "model__remat": "full" if devices == 1 else "dots"}
    (_, _, ours), (_, _, theirs) = (trained(path, tmp_path, devices, **keys) for path in both)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert abs(ours[2] - ours[0]) > 1e-4


def test_a_trained_model_is_written_under_the_files_names(both, tmp_path):
    model, state, _ = trained(both[0], tmp_path / "run", 1, method="full")
    huggingface_write.write_model(str(tmp_path / "out"), state.trainable, model.source, model.architecture)
    before, after = (load_file(pathlib.Path(folder) / "model.safetensors") for folder in (both[0], tmp_path / "out"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    assert all(np.abs(before[name] - after[name]).max() > 0 for name in before)
    again = tpu_tune.load(str(tmp_path / "out"))
    for path, leaf in state.trainable.items():
        np.testing.assert_array_equal(again.params[path], leaf)


def test_an_adapter_comes_back_from_its_file(both, tmp_path):
    """Adapters on a selection of layers, over two stacks of one name and over fused matrices."""
    from tpu_tune.checkpoints import peft

    keys = dict(
        lora__target_modules=["o_proj", "down_proj", "qkv_proj"],
        lora__rank_pattern={r"layers\.[03]\.mlp\.down_proj": 3},
        lora__layers_to_transform=[0, 2, 3, 7],
    )
    model, state, _ = trained(both[0], tmp_path / "run", 1, **keys)
    peft.write_adapter(str(tmp_path / "adapter"), state.trainable, model.method, model.architecture, both[0])
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    layers = {name.split(".")[4] for name in names if "down_proj" in name}
    assert layers == {"0", "2", "3", "7"} and not any("[" in name for name in names)
    _, back = peft.read_adapter(str(tmp_path / "adapter"), model.architecture)
    assert back.keys() == state.trainable.keys()
    jax.tree.map(np.testing.assert_array_equal, back, dict(state.trainable))
    ids = np.random.default_rng(1).integers(0, 256, (1, WIDTH))
    merged = tpu_tune.load(both[0], adapter=str(tmp_path / "adapter"))
    assert np.abs(np.asarray(merged(ids)) - np.asarray(tpu_tune.load(both[0])(ids))).max() > 1e-4
