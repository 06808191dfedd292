"""`quantize.calibration` of experts: each one's matrices rounded against the inputs that its own tokens give it."""

import os

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file

from tpu_tune.checkpoints import calibrated
from tpu_tune.checkpoints.params import load_params
from tpu_tune.checkpoints.stacked_experts import with_experts_apart
from tpu_tune.inference.model import logits
from tpu_tune.inference.run_model import load_any
from tpu_tune.models import Execution, architecture
from tpu_tune.models.one_layer import layer_inputs, run_layer
from tpu_tune.tensors import QuantizedTensor, quantize_tensor
from tpu_tune.training import calibration
from tpu_tune.training.loop import train
from tpu_tune.transforms import QuantizeConfig
from tpu_tune.transforms.gptq import round_against, round_experts
from tpu_tune.transforms.moments import FEW, Moments, add_rows

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = [
    "qwen3_moe", "mixtral", "qwen2_moe", "olmoe", "granitemoe", "granitemoeshared", "glm4_moe", "gpt_oss",
    "qwen3_5_moe", "qwen3_next_experts", "gemma4_experts",
]  # fmt: skip
HOW = QuantizeConfig("int4", 16)


def rounded(case, folder, tensors=None, count=12, length=40):
    """Calibrate a tiny model by random tokens; return its source, its architecture, the tokens and what was said."""
    source = with_experts_apart(tiny_models.source(tiny_models.CONFIGS[case], tensors))
    arch = architecture(source.config)
    ids = np.asarray(tiny_models.input_ids(f"calibration of {case}", count, length) % 12, np.int32)  # few words
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    segments = (positions < length - 8).astype(np.int32)  # the rest is padding
    job = calibration.Calibration(source, arch, HOW, jnp.float32, str(folder), "mark", "rows")
    said = job.left_plain()
    job.run((ids, positions, segments), said.append)
    return source, arch, ids[:, : length - 8], said


@pytest.mark.parametrize("case", tiny_models.mostly_slow(CASES, CASES[:1]))
def test_the_model_loses_less_than_by_plain_rounding_and_is_read_back(case, tmp_path):
    source, arch, ids, said = rounded(case, tmp_path)
    assert not any("experts" in line for line in said if "rounded plainly" in line)
    read = calibrated.with_calibrated(source, arch, str(tmp_path), "mark")
    trees = [load_params(source, arch, jnp.float32, how) for how in (None, HOW)]
    trees.append(load_params(read, arch, jnp.float32, HOW))
    changed = [
        module.path
        for module in arch.modules()
        if module.experts and not np.array_equal(*(codes(tree[module.weight]) for tree in trees[1:]))
    ]
    assert changed == [module.path for module in arch.modules() if module.experts]
    original, plain, own = (np.asarray(logits(arch, jnp.dtype("float32"), tree, ids)) for tree in trees)
    assert np.linalg.norm(own - original) < 0.9 * np.linalg.norm(plain - original)


