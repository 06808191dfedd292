"""Sparse models: files, the load-balancing loss and gradients against torch; uneven loads, quantization, meshes."""

from __future__ import annotations

import functools
import json

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params
from tpu_tune.errors import UserError
from tpu_tune.inference.inspection import inspect_model
from tpu_tune.models import Execution, architecture
from tpu_tune.models.experts import over_experts, route
from tpu_tune.planning.flops import step_work
from tpu_tune.planning.presets import PRESETS
from tpu_tune.tensors import QuantizedTensor, grouped_matmul
from tpu_tune.training.objectives import CrossEntropy
from tpu_tune.training.optimizers import per_matrix
from tpu_tune.training.prepare_steps import router_aux_loss_coef
from tpu_tune.training.step import ModelLoss
from tpu_tune.transforms import FULL, LoraConfig, QuantizeConfig, experts_words, find_targets, quantized_paths

COEF = 0.5


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory):
    """Function case -> (torch's model, its directory), each written and loaded once."""
    pytest.importorskip("torch")

    @functools.cache
    def of(case):
        config = {**tiny_models.CONFIGS[case], "router_aux_loss_coef": COEF, "output_router_logits": True}
        directory = tiny_models.write(tmp_path_factory.mktemp(case), config)
        return tiny_models.torch_model(directory), directory

    return of


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "granitemoe"])
def test_tensors_stacked_as_in_transformers_memory_are_read_and_written_back(case, in_torch, tmp_path):
    model, directory = in_torch(case)
    state = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    folder = tmp_path / "stacked"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_models.CONFIGS[case]))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for path in (str(folder), directory):
        source = open_huggingface(path)
        arch = architecture(source.config)
        tree, (_, expected) = load_params(source, arch), tiny_models.load(tiny_models.CONFIGS[case])
        for name, leaf in expected.items():
            np.testing.assert_array_equal(tree[name], leaf, err_msg=name)
        write_model(str(tmp_path / "written"), tree, source, arch)
        found, original = (load_file(f"{place}/model.safetensors") for place in (tmp_path / "written", path))
        assert found.keys() == original.keys()
        for name, value in original.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("case", tiny_models.mostly_slow(["mixtral", "qwen2_moe", "granitemoeshared"], ["qwen2_moe"]))
