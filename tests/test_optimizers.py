"""Optimizers against torch, transformers and bitsandbytes; 8-bit blocks; clipping; the loss scale."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tpu_tune.checkpoints.run_checkpoints import average_of
from tpu_tune.errors import UserError
from tpu_tune.models import architecture
from tpu_tune.tensors import LeafSpec
from tpu_tune.training import adam8bit, loss_scale
from tpu_tune.training.optimizers import canonical_name, clip_by_global_norm, dotted, make_optimizer, set_learning_rate
from tpu_tune.training.schedules import configured_schedule
from tpu_tune.transforms import LoraConfig, find_targets

STACK = "model.layers.self_attn.q_proj"
SHAPES = {
    "model.embed_tokens": {"weight": (40, 12)},
    STACK: {"a": (3, 12, 4), "b": (3, 4, 12), "bias": (3, 12)},
    "model.layers.input_layernorm": {"weight": (3, 12)},
    "model.norm": {"weight": (12,)},
}


SPECS = {
    "model.embed_tokens.weight": LeafSpec(("vocab", "embed")),
    f"{STACK}.a": LeafSpec(("embed", None), stacked=True),
    f"{STACK}.b": LeafSpec((None, "heads"), stacked=True),
    f"{STACK}.bias": LeafSpec((None,), stacked=True, decay=False),
    "model.layers.input_layernorm.weight": LeafSpec((None,), stacked=True, decay=False),
    "model.norm.weight": LeafSpec((None,), decay=False),
}


def stacked(path):
    return SPECS[path].stacked


def settings(**changes):
    values = dict(optim="adamw", adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-6, weight_decay=0.1)
    values["loraplus_lr_ratio"] = 0.0
    return types.SimpleNamespace(**{**values, **changes})


def random_tree(seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=is_shape)


def flat(tree):
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def run_ours(train, steps, schedule):
    optimizer = make_optimizer(train, schedule, SPECS)
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, random_tree(i + 1))
    return flat(params)


def run_torch(make, steps, schedule, at_end=lambda: None):
    """The same run in torch, where every layer is a parameter of its own, as in a torch model."""
    torch = pytest.importorskip("torch")

    def split(tree):
        return {
            (path, layer): torch.tensor(np.asarray(part))
            for path, leaf in flat(tree).items()
            for layer, part in enumerate(leaf if stacked(path) else [leaf])
        }

    params = {key: torch.nn.Parameter(value) for key, value in split(random_tree(0)).items()}
    names = {True: [], False: []}
    for (path, _), value in params.items():
        names["norm" not in path and "bias" not in path].append(value)
    optimizer = make([{"params": names[True]}, {"params": names[False], "weight_decay": 0.0}])
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(i))
        for key, grad in split(random_tree(i + 1)).items():
            params[key].grad = grad
        optimizer.step()
    at_end()
    result = {}
    for (path, _), value in params.items():
        result.setdefault(path, []).append(value.detach().numpy())
    return {path: np.stack(parts) if stacked(path) else parts[0] for path, parts in result.items()}


def lr(step):
    return 1e-2 * (1 - step / 25)


def test_adamw_equals_torch():
    torch = pytest.importorskip("torch")
    wanted = run_torch(lambda g: torch.optim.AdamW(g, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1), 20, lr)
    assert_close(run_ours(settings(optim="adamw_torch_fused"), 20, lr), wanted, 1e-6)


def test_sgd_equals_torch():
    torch = pytest.importorskip("torch")
    wanted = run_torch(lambda g: torch.optim.SGD(g, lr=1.0, weight_decay=0.1), 20, lr)
    assert_close(run_ours(settings(optim="sgd"), 20, lr), wanted, 1e-6)


def test_adafactor_equals_transformers():
    pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    plain = dict(lr=1.0, scale_parameter=False, relative_step=False, weight_decay=0.1)
    wanted = run_torch(lambda g: Adafactor(g, **plain), 20, lr)
    assert_close(run_ours(settings(optim="adafactor"), 20, lr), wanted, 2e-6)


def test_muon_equals_torch_and_leaves_the_rest_to_adamw(monkeypatch):
    """Torch's Newton-Schulz steps are in bfloat16, whose rounding is its own; here both are in float32."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    adam = dict(betas=(0.9, 0.99), eps=1e-6)

    def make(groups):
        matrices = [value for value in groups[0]["params"] if value.ndim == 2 and len(value) != 40]
        rest = [value for value in groups[0]["params"] if not any(value is matrix for matrix in matrices)]
        muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([{"params": rest, "weight_decay": 0.1}, groups[1]], **adam)

        def step():
            muon.step()
            adamw.step()

        return types.SimpleNamespace(param_groups=[*muon.param_groups, *adamw.param_groups], step=step)

    assert_close(run_ours(settings(optim="muon"), 20, lr), run_torch(make, 20, lr), 1e-5)