def codes(leaf):
    assert isinstance(leaf, QuantizedTensor)
    return np.asarray(leaf.unpacked())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_files_that_stack_the_experts_get_the_same_matrices(case, tmp_path):
    """As transformers 5 has them in memory: gate_up_proj and down_proj of all experts of a layer."""
    tensors = tiny_models.weights(tiny_models.CONFIGS[case])
    arch = architecture(tiny_models.CONFIGS[case])
    stacked = dict(tensors)
    for layer, kind in enumerate(arch.layer_kinds):
        names = kind.names
        each = [
            [stacked.pop(f"model.layers.{layer}.{kind.experts.path}.{expert}{name[len(kind.experts.path) :]}.weight")
             for expert in range(kind.experts.count)]
            for name in (names.expert_gate, names.expert_up, names.expert_down)
        ]  # fmt: skip
        gate, up, down = map(np.stack, each)
        stacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        stacked[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    found = []
    for name, files in (("apart", tensors), ("stacked", stacked)):
        source, arch, _, _ = rounded(case, tmp_path / name, files, count=4)
        read = calibrated.with_calibrated(source, arch, str(tmp_path / name), "mark")
        found.append(load_params(read, arch, jnp.float32, HOW))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_an_experts_moments_are_those_of_the_tokens_routed_to_it():
    """By NumPy from what the router reads: X_e^T X_e, and of the down projection what the expert makes of X_e."""
    arch, params = tiny_models.load(tiny_models.CONFIGS["mixtral"])
    ids = jnp.asarray(tiny_models.input_ids("moments", 2, 12))
    positions = jnp.broadcast_to(jnp.arange(12), ids.shape)
    segments = jnp.asarray(np.arange(12) < np.array([[12], [7]]), jnp.int32)
    leaves = {
        path[len("model.layers.") :]: jnp.asarray(leaf[0]) for path, leaf in params.items() if "model.layers." in path
    }
    outside = {path: leaf for path, leaf in params.items() if "model.layers." not in path}
    x, _ = layer_inputs(arch, Execution(), outside, ids, positions)
    at = "block_sparse_moe"
    router, gate, up, down = (f"{at}.{name}.weight" for name in ("gate", "experts.w1", "experts.w3", "experts.w2"))
    inputs = run_layer(
        arch, Execution(), 0, leaves, x, (positions, segments, {}, None), (router, gate, up, down)
    )[2]  # fmt: skip
    assert set(inputs) == {(router,), (gate, up), (down,)}
    twice = {}
    for paths, seen in inputs.items():
        twice[paths] = add_rows(add_rows(None, *seen), *seen)

    read = np.asarray(inputs[router,][0], np.float64)[np.asarray(segments).reshape(-1) > 0]
    w = {path: np.asarray(leaves[path], np.float64) for path in (router, gate, up, down)}
    chosen = np.argsort(-(read @ w[router]), axis=-1)[:, :2]
    for expert in range(4):
        own = read[(chosen == expert).any(-1)]
        a = own @ w[gate][expert]
        inner = a / (1 + np.exp(-a)) * (own @ w[up][expert])
        for paths, expected in (((gate, up), own), ((down,), inner)):
            assert twice[paths].rows[expert] == 2 * len(own)
            np.testing.assert_allclose(twice[paths].sums[expert], 2 * expected.T @ expected, rtol=1e-4, atol=1e-4)


def test_experts_of_few_tokens_are_rounded_with_what_is_known_without_them(monkeypatch):
    """Against the formula; of no token: plainly; of one: on tokens not seen no worse than plainly."""
    random, width = np.random.default_rng(3), 64
    mixing = random.standard_normal((width, width)) * (np.arange(1, width + 1) ** -0.7)[:, None]
    draw = lambda count: (random.standard_normal((count, width)) @ mixing).astype(np.float32)  # noqa: E731
    inputs = [draw(count) for count in (0, 1, 8, 900)]
    weight = random.standard_normal((4, width, 24)).astype(np.float32)
    sizes = jnp.asarray([len(x) for x in inputs])
    moments = add_rows(None, jnp.asarray(np.concatenate([*inputs, draw(7)])), sizes)  # the last 7 are of no expert
    config, unseen = QuantizeConfig("int4", 32, double_quant=False), draw(2000)
    monkeypatch.setattr("tpu_tune.transforms.gptq.EXPERTS_BYTES", 2 * 4 * width * width)
    losses = {}
    for same in (True, False):
        found = round_experts(jnp.asarray(weight), Moments(moments.sums, moments.rows), same, config)
        assert found.shape == (width, 24) and found.codes.shape == (4, width // 2, 24)
        everyone = np.concatenate(inputs)
        for expert, x in enumerate(inputs):
            plain = quantize_tensor(jnp.asarray(weight[expert]), "int4", 32)
            own = jax.tree.map(lambda part, expert=expert: part[expert], found)
            if not len(x):
                jax.tree.map(np.testing.assert_array_equal, own, plain)
                continue
            known = everyone.T @ everyone / len(everyone) if same else np.diag((x * x).mean(0))
            blended = x.T @ x + FEW * width * known
            expected = round_against(jnp.asarray(weight[expert]), jnp.asarray(blended), config)
            assert np.mean(np.asarray(own.codes) == np.asarray(expected.codes)) > 0.98
            errors = [
                np.linalg.norm(unseen @ (np.asarray(part.dequantize()) - weight[expert])) for part in (own, plain)
            ]
            losses[same, len(x)] = errors[0] / errors[1]
    assert max(losses.values()) < 1.03
    assert max(losses[True, 1], losses[True, 8], losses[True, 900], losses[False, 900]) < 0.8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    helpers.write_tiny_llama(folder / "model")  # for its tokenizer
    tiny_models.write(folder / "model", tiny_models.CONFIGS["qwen3_moe"] | {"vocab_size": 264})
    helpers.write_rows(folder / "rows.jsonl", 24)
    return helpers.make_config(
        output_dir=str(folder / "run"), model__path=str(folder / "model"), data__train=str(folder / "rows.jsonl"),
        quantize__format="int4", quantize__group_size=16, quantize__calibration=4, lora__rank=2, lora__dropout=0.0,
        train__max_steps=2, train__per_device_train_batch_size=1, model__dtype="float32", data__max_length=32,
        data__eval_ratio=0.0, train__save_steps=1, mesh__data=-1, mesh__fsdp=1,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_trains_on_calibrated_experts_and_goes_on_with_them(config, monkeypatch):
    """It reads them back, also after it was killed in the midst of calibration."""
    said = []
    run = train(config, say=said.append)
    folder = os.path.join(run.output_dir, calibrated.FOLDER)
    assert not any("experts" in line for line in said if "rounded plainly, as without it" in line)
    stored = {name: load_file(os.path.join(folder, name)) for name in os.listdir(folder)}
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    base = load_any(run.output_dir, before=True).params["model.layers.mlp.experts.down_proj.weight"]
    np.testing.assert_array_equal(base.codes[1, 3], stored["layer-00001.safetensors"][f"{name}.codes"])
    os.remove(os.path.join(folder, "layer-00001.safetensors"))
    layers = []
    original = calibration.Calibration._rounded
    monkeypatch.setattr(
        calibration.Calibration,
        "_rounded",
        lambda job, layer, *rest: layers.append(layer) or original(job, layer, *rest),
    )
    config = config.copy_and_resolve_references()
    config.train.max_steps = 3
    resumed = train(config, say=lambda line: None)
    assert layers == [1]
    for file, arrays in stored.items():
        jax.tree.map(np.testing.assert_array_equal, arrays, load_file(os.path.join(folder, file)))
    assert len(resumed.metrics) == 3 and np.isfinite([row["loss"] for row in resumed.metrics]).all()
