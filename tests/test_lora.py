"""LoRA as a transform: counts against PEFT and the guide, initial values, padding, dropout keys, the frozen base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from tpu_tune.models import Decoder, architecture
from tpu_tune.tensors import LoraTensor
from tpu_tune.transforms import FULL, LoraConfig, QuantizeConfig, find_targets, lora, quantize

LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
}  # fmt: skip
GUIDE_TARGETS = ["q_proj", "v_proj", "k_proj", "o_proj", "down_proj", "up_proj", "embed_tokens", "lm_head"]


def count(targets):
    return sum(target.num_parameters for target in targets.adapted)


def test_the_guides_counts():
    """4,194,304 of 6,742,609,920 at rank 8 on q and v; 267,190,272 for the guide's list at rank 128."""
    arch = architecture(LLAMA_7B)
    base = sum(int(np.prod(shape)) for shape in arch.leaf_shapes().values())
    small = count(find_targets(arch.modules(), LoraConfig(rank=8, target_modules=["q_proj", "v_proj"])))
    assert (small, small + base) == (4_194_304, 6_742_609_920)
    large = find_targets(arch.modules(), LoraConfig(rank=128, alpha=256, target_modules=GUIDE_TARGETS))
    assert count(large) == 267_190_272
    ends = sum(target.num_parameters for target in large.adapted if not target.layers)
    assert (count(large) - ends, ends) == (257_949_696, 9_240_576)


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("llama2", {"target_modules": "all-linear"}),
        ("llama2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama_biases", {"target_modules": ["q_proj"], "bias": "all"}),
        ("llama_biases", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        (
            "llama2",
            {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2, r"layers.1.mlp.up_proj": 9}},
        ),
        ("llama2", {"target_modules": ["q_proj"], "use_dora": True, "layers_to_transform": [1]}),
        ("neox_parallel", {"target_modules": "all-linear", "bias": "all"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_counts_equal_pefts(case, settings, tmp_path):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from tpu_tune.inference.inspection import inspect_model

    path = tiny_models.write(tmp_path, tiny_models.CONFIGS[case])
    model = peft.get_peft_model(tiny_models.torch_model(path), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    trainable, total = model.get_nb_trainable_parameters()
    told = inspect_model(path, LoraConfig(rank=4, **settings))["lora"]
    assert (told["trainable"], told["all"]) == (trainable, total)


@pytest.fixture(scope="module")
def model():
    return tiny_models.load(tiny_models.CONFIGS["llama2"])


def prepared(model, spec):
    arch, params = model
    targets = find_targets(arch.modules(), spec)
    return targets, *targets.split(params, targets.init(params, jax.random.key(0)))


def test_initial_values_are_pefts(model):
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0; gaussian: N(0, 1/r^2) as in peft; an embedding: A = 0, B ~ N(0, 1)."""
    arch, params = model
    targets = find_targets(arch.modules(), LoraConfig(rank=16, target_modules=["down_proj", "embed_tokens"]))
    adapters = lora.init(targets, params, jax.random.key(0))
    a = np.asarray(adapters["model.layers.mlp.down_proj.lora_A"])
    assert a.shape == (2, 48, 16) and np.abs(a).max() <= 1 / np.sqrt(48)
    assert a.std() == pytest.approx(1 / np.sqrt(48 * 3), rel=0.05)
    assert not np.any(adapters["model.layers.mlp.down_proj.lora_B"])
    assert not np.any(adapters["model.embed_tokens.lora_A"])
    assert np.asarray(adapters["model.embed_tokens.lora_B"]).std() == pytest.approx(1, rel=0.1)
    gaussian = LoraConfig(rank=16, target_modules=["down_proj"], init_lora_weights="gaussian")
    drawn = lora.init(find_targets(arch.modules(), gaussian), params, jax.random.key(0))
    assert np.asarray(drawn["model.layers.mlp.down_proj.lora_A"]).std() == pytest.approx(1 / 16, rel=0.05)


def test_initial_values_do_not_depend_on_what_else_is_targeted(model):
    arch, params = model
    one, two = (
        lora.init(
            find_targets(arch.modules(), LoraConfig(rank=4, target_modules=names, layers_to_transform=layers)),
            params,
            jax.random.key(3),
        )
        for names, layers in ((["q_proj"], [1]), (["k_proj", "q_proj", "lm_head"], []))
    )
    path = "model.layers.self_attn.q_proj.lora_A"
    np.testing.assert_array_equal(one[path][0], two[path][1])
    assert np.any(two[path][0] != two[path][1])


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(model, dora):
    arch, params = model
    targets, trainable, frozen = prepared(
        model, LoraConfig(rank=4, target_modules="all-linear", use_dora=dora, layers_to_transform=[1])
    )
    ids = jnp.asarray(tiny_models.input_ids("fresh", 1, 6), jnp.int32)
    found = Decoder(arch, targets.combine(trainable, frozen))(ids)
    np.testing.assert_allclose(found, Decoder(arch, params)(ids), atol=1e-4)


def test_training_touches_only_the_trainable_tree_and_padding_stays_zero(model):
    """Gradient steps on uneven ranks: padded columns of A and rows of B stay exactly zero, the base is bit-equal."""
    arch, params = model
    spec = LoraConfig(rank=3, target_modules=["q_proj", "up_proj"], rank_pattern={r"layers.1.self_attn.q_proj": 5})
    targets, trainable, frozen = prepared(model, spec)
    before = {path: np.array(leaf) for path, leaf in params.items()}
    ids = jnp.asarray(tiny_models.input_ids("train", 2, 8), jnp.int32)

    @jax.jit
    def step(trainable):
        def loss(trainable):
            return jnp.mean(Decoder(arch, targets.combine(trainable, frozen))(ids) ** 2)

        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, trainable, jax.grad(loss)(trainable))

    moved = step(step(trainable))
    a, b = (np.asarray(moved[f"model.layers.self_attn.q_proj.lora_{side}"]) for side in "AB")
    assert a.shape == (2, 32, 5) and not np.any(a[0, :, 3:]) and not np.any(b[0, 3:])
    assert np.any(b[0, :3]) and np.any(b[1, 3:])
    assert all(np.any(moved[path] != trainable[path]) for path in trainable)
    for path, leaf in before.items():
        np.testing.assert_array_equal(params[path], leaf)
        assert frozen[path] is params[path]  # zero-copy: what the loss sees is the very array


def test_full_training_leaves_nothing_frozen(model):
    _, params = model
    trainable, frozen = FULL.split({path: leaf.astype(jnp.bfloat16) for path, leaf in params.items()}, {})
    assert not frozen and all(leaf.dtype == jnp.float32 for leaf in trainable.values())


def test_dropout_keys_are_one_a_layer_and_leaf(model):
    spec = LoraConfig(rank=2, target_modules=["q_proj", "k_proj", "embed_tokens"], dropout=0.5)
    targets, trainable, frozen = prepared(model, spec)
    tree = targets.combine(trainable, frozen, jax.random.key(5))
    leaves = {path: leaf for path, leaf in tree.items() if isinstance(leaf, LoraTensor)}
    assert leaves.pop("model.embed_tokens.weight").key is None  # peft drops nothing before an embedding
    keys = {path: np.asarray(jax.random.key_data(leaf.key)) for path, leaf in leaves.items()}
    assert len({tuple(key) for one in keys.values() for key in one}) == 4
    one, *trees = prepared(model, LoraConfig(rank=2, target_modules=["k_proj"], dropout=0.5))
    alone = one.combine(*trees, jax.random.key(5))
    path = "model.layers.self_attn.k_proj.weight"
    np.testing.assert_array_equal(jax.random.key_data(alone[path].key), keys[path])
    assert targets.combine(trainable, frozen)[path].key is None


def test_dropout_is_reproducible_and_differs_by_key(model):
    arch, _ = model
    targets, trainable, frozen = prepared(model, LoraConfig(rank=4, target_modules="all-linear", dropout=0.5))
    trainable = {path: leaf + 0.1 for path, leaf in trainable.items()}
    ids = jnp.asarray(tiny_models.input_ids("drop", 1, 6), jnp.int32)
    run = jax.jit(lambda key: Decoder(arch, targets.combine(trainable, frozen, key))(ids))
    one, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)


def test_quantize_takes_what_the_policy_names(model):
    arch, params = model
    tree = quantize(params, arch.modules(), QuantizeConfig("nf4", 16))
    changed = {path for path in params if tree[path] is not params[path]}
    assert changed == {m.weight for m in arch.modules() if m.kind == "linear" and not m.is_head}
    tree = quantize(
        params, arch.modules(), QuantizeConfig("int8", 16, include=["lm_head", "q_proj"], exclude=["q_proj"])
    )
    assert {path for path in params if tree[path] is not params[path]} == {"lm_head.weight"}
