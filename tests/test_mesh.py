"""The same run on one device and on eight: the same losses, shared storage, and codes gathered instead of weights."""

from __future__ import annotations

import logging
import pathlib
import re
from typing import Any

import helpers_training as helpers
import jax
import numpy as np
import pytest

from tpu_tune import UserError
from tpu_tune.checkpoints.run_checkpoints import RunCheckpoints
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.training import loop
from tpu_tune.transforms import sharding

MESHES = {
    "one device": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1},
    "data=8": {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1},
    "fsdp=8": {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1},
    "fsdp=4 x tensor=2": {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1},
    "sequence=8": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 8},  # two tokens a device
    "all but data": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}
WHOLE = "fsdp=4 x tensor=2"
WIDTH, ROWS, STEPS = 16, 8, 3


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Every size divides by eight, and every `in` by eight groups of 16 rows."""
    return helpers.write_tiny_llama(
        tmp_path_factory.mktemp("even"),
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """SmolLM2's proportions: 9 heads, 3 key and value heads, 9 groups of 16 rows, and a vocabulary that is odd."""
    return helpers.write_tiny_llama(
        tmp_path_factory.mktemp("odd"),
        hidden_size=144,
        intermediate_size=400,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=261,
    )


def settings(path: pathlib.Path, mesh: str, method: str) -> Any:
    sizes = MESHES[mesh]
    shards = sizes["data"] * sizes["fsdp"]
    keys = {f"mesh__{axis}": size for axis, size in sizes.items()}
    if method == "qlora":
        keys |= {
            "quantize__format": "nf4",
            "quantize__group_size": 16,
            "quantize__double_quant": True,
            "method": "lora",
        }
    else:
        keys |= {"method": method}
    return helpers.make_config(
        model__path=str(path),
        model__dtype="float32",
        lora__rank=4,
        train__learning_rate=1e-2 if method == "qlora" else 1e-3,
        train__lr_scheduler_type="constant",
        train__per_device_train_batch_size=ROWS // shards,
        train__weight_decay=0.1,
        **keys,
    )


def prepared(path: pathlib.Path, mesh: str, method: str) -> tuple[Any, Any]:
    devices = int(np.prod(list(MESHES[mesh].values())))
    return helpers.prepare(settings(path, mesh, method), STEPS, devices)


