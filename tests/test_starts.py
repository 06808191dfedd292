"""Adapters that start from their weights (PiSSA, OLoRA, LoftQ) in our own runs, against peft."""

import functools

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from tpu_tune import config as configuration
from tpu_tune.checkpoints.peft import read_adapter
from tpu_tune.errors import UserError
from tpu_tune.inference.export import export_merged
from tpu_tune.inference.model import load
from tpu_tune.inference.run_model import load_any
from tpu_tune.tensors import dense
from tpu_tune.training.loop import train
from tpu_tune.training.prepare_model import prepare_model
from tpu_tune.transforms import QuantizeConfig, quantize_weight, sharding
from tpu_tune.transforms.starts import start_pair

pytestmark = pytest.mark.filterwarnings("ignore")
SHAPE, RANK, ALPHA = (24, 40), 5, 15.0


def weights(shape=SHAPE):
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_start_is_pefts(how, shape):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    weight = weights(shape)
    layer = torch.nn.Sequential(torch.nn.Linear(*shape, bias=False))
    layer[0].weight.data = torch.from_numpy(weight.T.copy())
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=how)
    theirs = peft.get_peft_model(layer, config).base_model.model[0]
    a, b = start_pair(jnp.asarray(weight), how, RANK, ALPHA / RANK)
    expected = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    np.testing.assert_allclose((a @ b).T, expected.detach().numpy(), atol=2e-5)
    base = weight - ALPHA / RANK * np.asarray(a @ b)
    np.testing.assert_allclose(base.T, theirs.base_layer.weight.detach().numpy(), atol=5e-5)
    sizes = np.linalg.norm(theirs.lora_A["default"].weight.detach().numpy(), axis=1)
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), sizes, rtol=1e-4)


