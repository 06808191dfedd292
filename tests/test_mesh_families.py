"""Families on eight devices whose matrices are not all alike: fused q|k|v and gate|up cut by units, T5's two stacks."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax.sharding import NamedSharding, PartitionSpec

from tpu_tune.models import architecture
from tpu_tune.tensors import LeafSpec, QuantizedTensor, quantize_tensor
from tpu_tune.training.prepare_model import abstract_model, prepare_model
from tpu_tune.transforms import LoraConfig, find_targets, sharding

WIDTH, HEADS, GROUPS, INNER = 1024, 8, 4, 1024  # four pack blocks of `in`: every matrix can be cut both ways
TOKENS, ROWS, STEPS = 40, 8, 2  # no size of a weight holds 40
_LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "num_hidden_layers": 1,
}  # fmt: skip
CONFIGS = {
    "phi3": tiny_models._phi("phi3", rms_norm_eps=1e-5, **_LLAMA),
    "gpt2": tiny_models._gpt("gpt2", n_embd=WIDTH, n_head=HEADS, n_layer=1, n_inner=INNER),
    "t5": tiny_models._t5(d_model=256, d_kv=32, num_heads=8, d_ff=512, num_layers=1, feed_forward_proj="gated-gelu"),
    "olmo2": tiny_models._like_llama("olmo2", **_LLAMA),  # norms over all heads of q and k, which lie apart
    "qwen3_5": tiny_models._qwen3_5(
        "qwen3_5_text",
        **{**_LLAMA, "num_hidden_layers": 2, "head_dim": WIDTH // HEADS},
        full_attention_interval=2,
        linear_num_key_heads=GROUPS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=32,
        linear_value_head_dim=WIDTH // HEADS,
    ),
    # The same mathematics with q, k and v (and gate and up) apart.
    "phi3 apart": tiny_models._llama(**_LLAMA),
    "gpt2 apart": tiny_models._opt(
        hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=INNER, num_attention_heads=HEADS, num_hidden_layers=1
    ),
}
MESHES = {  # fsdp, tensor, sequence
    "one device": (1, 1, 1), "fsdp=2 x tensor=4": (2, 4, 1), "fsdp=4 x tensor=2": (4, 2, 1), "all three": (2, 2, 2),
}  # fmt: skip
EIGHT = ["fsdp=2 x tensor=4", "fsdp=4 x tensor=2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function (case, mesh, method) -> (model, steps), each made once."""
    made: dict[tuple[str, ...], Any] = {}
    folders = {case: tmp_path_factory.mktemp("model") / "base" for case in CONFIGS}

    def prepare(case: str, mesh: str, method: str) -> Any:
        if not folders[case].exists():
            tiny_models.write(folders[case], CONFIGS[case])
        if (case, mesh, method) not in made:
            fsdp, tensor, sequence = MESHES[mesh]
            quantized = {"quantize__format": "nf4", "quantize__group_size": 16} if method == "qlora" else {}
            config = helpers.make_config(
                model__path=str(folders[case]),
                model__dtype="float32",
                method="full" if method == "full" else "lora",
                model__remat="full" if case == "t5" else "none",
                lora__rank=4,
                lora__init_lora_weights="gaussian",
                train__learning_rate=1e-2 if quantized else 1e-4,
                train__lr_scheduler_type="constant",
                train__per_device_train_batch_size=ROWS // fsdp,
                mesh__data=1,
                mesh__fsdp=fsdp,
                mesh__tensor=tensor,
                mesh__sequence=sequence,
                **quantized,
            )
            made[case, mesh, method] = helpers.prepare(config, STEPS, fsdp * tensor * sequence)
        return made[case, mesh, method]

    return prepare


def batches(case: str) -> list[dict[str, np.ndarray]]:
    found = []
    for seed in range(STEPS):
        rows = helpers.rows_of([[one] for one in helpers.documents(24, 3, TOKENS, ROWS, seed)], TOKENS)
        if case == "t5":
            inputs = helpers.rows_of([[one] for one in helpers.documents(24, 3, 16, ROWS, 50 + seed)], 16)
            rows |= {"encoder_ids": inputs["input_ids"], "encoder_segment_ids": inputs["segment_ids"]}
        found.append(helpers.window(rows, 1))
    return found