def schedule_free_run(train, steps, schedule, devices):
    """Twenty clipped steps over a mesh; return what is trained, and what is used."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), "fsdp")
    homes = jax.tree.map(lambda leaf: NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), "fsdp")), random_tree(0))
    optimizer = make_optimizer(train, schedule, SPECS)
    params = jax.device_put(random_tree(0), homes)
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(clip_by_global_norm(grads, 5.0)[0], state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, jax.device_put(random_tree(i + 1), homes))
    return flat(params), average_of(flat(params), flat(state.z), state.b1)


@pytest.mark.parametrize("reference", ["package", "paper"])
def test_schedule_free_follows_its_package_over_a_mesh(reference):
    """Warm-up, decay and clipping; what is trained (y) and what is used (x), by the package and by the paper."""
    rate, warmup = 1e-2, 6
    train = settings(
        optim="schedule_free_adamw", learning_rate=rate, lr_scheduler_type="constant", lr_scheduler_kwargs={},
        warmup_steps=warmup, warmup_ratio=0.0,
    )  # fmt: skip
    schedule = configured_schedule(train, 20)
    y, x = schedule_free_run(train, 20, schedule, 4)
    if reference == "package":
        torch, package = pytest.importorskip("torch"), pytest.importorskip("schedulefree")
        made = []

        def make(groups):
            options = dict(lr=rate, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, warmup_steps=warmup)
            optimizer = package.AdamWScheduleFree(groups, **options)
            optimizer.train()
            params = [value for group in groups for value in group["params"]]

            def step():
                torch.nn.utils.clip_grad_norm_(params, 5.0)
                optimizer.step()

            made.append(optimizer)
            return types.SimpleNamespace(param_groups=[], step=step)

        assert_close(y, run_torch(make, 20, schedule), 1e-5)
        assert_close(x, run_torch(make, 20, schedule, lambda: made[1].eval()), 1e-5)
        return
    leaves = flat(random_tree(0))
    wanted_x, z = ({path: leaf.astype(np.float64) for path, leaf in leaves.items()} for _ in "xz")
    squares, total = dict.fromkeys(leaves, 0.0), 0.0
    for k in range(20):
        grads = flat(random_tree(k + 1))
        clip = min(1, 5.0 / np.sqrt(sum(np.sum(grad.astype(np.float64) ** 2) for grad in grads.values())))
        lr_now = rate * min(1, (k + 1) / warmup)
        total += lr_now**2
        for path, grad in grads.items():
            at = 0.1 * z[path] + 0.9 * wanted_x[path]
            squares[path] = 0.99 * squares[path] + 0.01 * (clip * grad.astype(np.float64)) ** 2
            move = clip * grad / (np.sqrt(squares[path] / (1 - 0.99 ** (k + 1))) + 1e-6)
            z[path] = z[path] - lr_now * (move + (0.1 * at if SPECS[path].decay else 0))
            wanted_x[path] = (1 - lr_now**2 / total) * wanted_x[path] + lr_now**2 / total * z[path]
    assert_close(x, wanted_x, 1e-5)
    assert_close(y, {path: 0.1 * z[path] + 0.9 * wanted_x[path] for path in z}, 1e-5)


def test_schedule_free_takes_a_rate_from_outside_as_lr_find_sets_it():
    optimizer = make_optimizer(settings(optim="schedule_free_adamw", learning_rate=1.0), None, SPECS)
    params = jax.tree.map(jnp.asarray, random_tree(0))
    state = set_learning_rate(optimizer.init(params), 0.25)
    updates, state = optimizer.update(random_tree(1), state, params)
    assert float(state.max_rate) == 0.25
    moved = flat(updates)[f"{STACK}.bias"]  # Adam's first step is the sign; y = x = z after it
    np.testing.assert_allclose(np.abs(moved), 0.25, rtol=1e-4)


def test_lion_equals_its_formula():
    params = {path: np.asarray(x, np.float64) for path, x in flat(random_tree(0)).items()}
    moments = {path: np.zeros_like(x) for path, x in params.items()}
    for i in range(10):
        for path, grad in flat(random_tree(i + 1)).items():
            move = np.sign(0.9 * moments[path] + 0.1 * grad) + (0.1 * params[path] if SPECS[path].decay else 0)
            params[path] = params[path] - lr(i) * move
            moments[path] = 0.99 * moments[path] + 0.01 * grad
    assert_close(run_ours(settings(optim="paged_lion_32bit"), 10, lr), params, 1e-6)


def assert_close(got, wanted, tolerance):
    assert got.keys() == wanted.keys()
    for path in got:
        allowed = tolerance * np.abs(wanted[path]).max()
        np.testing.assert_allclose(got[path], wanted[path], rtol=0, atol=allowed, err_msg=path)


CONFIGS_OF_DECAY = {
    **dict.fromkeys(
        ("Llama", "Qwen3", "GPTNeoX", "Gemma3", "Phi"),
        dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2),
    ),
    "GPT2": dict(vocab_size=16, n_embd=8, n_layer=1, n_head=2),
    "OPT": dict(
        vocab_size=16, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    ),
    "Qwen3_5": dict(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_hidden_layers=2,
        linear_num_value_heads=16,
    ),
    "T5": dict(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2),
}


@pytest.mark.parametrize("kind", CONFIGS_OF_DECAY)
def test_what_decays_is_what_decays_in_transformers(kind):
    """Norms and biases do not, T5's learned position bias neither; embeddings and heads do."""
    pytest.importorskip("torch")
    import transformers

    sizes = dict(CONFIGS_OF_DECAY[kind])
    sizes |= dict(num_key_value_heads=2, head_dim=4) if kind in ("Llama", "Qwen3", "Gemma3") else {}
    sizes |= dict(rotary_pct=0.5) if kind == "GPTNeoX" else {}
    name = {"Gemma3": "Gemma3Text", "Qwen3_5": "Qwen3_5Text"}.get(kind, kind)
    config = getattr(transformers, f"{name}Config")(**sizes)
    suffix = {"GPT2": "LMHeadModel", "T5": "ForConditionalGeneration"}.get(kind, "ForCausalLM")
    model = getattr(transformers, kind + suffix)(config)
    arch = architecture(config.to_dict())
    ours = {
        module.tensor_name(module_name, path.rsplit(".")[-1])
        for module in arch.modules()
        if not module.tied_to
        for path, spec in module.leaves().items()
        for module_name in module.names()
        if spec.decay
    }
    theirs = set(transformers.Trainer.get_decay_parameter_names(None, model))
    names = {name for name, _ in model.named_parameters()}
    rename = {"lm_head.weight": "embed_out.weight"} if kind == "GPTNeoX" else {}
    assert ours and ours == {rename.get(name, name) for name in theirs & names}


