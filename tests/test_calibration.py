"""`quantize.calibration`: moments of every layer's inputs, the run that uses them, and what is kept of them."""

import json
import os

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file

from tpu_tune.checkpoints import calibrated
from tpu_tune.checkpoints.params import load_params, open_architecture, read_layer
from tpu_tune.checkpoints.source import open_source
from tpu_tune.errors import UserError
from tpu_tune.inference.export import export_base, export_merged
from tpu_tune.inference.model import load, logits
from tpu_tune.inference.run_model import load_any
from tpu_tune.models import Decoder, Execution, architecture
from tpu_tune.models.one_layer import first_of_kind, layer_inputs, run_layer
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.training import calibration
from tpu_tune.training.loop import train
from tpu_tune.transforms import QuantizeConfig
from tpu_tune.transforms.moments import add_rows

pytestmark = pytest.mark.filterwarnings("ignore")
# One of each way that a layer is put together.
CASES = ["llama2", "neox_parallel", "phi3", "gemma3", "qwen3_next"]


def relative(arch, path):
    return path[len(arch.names.layers) :].partition(".")[2]


@pytest.mark.parametrize("case", tiny_models.mostly_slow(CASES, CASES[:1]))
def test_layer_by_layer_is_the_model(case):
    """Run one by one, the layers give the decoder's hidden states; the moments are those of what a matrix is given."""
    arch, params = tiny_models.load(tiny_models.CONFIGS[case])
    ids = jnp.asarray(tiny_models.input_ids("layers", 2, 8))
    positions, segments = jnp.broadcast_to(jnp.arange(8), (2, 8)), jnp.ones((2, 8), jnp.int32)
    x, inputs = layer_inputs(arch, Execution(), params_outside(arch, params), ids, positions)
    assert inputs is None
    moments = None
    for layer in range(arch.num_layers):
        leaves = one_layer(arch, params, layer)
        wanted = tuple(path for path in leaves if path.endswith("proj.weight"))
        tokens = (positions, segments, {}, None)
        x, _, moments = run_layer(arch, Execution(), first_of_kind(arch, layer), leaves, x, tokens, wanted)
        assert {path for paths in moments for path in paths} <= set(wanted)
    hidden, _ = Decoder(arch, params).hidden(ids, positions, segments)
    from tpu_tune.models.branch import norm

    normed = norm(arch, Decoder(arch, params).outside, arch.names.final_norm, x)
    np.testing.assert_allclose(normed, hidden, atol=2e-4)


def params_outside(arch, params):
    inside = {path for module in arch.modules() if module.layers for path in module.leaves()}
    return {path: leaf for path, leaf in params.items() if path not in inside}


def one_layer(arch, params, layer):
    found = {}
    for module in arch.modules():
        if layer in module.layers:
            for path in module.leaves():
                found[relative(arch, path)] = jnp.asarray(params[path][module.layers.index(layer)])
    return found


def test_moments_are_of_real_tokens_alone():
    arch, params = tiny_models.load(tiny_models.CONFIGS["llama2"])
    ids = tiny_models.input_ids("moments", 1, 8)
    positions = jnp.arange(8)[None]
    leaves, found = one_layer(arch, params, 0), []
    for length in (8, 5):
        segments = jnp.asarray(np.arange(8)[None] < length, jnp.int32)
        x, _ = layer_inputs(arch, Execution(), params_outside(arch, params), jnp.asarray(ids), positions)
        tokens = (positions, segments, {}, None)
        moments = run_layer(
            arch, Execution(), 0, leaves, x, tokens, ("self_attn.q_proj.weight", "self_attn.v_proj.weight")
        )[2]
        assert list(moments) == [("self_attn.q_proj.weight", "self_attn.v_proj.weight")]
        moments = {paths: add_rows(None, *inputs) for paths, inputs in moments.items()}
        assert moments["self_attn.q_proj.weight", "self_attn.v_proj.weight"].rows == length
        found.append((np.asarray(list(moments.values())[0].sums), np.asarray(x)))
    from tpu_tune.models.branch import Branch, norm

    weights = Branch({path: leaf for path, leaf in leaves.items() if "input_layernorm" in path})
    normed = np.asarray(norm(arch, weights, arch.layer_kinds[0].names.attention_norm, jnp.asarray(found[0][1])))[0]
    np.testing.assert_allclose(found[0][0], normed.T @ normed, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1][0], normed[:5].T @ normed[:5], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    helpers.write_tiny_llama(folder / "model")
    helpers.write_rows(folder / "rows.jsonl", 40)
    return folder