def batches() -> list[dict[str, np.ndarray]]:
    """Rows of two documents each, most of them with padding behind."""
    found = []
    for seed in range(STEPS):
        first, second = (helpers.documents(24, 3, WIDTH // 2, ROWS, seed + part) for part in (0, 50))
        found.append(helpers.window(helpers.rows_of(list(zip(first, second, strict=True)), WIDTH), 1))
    return found


@pytest.fixture(scope="module")
def one_device_losses() -> Any:
    found: dict[tuple[str, str], list[float]] = {}

    def losses(path: pathlib.Path, method: str) -> list[float]:
        if (str(path), method) not in found:
            model, steps = prepared(path, "one device", method)
            found[str(path), method] = [row["loss"] for row in helpers.run_steps(model, steps, batches())[1]]
        return found[str(path), method]

    return losses


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one device"])
def test_losses_and_storage_on_eight_devices(
    even: pathlib.Path, one_device_losses: Any, mesh: str, method: str
) -> None:
    model, steps = prepared(even, mesh, method)
    state, metrics = helpers.run_steps(model, steps, batches())
    np.testing.assert_allclose([row["loss"] for row in metrics], one_device_losses(even, method), rtol=1e-4)
    sizes = MESHES[mesh]
    shares = sizes["fsdp"] * sizes["tensor"] * sizes["sequence"]
    kernels = {
        path: leaf for path, leaf in (model.frozen or state.trainable).items() if re.search(r"(proj)\.weight$", path)
    }
    assert len(kernels) == 7
    for path, leaf in kernels.items():
        assert isinstance(leaf, QuantizedTensor) == (method == "qlora")
        parts = [leaf.codes, leaf.scales] if method == "qlora" else [leaf]
        for part in parts:
            assert {shard.data.size for shard in part.addressable_shards} == {part.size // shares}, path
    if method == "full":  # a moment lives where its parameter does
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 3]
        assert len(moments) == 14 and all(
            leaf.addressable_shards[0].data.size == leaf.size // shares for leaf in moments
        )


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("mesh", ["fsdp=8", WHOLE])
def test_sizes_that_do_not_divide(
    odd: pathlib.Path, one_device_losses: Any, mesh: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="tpu_tune"):
        model, steps = prepared(odd, mesh, method)
    _, metrics = helpers.run_steps(model, steps, batches())
    np.testing.assert_allclose([row["loss"] for row in metrics], one_device_losses(odd, method), rtol=1e-4)
    said = caplog.text
    if method == "qlora":
        assert "moved to axis 1 for mesh axis 'fsdp'" in said  # 9 groups of 16 rows do not divide
        q, down = (model.frozen[f"model.layers.{name}.weight"] for name in ("self_attn.q_proj", "mlp.down_proj"))
        for leaf in (q, down):  # 144 columns divide by eight
            assert {shard.data.size for shard in leaf.codes.addressable_shards} == {leaf.codes.size // 8}
    if mesh == WHOLE:
        assert "model.embed_tokens.weight: (261, 144)" in said or "axis 0 of (261, 144) moved" in said


@pytest.mark.parametrize("mesh", ["fsdp=8", WHOLE])
def test_the_compiled_step_gathers_codes_and_never_a_weight(even: pathlib.Path, mesh: str) -> None:
    model, steps = prepared(even, mesh, "qlora")
    text = steps.train.lower(steps.initial_state, model.frozen, steps.put_batch(batches()[0], 1)).compile().as_text()
    gathers = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", text)
    assert any(kind == "u8" for kind, _ in gathers), "codes are gathered"
    tensor = MESHES[mesh]["tensor"]
    weights = {leaf.shape for leaf in model.frozen.values() if isinstance(leaf, QuantizedTensor)}
    sizes = {a * b // share for a, b in weights for share in (1, tensor)}
    for kind, shape in gathers:
        if kind != "u8":
            assert int(np.prod([int(size) for size in shape.split(",") if size])) not in sizes, (
                f"{kind}[{shape}] is a weight"
            )


def test_a_checkpoint_restores_onto_another_mesh(even: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model, steps = prepared(even, "fsdp=8", "qlora")
    state, _ = helpers.run_steps(model, steps, batches()[:1])
    with RunCheckpoints(str(tmp_path / "checkpoints"), "base") as checkpoints:
        checkpoints.save(1, state, {"num_tokens": 7})
        checkpoints.wait()
        _, whole = helpers.run_steps(model, steps, batches()[1:], state)
        for mesh in (WHOLE, "one device"):
            other, other_steps = prepared(even, mesh, "qlora")
            restored, memory = checkpoints.restore(other_steps.initial_state)
            assert memory["num_tokens"] == 7 and int(restored.step) == 1
            leaf = "model.layers.mlp.down_proj.lora_A"
            assert restored.trainable[leaf].sharding == other.trainable[leaf].sharding
            _, rest = helpers.run_steps(other, other_steps, batches()[1:], restored)
            np.testing.assert_allclose([row["loss"] for row in rest], [row["loss"] for row in whole], rtol=1e-4)


def test_meshes_that_cannot_be(even: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="mesh.data=3, mesh.fsdp=1, .* does not make 8 devices"):
        sharding.make_mesh({"data": 3, "fsdp": 1, "tensor": 1, "sequence": 1}, jax.devices())
    with pytest.raises(UserError, match="does not make 8 devices"):
        sharding.make_mesh({"data": 3, "fsdp": -1, "tensor": 1, "sequence": 1}, jax.devices())
    rows = helpers.write_rows(tmp_path / "rows.jsonl", 4)
    config = helpers.make_config(
        data__train=str(rows),
        model__path=str(even),
        output_dir=str(tmp_path / "out"),
        mesh__sequence=8,
        mesh__fsdp=1,
        data__max_length=100,
    )
    with pytest.raises(UserError, match="data.max_length=100 does not divide over mesh.sequence=8"):
        loop.train(config, say=lambda line: None)
    assert not (tmp_path / "out").exists()