def test_decay_of_adapters_is_their_modules():
    """LoRA's matrices decay, whatever stands beside them."""
    arch = architecture(
        {
            "model_type": "llama",
            "vocab_size": 16,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "attention_bias": True,
        }
    )
    targets = find_targets(arch.modules(), LoraConfig(target_modules=["q_proj"], bias="all", use_dora=True))
    decays = {path.rsplit(".")[-1]: spec.decay for path, spec in targets.leaves(arch.leaves()).items()}
    assert decays == {"lora_A": True, "lora_B": True, "lora_magnitude_vector": True, "bias": False}


def test_optimizer_names():
    assert canonical_name("paged_adamw_32bit") == "adamw"
    assert canonical_name("adamw_bnb_8bit") == canonical_name("paged_adamw_8bit") == "adamw_8bit"
    with pytest.raises(UserError, match="unknown train.optim 'adam_torch'; did you mean 'adamw_torch'"):
        canonical_name("adam_torch")


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0])
def test_clipping_equals_torch(max_norm):
    torch = pytest.importorskip("torch")
    grads = random_tree(3)
    params = {}
    for path, grad in flat(grads).items():
        params[path] = torch.nn.Parameter(torch.zeros(grad.shape))
        params[path].grad = torch.tensor(grad)
    wanted_norm = torch.nn.utils.clip_grad_norm_(params.values(), max_norm if max_norm > 0 else float("inf"))
    clipped, norm = jax.jit(clip_by_global_norm, static_argnums=1)(grads, max_norm)
    np.testing.assert_allclose(norm, wanted_norm.numpy(), rtol=1e-6)
    assert_close(flat(clipped), {path: p.grad.numpy() for path, p in params.items()}, 1e-6)