@pytest.mark.parametrize(
    ("case", "mesh", "method"),
    [
        *(
            (case, mesh, method)
            for case, mesh in zip(("phi3", "gpt2"), EIGHT, strict=True)
            for method in ("full", "qlora")
        ),
        *(
            pytest.param(case, mesh, method, marks=pytest.mark.slow)
            for case, mesh in zip(("gpt2", "phi3"), EIGHT, strict=True)
            for method in ("full", "qlora")
        ),
        ("olmo2", EIGHT[1], "full"),
        *(pytest.param("qwen3_5", EIGHT[0], method, marks=pytest.mark.slow) for method in ("full", "qlora")),
        ("t5", EIGHT[1], "full"),
        ("t5", EIGHT[1], "qlora"),
        ("t5", "all three", "qlora"),
    ],
)
def test_losses_are_those_of_one_device_and_storage_is_shared(prepared, case, mesh, method):
    losses = {}
    for where in ("one device", mesh):
        model, steps = prepared(case, where, method)
        # The state is given away by each step; another test may want the first one.
        state = jax.tree.map(jnp.copy, steps.initial_state)
        _, metrics = helpers.run_steps(model, steps, batches(case), state)
        losses[where] = [row["loss"] for row in metrics]
    np.testing.assert_allclose(losses[mesh], losses["one device"], rtol=1e-4)
    assert abs(losses[mesh][1] - losses[mesh][0]) > 1e-3
    linear = {module.weight for module in model.architecture.modules() if module.kind == "linear" and module.layers}
    linear -= {module.weight for module in model.architecture.modules() if module.is_delicate}
    assert len(linear) == {"phi3": 4, "gpt2": 4, "olmo2": 7, "qwen3_5": 10, "t5": 7 + 11}[case]
    for path in linear:
        leaf = (model.frozen if method == "qlora" else model.trainable)[path]
        assert isinstance(leaf, QuantizedTensor) == (method == "qlora")
        for part in [leaf.codes, leaf.scales] if method == "qlora" else [leaf]:
            assert {shard.data.size for shard in part.addressable_shards} == {part.size // 8}, path


def whole_units(case: str, name: str, place: int, tensor: int) -> np.ndarray:
    """Return (in, out / tensor): the columns of the fused matrix that belong on one place of the tensor axis.

    Written from the file's q|k|v and gate|up alone: so many whole heads, or the same columns of gate and up.
    """
    file = {
        "c_attn": "transformer.h.0.attn.c_attn",
        "qkv_proj": "model.layers.0.self_attn.qkv_proj",
        "gate_up_proj": "model.layers.0.mlp.gate_up_proj",
    }[name]
    weight = tiny_models.weights(CONFIGS[case])[f"{file}.weight"]
    weight = weight if case == "gpt2" else weight.T
    if name == "gate_up_proj":
        gate, up = (
            half[:, place * INNER // tensor : (place + 1) * INNER // tensor] for half in np.split(weight, 2, axis=1)
        )
        return np.stack([part.reshape(WIDTH, -1, INNER // 64) for part in (gate, up)], axis=2).reshape(WIDTH, -1)
    size, groups = WIDTH // HEADS, HEADS if case == "gpt2" else GROUPS
    q, k, v = np.split(weight, [WIDTH, WIDTH + groups * size], axis=1)
    heads = []
    for group in range(place * groups // tensor, (place + 1) * groups // tensor):
        shared = HEADS // groups
        heads += [q[:, group * shared * size : (group + 1) * shared * size]]
        heads += [part[:, group * size : (group + 1) * size] for part in (k, v)]
    return np.concatenate(heads, axis=1)


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("mesh", EIGHT)
@pytest.mark.parametrize(("case", "name"), [("gpt2", "c_attn"), ("phi3", "qkv_proj"), ("phi3", "gate_up_proj")])
def test_a_tensor_shard_of_a_fused_matrix_is_whole_units(prepared, case, name, mesh, method):
    model, _ = prepared(case, mesh, method)
    fsdp, tensor, _ = MESHES[mesh]
    tree = model.frozen if method == "qlora" else model.trainable
    (path,) = [path for path in tree if path.endswith(f"{name}.weight")]
    places = {device: where for where, device in np.ndenumerate(model.mesh.devices)}
    leaf = tree[path].codes if method == "qlora" else tree[path]
    rows = WIDTH // fsdp
    for shard in leaf.addressable_shards:
        _, storage, place, _ = places[shard.device]
        expected = whole_units(case, name, place, tensor)[storage * rows : (storage + 1) * rows]
        if method == "qlora":
            expected = np.asarray(quantize_tensor(expected, "nf4", 16).codes)
        np.testing.assert_array_equal(np.asarray(shard.data)[0], expected)
    if method == "qlora":  # the adapter's B is cut where the matrix is
        assert model.trainable[path.replace("weight", "lora_B")].sharding.spec == PartitionSpec(None, None, "tensor")


def collectives(text: str) -> collections.Counter:
    """Count (operation, dtype, shape) of an optimized program's collectives over activations: what holds tokens."""
    found: collections.Counter = collections.Counter()
    kinds = "all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter"
    for result, kind in re.findall(rf"= (\(?[^=]*?) ({kinds})(?:-start)?\(", text):
        for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", result):
            if str(TOKENS) in shape.split(","):
                found[kind, dtype, shape] += 1
    return found


@pytest.mark.parametrize(("mesh", "method"), [*zip(EIGHT, ["full", "qlora"], strict=True)])
@pytest.mark.parametrize("case", ["phi3", "gpt2"])
def test_splitting_the_fused_product_moves_no_activation(prepared, case, mesh, method):
    """The training step moves no tokens about that the same model with q, k and v apart does not move too."""
    found = {}
    for name in (case, f"{case} apart"):
        model, steps = prepared(name, mesh, method)
        batch = steps.put_batch(batches(name)[0], 1)
        found[name] = collectives(steps.train.lower(steps.initial_state, model.frozen, batch).compile().as_text())
        assert found[name]["all-reduce", "f32", f"{ROWS // MESHES[mesh][0]},{TOKENS},{WIDTH}"] >= 2  # after o and down
    extra = found[case] - found[f"{case} apart"]
    # OPT's gradient of q, k and v may be summed once where GPT-2's is summed otherwise: that moves nothing about.
    assert not [key for key in extra if case == "phi3" or key[0] != "all-reduce"], extra


def test_a_cut_across_segments_would_move_activations():
    """What the test above would show if q|k|v were cut as they lie in the file."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1})
    home = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    product = jax.ShapeDtypeStruct((ROWS, TOKENS, 3 * WIDTH), jnp.float32, sharding=home)
    for as_file in (True, False):

        @jax.jit
        def scores(fused, as_file=as_file):
            if as_file:
                parts = fused.reshape(ROWS, TOKENS, 3, HEADS, -1)
                q, k = parts[:, :, 0], parts[:, :, 1]
            else:
                parts = fused.reshape(ROWS, TOKENS, HEADS, 3, -1)
                q, k = parts[:, :, :, 0], parts[:, :, :, 1]
            made = jnp.einsum("bthd,bshd->bhts", q, k)
            return jax.lax.with_sharding_constraint(made, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))

        assert bool(collectives(scores.lower(product).compile().as_text())) == as_file


def test_a_cut_that_would_divide_a_unit_is_not_made():
    arch = architecture({**CONFIGS["phi3"], "num_key_value_heads": 2})  # two units of q, k, v
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1})
    path = "model.layers.self_attn.qkv_proj"
    targets = find_targets(arch.modules(), LoraConfig(target_modules=["qkv_proj"]))
    specs = arch.leaves() | targets.leaves(arch.leaves())
    for part, shape in (("weight", (1, WIDTH, WIDTH * 3 // 2)), ("lora_B", (1, 6, WIDTH * 3 // 2))):
        leaf, spec = jax.ShapeDtypeStruct(shape, jnp.float32), specs[f"{path}.{part}"]
        for unit, cut in ((spec.unit, False), (1, True)):
            found = sharding.leaf_sharding(f"{path}.{part}", leaf, dataclasses.replace(spec, unit=unit), mesh)
            assert (found.spec[-1] == "tensor") == cut


def test_storage_axes_lie_inside_the_tensor_axis():
    """`in` is one pack block, so that fsdp moves to `out`: gathering over it must leave tensor's own columns there."""
    mesh = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 4, "sequence": 1})
    leaf = jax.eval_shape(lambda: quantize_tensor(jnp.zeros((64, 128)), "nf4", 16))
    stacked = dataclasses.replace(leaf, codes=jax.ShapeDtypeStruct((1, 32, 128), jnp.uint8))
    found = sharding.leaf_sharding("q_proj.weight", stacked, LeafSpec(("embed", "heads"), stacked=True), mesh)
    assert found.codes.spec == PartitionSpec(None, None, ("tensor", "fsdp"))
    codes = np.arange(128)
    stored = found.codes.devices_indices_map((1, 32, 128))
    wanted = sharding.gathered(found).codes.devices_indices_map((32, 128))
    for device, index in stored.items():
        assert set(codes[index[-1]]) <= set(codes[wanted[device][-1]])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_trained_is_cut_between_units_too(tmp_path, method):
    """Two units of q, k and v on four places: neither the trained matrix nor an adapter's B is cut across one."""
    model_config = {**CONFIGS["phi3"], "hidden_size": 64, "num_key_value_heads": 2}
    config = helpers.make_config(
        model__path=tiny_models.write(tmp_path / "model", model_config),
        model__dtype="float32",
        method=method,
        lora__rank=3,
        mesh__data=1,
        mesh__fsdp=2,
        mesh__tensor=4,
    )
    mesh, path = sharding.make_mesh(config.mesh), "model.layers.self_attn.qkv_proj"
    leaf = f"{path}.weight" if method == "full" else f"{path}.lora_B"
    for model in (prepare_model(config, mesh), abstract_model(config, model_config, mesh)):
        assert "tensor" not in (model.trainable[leaf].sharding.spec[-1] or ())
        assert method == "lora" or model.trainable[leaf].sharding == model.shardings[leaf]