def test_loftqs_start_is_pefts():
    utils = pytest.importorskip("peft.utils.loftq_utils")
    torch = pytest.importorskip("torch")
    lost = weights() * 0.01
    theirs = utils._low_rank_decomposition(torch.from_numpy(lost.T.copy()), RANK)
    a, b = start_pair(jnp.asarray(lost), "loftq", RANK, 1.0)  # peft takes alpha for rank here
    np.testing.assert_allclose((a @ b).T, (theirs["L"] @ theirs["R"]).numpy(), atol=1e-6)
    scaled = start_pair(jnp.asarray(lost), "loftq", RANK, 3.0)
    np.testing.assert_allclose(3 * (scaled[0] @ scaled[1]), a @ b, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    helpers.write_tiny_llama(folder / "model")
    helpers.write_rows(folder / "rows.jsonl", 24)
    return folder


SETTINGS = {
    "train__max_steps": 3, "train__learning_rate": 1e-2, "train__per_device_train_batch_size": 1,
    "model__dtype": "float32", "data__max_length": 64, "data__eval_ratio": 0.0, "train__save_strategy": "no",
    "lora__rank": 4, "lora__alpha": 12.0, "lora__rank_pattern": {"layers.1.self_attn.q_proj": 2},
    "mesh__data": -1, "mesh__fsdp": 1,
}  # fmt: skip


def config(folder, name, **keys):
    paths = {"model__path": str(folder / "model"), "data__train": str(folder / "rows.jsonl")}
    return helpers.make_config(output_dir=str(folder / name), **{**SETTINGS, **paths, **keys})


@functools.cache
def trained(folder, how, **keys):
    return train(config(folder, how, lora__init_lora_weights=how, **keys), say=lambda line: None)


IDS = np.random.default_rng(0).integers(0, 250, (2, 9)).astype(np.int32)


@pytest.mark.parametrize("how", ["pissa", pytest.param("olora", marks=pytest.mark.slow)])
def test_what_a_run_writes_is_a_plain_adapter_of_the_original(how, folder):
    """peft loads it, of rank 2r, over the model as it stands; so do we, and so does the run by its own base."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    run = trained(folder, how)
    model = load(str(folder / "model"), adapter=run.result_dir)
    assert read_adapter(run.result_dir, model.architecture)[0].rank == 8
    found = np.asarray(model(IDS))
    theirs = peft.PeftModel.from_pretrained(tiny_models.torch_model(str(folder / "model")), run.result_dir).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    assert tiny_models.difference(found, expected) < 1e-4
    own = load_any(run.output_dir)
    assert own.targets.spec.rank == 4 and tiny_models.difference(np.asarray(own(IDS)), found) < 1e-4
    before = np.asarray(load_any(run.output_dir, before=True)(IDS))
    assert tiny_models.difference(before, np.asarray(load(str(folder / "model"))(IDS))) < 1e-6
    assert tiny_models.difference(before, found) > 1e-3


@pytest.mark.slow
def test_a_start_leaves_the_model_as_it_is(folder):
    losses = [trained(folder, how).metrics[0]["loss"] for how in ("pissa", "olora", "true")]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and losses[1] == pytest.approx(losses[2], rel=1e-5)


QUANTIZED = pytest.mark.parametrize(("how", "format"), [("pissa", "nf4"), ("loftq", "int4")])


@QUANTIZED
def test_a_quantized_weight_and_its_start_lose_less(how, format, folder):
    """Before the first step, stored weight and adapter are together nearer to the weight than the stored one alone."""
    keys = {"quantize__format": format, "quantize__group_size": 32}
    started = config(folder, f"first-{how}", lora__init_lora_weights=how, **keys)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, jax.devices()[:1])
    model = prepare_model(started, mesh)
    together = model.method.combine(model.trainable, model.frozen)
    original = load(str(folder / "model")).params
    for path in ("model.layers.mlp.up_proj.weight", "model.layers.self_attn.k_proj.weight"):
        plain = quantize_weight(original[path], QuantizeConfig(format, 32)).dequantize()
        lost, alone = (np.linalg.norm(np.asarray(dense(leaf) - original[path])) for leaf in (together[path], plain))
        assert lost < 0.95 * alone


@pytest.mark.slow
@QUANTIZED
def test_a_quantized_run_goes_on_and_exports(how, format, folder):
    """A run that was stopped goes on with the base that it had; what is exported is what was trained."""
    keys = {
        "quantize__format": format, "quantize__group_size": 32, "train__save_strategy": "steps", "train__save_steps": 1,
        "lora__init_lora_weights": how, "train__lr_scheduler_type": "constant", "train__logging_steps": 1,
    }  # fmt: skip
    name = f"{how}-{format}"
    whole = train(config(folder, name, **keys), say=lambda line: None)
    half = config(folder, f"half-{name}", **{**keys, "train__max_steps": 2})
    train(half, say=lambda line: None)
    half.train.max_steps = 3
    resumed = train(half, say=lambda line: None)
    assert resumed.metrics[-1]["loss"] == whole.metrics[-1]["loss"]
    own = load_any(whole.output_dir)
    assert own.targets.spec.rank == 4 and read_adapter(whole.result_dir, own.architecture)[0].rank == 8
    figures = export_merged(whole.output_dir, str(folder / f"merged-{name}"), base="dequantized")
    assert figures["relative_logit_difference"] < 1e-4
    merged = np.asarray(load(str(folder / f"merged-{name}"))(IDS))
    assert tiny_models.difference(merged, np.asarray(own(IDS))) < 1e-4


def test_settings_that_exclude_each_other_say_so():
    for keys, words in (
        ({"lora__init_lora_weights": "loftq"}, "set quantize.format"),
        ({"lora__init_lora_weights": "pissa", "lora__use_dora": True}, "set lora.use_dora=False"),
        (
            {"lora__init_lora_weights": "olora", "quantize__format": "nf4", "quantize__calibration": 4},
            "use loftq, or set it to 0",
        ),
    ):
        with pytest.raises(UserError, match=words):
            helpers.make_config(**keys)
    assert configuration.default().lora.init_lora_weights == "true" and jax.device_count()