# 8-bit blocks


def moments_like(kind, shape, seed=0):
    rng = np.random.default_rng(seed)
    draw = rng.normal(size=shape) if kind == "gaussian" else rng.standard_t(2, size=shape)
    return (draw * 1e-3).astype(np.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_map_is_bitsandbytes(signed):
    pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    ours = np.asarray(adam8bit._decode_magnitude(jnp.arange(129 if signed else 256), 1 if signed else 2))
    theirs = functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_allclose(np.sort(ours), theirs[theirs >= 0], rtol=3e-7)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
def test_quantization_error_no_worse_than_bitsandbytes(kind, signed):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    x = moments_like(kind, (64, 512))
    x = x if signed else x**2
    code = functional.create_dynamic_map(signed=signed)
    packed, state = functional.quantize_blockwise(torch.tensor(x), code=code, blocksize=256)
    theirs = functional.dequantize_blockwise(packed, state).numpy()
    ours = np.asarray(adam8bit.dequantize_blocks(adam8bit.quantize_blocks(jnp.asarray(x), signed), signed))
    error = lambda y: np.sqrt(np.mean((y - x) ** 2))  # noqa: E731
    assert error(ours) <= error(theirs) * (1 + 1e-5)
    # Where the two differ, its CPU search took an entry that is not the nearest.
    assert np.all(np.abs(ours - x) <= np.abs(theirs - x) + 1e-6 * np.abs(x))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed):
    """Against a brute-force search, on a grid over all decades and on the map's own entries."""
    entries = np.asarray(adam8bit._decode_magnitude(jnp.arange(129 if signed else 256), 1 if signed else 2), np.float64)
    x = np.concatenate([np.logspace(-8, 0, 3000), entries]).astype(np.float32)
    got = entries[np.asarray(adam8bit._encode_magnitude(jnp.asarray(x), 1 if signed else 2))]
    best = np.abs(entries[None] - x[:, None]).min(1)
    assert np.all(np.abs(got - x) <= best + 1e-7 * x)
    np.testing.assert_array_equal(got[-len(entries) :], entries)