def config(folder, name, **keys):
    return helpers.make_config(**{
        "output_dir": str(folder / name), "model__path": str(folder / "model"),
        "data__train": str(folder / "rows.jsonl"),
        "quantize__format": "int4", "quantize__group_size": 32, "quantize__calibration": 8, "lora__rank": 4,
        "train__max_steps": 2, "train__per_device_train_batch_size": 1, "model__dtype": "float32",
        "data__max_length": 64, "data__eval_ratio": 0.0, "train__save_steps": 1, "mesh__data": -1, "mesh__fsdp": 1,
        **keys,
    })  # fmt: skip


@pytest.fixture(scope="module")
def run(folder):
    return train(config(folder, "run"), say=lambda line: None)


IDS = np.random.default_rng(0).integers(0, 250, (2, 9)).astype(np.int32)


def test_the_runs_base_loses_less_than_a_plainly_rounded_one(folder, run):
    """On the rows' own text, its logits are nearer to those of the original weights."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    text = "".join(row["prompt"] + row["completion"] for row in rows).encode()[:512]
    ids = np.frombuffer(text, np.uint8).astype(np.int32).reshape(8, 64)
    source = open_source(str(folder / "model"))
    arch = open_architecture(source)
    trees = [load_params(source, arch, jnp.float32, how) for how in (None, QuantizeConfig("int4", 32))]
    original, plain, own = (
        np.asarray(logits(arch, jnp.dtype("float32"), tree, ids))
        for tree in (*trees, load_any(run.output_dir, before=True).params)
    )
    assert np.linalg.norm(own - original) < 0.75 * np.linalg.norm(plain - original)


def test_the_run_keeps_its_base(folder, run, tmp_path):
    """Generation, export and a resumed run read it; loading it with another format does not."""
    own, base = load_any(run.output_dir), load_any(run.output_dir, before=True)
    leaf = base.params["model.layers.mlp.up_proj.weight"]
    source = open_source(str(folder / "model"))
    plain = load(str(folder / "model"), quantize="int4").params["model.layers.mlp.up_proj.weight"]
    assert isinstance(leaf, QuantizedTensor) and leaf.scales.dtype == jnp.int8
    assert not np.array_equal(leaf.codes, plain.codes)
    figures = export_merged(run.output_dir, str(tmp_path / "merged"), base="dequantized")
    assert figures["relative_logit_difference"] < 1e-4
    assert tiny_models.difference(np.asarray(load(str(tmp_path / "merged"))(IDS)), np.asarray(own(IDS))) < 1e-4
    export_merged(run.output_dir, str(tmp_path / "original"), base="original")
    export_base(run.output_dir, str(tmp_path / "base"))
    written = open_source(str(tmp_path / "base")).read("model.layers.1.mlp.up_proj.weight")
    np.testing.assert_allclose(written, np.asarray(leaf.dequantize()[1]).T, rtol=1e-6)
    other = load_any(run.output_dir, quantize="none", before=True).params["model.layers.mlp.up_proj.weight"]
    np.testing.assert_array_equal(other[1].T, source.read("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.slow
def test_a_killed_calibration_goes_on_behind_the_last_layer(folder, run, tmp_path, monkeypatch):
    done = folder / "run" / calibrated.FOLDER
    files = sorted(os.listdir(done))
    assert files == ["layer-00000.safetensors", "layer-00001.safetensors"]
    again = config(folder, "again", output_dir=str(tmp_path / "again"))
    target = tmp_path / "again" / calibrated.FOLDER
    target.mkdir(parents=True)
    (target / files[0]).write_bytes((done / files[0]).read_bytes())
    rounded = []
    original = calibration.round_against
    monkeypatch.setattr(calibration, "round_against", lambda *args: rounded.append(1) or original(*args))
    resumed = train(again, say=lambda line: None)
    assert len(rounded) == 7  # one layer's matrices
    for name in files:  # bit for bit
        jax.tree.map(np.testing.assert_array_equal, load_file(done / name), load_file(target / name))
    assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in run.metrics]
    again.train.max_steps = 3
    train(again, say=lambda line: None)  # a run that goes on reads what it has
    assert len(rounded) == 7
    # Other rows are another calibration; a run whose files are gone says so where it is loaded.
    for name in files:
        os.remove(target / name)
    with pytest.raises(UserError, match="rounded weights of this run's base are not there"):
        load_any(str(tmp_path / "again"))


def test_one_layer_is_read_as_the_whole_is(folder):
    source = open_source(str(folder / "model"))
    arch = open_architecture(source)
    whole, one = load_params(source, arch), read_layer(source, arch, 1)
    assert {path for path in whole if "layers" in path} == set(one)
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, whole[path][1])
    assert architecture(source.config) == arch and jax.device_count()
    with pytest.raises(UserError, match="'quantize.calibration' needs quantize.format to be one of int8, int4, nf4"):
        helpers.make_config(quantize__calibration=4)