def test_loss_with_load_balancing_and_its_gradients_equal_torch(case, in_torch):
    """Of padded rows; every weight's gradient, the router's and each expert's among them."""
    import torch

    model, directory = in_torch(case)
    arch, params = tiny_models.load(json.loads(open(f"{directory}/config.json").read()))
    assert arch.experts.balance == COEF
    ids = tiny_models.input_ids(case)
    mask = np.ones_like(ids)
    mask[1, 13:] = 0
    labels = np.where(mask > 0, ids, -100)
    result = model(input_ids=torch.as_tensor(ids), attention_mask=torch.as_tensor(mask), labels=torch.as_tensor(labels))
    model.zero_grad()
    result.loss.backward()
    targets = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    batch = {"input_ids": ids, "positions": places, "segment_ids": mask, "targets": targets}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    model_loss = ModelLoss(
        arch, Execution(remat="full", chunk=8), FULL, CrossEntropy(8), router_aux_loss_coef=arch.experts.balance
    )

    @jax.jit
    def ours(params):
        weight = model_loss.objective.weight(batch)

        def mean(params):
            loss, sums = model_loss(params, {}, batch, None)
            return loss / weight, sums

        return jax.value_and_grad(mean, has_aux=True)(params)

    (loss, sums), gradients = ours(params)
    total, weight = sums["router_aux_loss"]
    np.testing.assert_allclose(total / weight, float(result.aux_loss.detach()), rtol=1e-5)
    np.testing.assert_allclose(loss, float(result.loss.detach()), rtol=1e-5)
    theirs = {name: value.grad.numpy() for name, value in model.named_parameters()}
    layer = arch.num_layers - 1
    here = f"model.layers.{layer}."
    names = arch.layer_kinds[layer].names
    block = "mlp" if f"{here}mlp.experts.down_proj" in theirs else "block_sparse_moe"
    router = next(value for name, value in theirs.items() if name.startswith(here) and value.shape[0] == arch.experts.count and value.ndim == 2)  # fmt: skip  # noqa: E501
    pairs = [
        (f"model.layers.{names.router}.weight", router.T),
        (f"model.layers.{names.expert_down}.weight", theirs[f"{here}{block}.experts.down_proj"].swapaxes(1, 2)),
        ("model.embed_tokens.weight", theirs["model.embed_tokens.weight"]),
    ]
    if names.expert_gate:
        gate, up = np.split(theirs[f"{here}{block}.experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
        pairs += [
            (f"model.layers.{names.expert_gate}.weight", gate),
            (f"model.layers.{names.expert_up}.weight", up),
        ]
    for path, expected in pairs:
        found = gradients[path]
        found = found[-1] if path.startswith("model.layers") else found
        assert tiny_models.difference(found, expected) < 1e-4, path


@pytest.mark.parametrize("load", ["all to one", "one with none", "padding"])
def test_no_token_is_dropped_however_uneven_the_load_is(load):
    count, width = 4, 8
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (2, 9, width))
    w = jax.random.normal(keys[1], (count, width, width))
    weights = jax.random.uniform(keys[2], (2, 9, 2))
    chosen = jnp.stack([jnp.zeros((2, 9), jnp.int32), jnp.full((2, 9), 1 if load == "all to one" else 3)], axis=-1)
    if load == "padding":
        chosen = chosen.at[1, 4:].set(count)

    def run(leaves, rows, dispatch):
        return grouped_matmul(rows, leaves, dispatch.sizes)

    found = over_experts(run, w, x, weights, chosen, count, None)
    every = jnp.einsum("btd,edf->btef", x, w, precision="highest")
    taken = jnp.take_along_axis(every, jnp.minimum(chosen, count - 1)[..., None], axis=2)
    real = (chosen < count).astype(jnp.float32)
    np.testing.assert_allclose(found, jnp.sum(taken * (weights * real)[..., None], axis=2), atol=1e-4)
    if load == "padding":
        assert not np.asarray(found[1, 4:]).any()


def test_a_token_chooses_within_its_best_groups_only():
    """Two groups of three, the best two experts of each counted: the best expert of all is in the one left out."""
    arch = architecture(tiny_models.CONFIGS["glm4_moe"])
    weights, chosen = route(arch.experts, jnp.asarray([[2.0, 1.9, 3.0, -9.0, 0.5, 0.6]]), jnp.zeros(6))
    assert chosen[0].tolist() == [0, 1]
    np.testing.assert_allclose(jnp.sum(weights), arch.experts.scale, rtol=1e-6)


def test_all_linear_takes_the_experts_and_leaves_the_routers_out(in_torch):
    arch = architecture(tiny_models.CONFIGS["qwen3_moe"])
    modules = arch.modules()
    targets = find_targets(modules, LoraConfig(target_modules="all-linear"))
    names = {target.module.path.rsplit(".")[-1] for target in targets.adapted}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    paths = [f"model.layers.mlp.experts.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    assert experts_words(modules, targets) == f"5 experts a layer, adapted: {', '.join(paths)}"
    attention = LoraConfig(target_modules=["q_proj"])
    line = experts_words(modules, find_targets(modules, attention))
    assert line == f"5 experts a layer, without an adapter: {', '.join(paths)}"
    assert inspect_model(in_torch("qwen3_moe")[1], attention)["lora"]["experts"] == line
    assert experts_words(architecture(tiny_models.CONFIGS["llama2"]).modules(), targets) == ""
    with pytest.raises(UserError, match="only 2 of the 5 experts of 'model.layers.0.mlp.experts.up_proj' are named"):
        find_targets(modules, LoraConfig(target_modules=r".*experts\.[01]\.up_proj"))
    named = find_targets(modules, LoraConfig(target_modules=["mlp.gate"]))
    assert [target.module.path for target in named.adapted] == ["model.layers.mlp.gate"]


def test_experts_are_quantized_one_by_one_and_the_router_is_not():
    arch, params = tiny_models.load(tiny_models.CONFIGS["qwen3_moe"])
    config = QuantizeConfig(format="nf4", group_size=16)
    paths = quantized_paths(arch.modules(), config)
    assert "model.layers.mlp.gate.weight" not in paths
    tree = load_params(tiny_models.source(tiny_models.CONFIGS["qwen3_moe"]), arch, quantization=config)
    for path in paths:
        leaf = tree[path]
        assert isinstance(leaf, QuantizedTensor)
        assert np.abs(np.asarray(leaf.dense()) - params[path]).max() < 0.2 * np.abs(params[path]).max()
    assert tree["model.layers.mlp.experts.down_proj.weight"].codes.shape[:2] == (2, 5)


def test_statistics_of_experts_are_each_matrix_own():
    """Adafactor factors (in, out) of each expert of each layer by itself."""
    leading = {"experts": 2, "layers": 1}
    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=1)
    optimizer = per_matrix(lambda path: factored, leading.__getitem__)
    weights = {"experts": jnp.zeros((2, 3, 4, 5)), "layers": jnp.zeros((2, 4, 5))}
    grads = {name: jax.random.normal(jax.random.key(1), value.shape) for name, value in weights.items()}
    updates, state = optimizer.update(grads, optimizer.init(weights), weights)
    alone = {name: 0 for name in leading}
    one = per_matrix(lambda path: factored, alone.__getitem__)
    for name, index in (("experts", (1, 2)), ("layers", (1,))):
        part = {name: grads[name][index]}
        expected, _ = one.update(part, one.init(part), {name: weights[name][index]})
        np.testing.assert_allclose(updates[name][index], expected[name], rtol=1e-6)
    assert state["experts"].v_row.shape == (2, 3, 4) and state["experts"].v_col.shape == (2, 3, 5)
    arch = architecture(tiny_models.CONFIGS["mixtral"])
    specs = arch.leaves()
    down = specs["model.layers.block_sparse_moe.experts.w2.weight"]
    assert (down.leading, down.decay) == (2, True) and specs["model.layers.block_sparse_moe.gate.weight"].leading == 1


def test_a_steps_work_counts_the_experts_at_work_only():
    arch = architecture(PRESETS["qwen3-30b-a3b"])
    tokens = 2048
    work = step_work(arch, helpers.make_config(method="full"), 1, tokens, 0, 0)
    attention = 2048 * 4096 * 2 + 2048 * 512 * 2  # of one layer
    parameters = 48 * (attention + 8 * 3 * 2048 * 768 + 2048 * 128) + 2048 * 151936  # "A3B": 3.04 billion
    scores = 3 * 48 * 4 * 4096 * (tokens + 1) / 2
    assert work.model == pytest.approx(tokens * (6 * parameters + scores), rel=1e-6)
    assert "8 of 128 experts" in work.formula


SIZES = {
    "model_type": "qwen3_moe", "hidden_size": 64, "num_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 16,
    "norm_topk_prob": True, "pad_token_id": 0, "output_router_logits": True, "router_aux_loss_coef": 0.01,
}  # fmt: skip
MESHES = {
    "one device": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1},
    "data=2 x fsdp=4": {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1},
    "fsdp=8": {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1},
    "all but data": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Function (mesh, method) -> (model, state, metrics of two steps), each run once."""
    directory = helpers.write_tiny_llama(tmp_path_factory.mktemp("sparse") / "base")  # for its tokenizer
    config = {**helpers.TINY, **SIZES}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tiny_models.weights(config), directory / "model.safetensors", metadata={"format": "pt"})

    @functools.cache
    def run(mesh, method):  # qlora's adapters stand on the experts too
        sizes = MESHES[mesh]
        quantize = {"quantize__format": "nf4", "quantize__group_size": 16, "method": "lora"}
        settings = helpers.make_config(
            model__path=str(directory),
            model__dtype="float32",
            lora__rank=4,
            train__learning_rate=1e-3,
            train__lr_scheduler_type="constant",
            train__per_device_train_batch_size=8 // (sizes["data"] * sizes["fsdp"]),
            train__weight_decay=0.1,
            **{f"mesh__{axis}": size for axis, size in sizes.items()},
            **(quantize if method == "qlora" else {"method": method}),
        )
        model, steps = helpers.prepare(settings, 2, int(np.prod(list(sizes.values()))))
        batches = []
        for seed in range(2):
            first, second = (helpers.documents(24, 3, 8, 8, seed + part) for part in (0, 50))
            batches.append(helpers.window(helpers.rows_of(list(zip(first, second, strict=True)), 16), 1))
        return model, *helpers.run_steps(model, steps, batches)

    return run


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize(
    "mesh", ["data=2 x fsdp=4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("fsdp=8", "all but data"))]
)
def test_losses_on_eight_devices_are_those_of_one(trained, mesh, method):
    _, _, expected = trained("one device", method)
    model, state, metrics = trained(mesh, method)
    for name in ("loss", "router_aux_loss", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in metrics], [row[name] for row in expected], rtol=2e-4)
    sizes = MESHES[mesh]
    shares = sizes["fsdp"] * sizes["tensor"] * sizes["sequence"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        leaf = {**model.frozen, **state.trainable}[f"model.layers.mlp.experts.{name}.weight"]
        leaf = leaf.codes if method == "qlora" else leaf
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // shares}, name


def test_the_load_balancing_loss_is_in_full_tunings_loss_and_not_in_adapters(trained):
    for method, is_in in (("full", True), ("qlora", False)):
        _, _, rows = trained("one device", method)
        assert all(row["router_aux_loss"] >= 1.0 for row in rows)
        model = trained("one device", method)[0]
        assert model.architecture.experts.balance == 0.01
        config = helpers.make_config(method="full" if is_in else "lora")
        assert router_aux_loss_coef(config, model) == (0.01 if is_in else 0.0)
        config.objective.router_aux_loss_coef = 0.3
        assert router_aux_loss_coef(config, model) == 0.3