@pytest.mark.parametrize(
    ("shape", "is_stacked", "blocks"),
    [
        ((3, 64, 512), True, (3, 64, 2)),  # rows divide: a block stays in its row
        ((3, 4, 576), True, (3, 4, 3)),  # by 192
        ((3, 576, 8), True, (3, 18)),  # thin: one layer's matrix, flattened
        ((3, 100, 10), True, (3, 4)),  # and padded
        ((100, 10), False, (1, 4)),
    ],
)
def test_blocks_do_not_cross_layers(shape, is_stacked, blocks):
    x = jnp.asarray(moments_like("gaussian", shape))
    moment = adam8bit.quantize_blocks(x, True, is_stacked)
    assert moment.codes.shape == shape and moment.codes.dtype == jnp.uint8 and moment.absmax.shape == blocks
    whole = adam8bit.dequantize_blocks(moment, True, is_stacked)
    np.testing.assert_allclose(whole, x, atol=0.008 * float(jnp.abs(x).max()))
    if is_stacked:
        one = adam8bit.quantize_blocks(x[1], True)
        np.testing.assert_array_equal(moment.codes[1], one.codes)


def test_state_is_two_bytes_a_parameter_and_small_leaves_stay_float32():
    params = {"w": jnp.zeros((4, 64, 512)), "norm": jnp.zeros((4, 512))}
    specs = {"w": LeafSpec(("embed", "mlp"), stacked=True), "norm": LeafSpec((None,), stacked=True, decay=False)}
    state = make_optimizer(settings(optim="adamw_8bit"), lr, specs).init(params)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(state[0].mu["w"]) + jax.tree.leaves(state[0].nu["w"])]
    assert sum(sizes) / params["w"].size == pytest.approx(2 + 8 / 256)
    assert state[0].mu["norm"].dtype == jnp.float32  # 512 elements a layer


def test_adamw_8bit_follows_float32():
    """A two-layer regression whose loss falls a hundredfold: the losses are within 10% at each of 150 steps."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(256, 64)).astype(np.float32)
    targets = np.tanh(inputs @ rng.normal(size=(64, 64)).astype(np.float32) / 8)
    start = {"one": rng.normal(size=(64, 256)) / 8, "two": rng.normal(size=(256, 64)) / 16}
    start = jax.tree.map(lambda x: x.astype(np.float32), start)

    def loss(params):
        return jnp.mean((jnp.tanh(inputs @ params["one"]) @ params["two"] - targets) ** 2)

    def train(optim):
        specs = dict.fromkeys(start, LeafSpec(("embed", "mlp")))
        optimizer = make_optimizer(settings(optim=optim, adam_beta2=0.999, weight_decay=0.01), lambda step: 2e-3, specs)
        state = optimizer.init(start)

        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, length=150)[1])((start, state)))

    full, packed = train("adamw"), train("adamw_8bit")
    assert full[-1] < full[0] / 100
    np.testing.assert_allclose(packed, full, rtol=0.1)


def test_a_second_moment_lost_to_rounding_does_not_explode():
    """One element's gradient is 10^-4 of its block's largest: its second moment rounds to zero, its step must not."""
    optimizer = adam8bit.scale_by_adam_8bit()
    grads = jnp.full((16, 256), 1.0).at[:, 0].set(1e-4)
    state = optimizer.init(grads)
    for grad in (grads, grads * 0):
        step, state = optimizer.update(grad, state)
    assert float(jnp.abs(step).max()) < 10


def test_loss_scale_equals_torch():
    torch = pytest.importorskip("torch")
    finite = [True, True, False, True, True, True, False, False, True]
    scaler = torch.amp.GradScaler("cpu", growth_interval=2)
    state, got, wanted = loss_scale.init(), [], []
    old, loss_scale.GROWTH_INTERVAL = loss_scale.GROWTH_INTERVAL, 2
    try:
        for good in finite:
            weight = torch.nn.Parameter(torch.ones(1))
            optimizer = torch.optim.SGD([weight], lr=0.1)
            scaler.scale(weight.sum() * (1.0 if good else float("inf"))).backward()
            scaler.step(optimizer)
            scaler.update()
            wanted.append(scaler.get_scale())
            state = loss_scale.update(state, jnp.asarray(good))
            got.append(float(state.scale))
    finally:
        loss_scale.GROWTH_INTERVAL = old
    assert got == wanted
