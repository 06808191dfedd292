"""Chunks of tokens change neither results nor gradients: in any family, with dropout, over a mesh."""

from __future__ import annotations

import functools
import pathlib

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from tpu_tune.kernels.chunks import over_tokens, piece
from tpu_tune.models import Execution
from tpu_tune.tensors import LoraTensor, matmul
from tpu_tune.training.execution import loss_chunk, token_chunk
from tpu_tune.training.objectives import CrossEntropy
from tpu_tune.training.step import ModelLoss
from tpu_tune.transforms import LoraConfig, find_targets

# One of each way that a layer can be: norms before and behind, parallel, fused, of kinds, with an encoder.
CASES = ["llama3", "neox_parallel", "opt_350m", "gemma3", "phi3", "gptj", "t5"]


def test_a_chunk_divides_the_tokens_where_that_costs_little():
    assert piece(41984, 4096) == 2624 and piece(8192, 4096) == 4096 and piece(24, 5) == 4
    assert piece(97, 10) == 10  # a prime: the last chunk is padded


@pytest.mark.parametrize(("length", "chunk", "shards"), [(24, 5, 1), (23, 4, 1), (24, 4, 2)])
def test_over_tokens_equals_the_function_of_all_tokens(length: int, chunk: int, shards: int) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    weights = {
        "adapted": LoraTensor(
            jax.random.normal(keys[0], (6, 8)),
            jax.random.normal(keys[1], (6, 3)),
            jax.random.normal(keys[2], (3, 8)),
            jnp.float32(0.5),
            jax.random.key(7),
            dropout=0.3,
        ),
        "trained": jax.random.normal(keys[3], (8, 6)),
    }
    x, y = jax.random.normal(keys[4], (2, 2, length, 6))

    def function(weights, tokens):
        x, y = tokens
        assert x.shape[1] <= chunk * shards
        inner = jnp.tanh(matmul(x, weights["adapted"]))
        return {"out": y * matmul(inner, weights["trained"]), "inner": inner}

    def loss(run, a, trained, tokens):
        adapted = dict(weights, trained=trained)
        adapted["adapted"] = LoraTensor(
            weights["adapted"].base,
            a,
            *(getattr(weights["adapted"], name) for name in ("b", "scale", "key")),
            dropout=0.3,
        )
        found = run(adapted, tokens)
        return jnp.sum(jnp.sin(found["out"])) + jnp.sum(found["inner"] ** 2), found

    def whole(weights, tokens):
        x, y = tokens
        inner = jnp.tanh(matmul(x, weights["adapted"]))
        return {"out": y * matmul(inner, weights["trained"]), "inner": inner}

    chunked = functools.partial(over_tokens, function, chunk=chunk, shards=shards)
    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1, 2), has_aux=True))(
            weights["adapted"].a, weights["trained"], (x, y)
        )
        for run in (chunked, whole)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_trained_weights_in_16_bits_gather_their_gradient_in_float32():
    weight = jnp.ones((4, 4), jnp.bfloat16)
    tokens = jnp.ones((1, 4096, 4), jnp.float32)

    def total(weight):
        return jnp.sum(over_tokens(lambda w, x: x @ w.astype(jnp.float32), weight, tokens, 1))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(weight).astype(jnp.float32), 4096)  # bfloat16 stops at 256


@pytest.mark.parametrize("case", tiny_models.mostly_slow([*CASES, "qwen3_next"], ("llama3", "gemma3", "t5")))
def test_every_family_gives_the_same_loss_and_gradients_in_chunks(case: str) -> None:
    arch, params = tiny_models.load(tiny_models.CONFIGS[case])
    dropout = 0.25 if case == "llama3" else 0.0  # it compiles slowly, and lies in what all families share
    targets = find_targets(arch.modules(), LoraConfig(rank=4, target_modules="all-linear", dropout=dropout))
    trainable, frozen = targets.split(params, targets.init(params, jax.random.key(0)))
    generator = np.random.default_rng(0)
    trainable = {
        path: jnp.asarray(0.1 * generator.normal(size=leaf.shape), jnp.float32) for path, leaf in trainable.items()
    }
    ids = tiny_models.input_ids(case)
    batch = {
        "input_ids": ids,
        "targets": np.roll(ids, -1, axis=1),
        "segment_ids": np.ones_like(ids),
        "positions": np.broadcast_to(np.arange(ids.shape[1]), ids.shape),
    }
    if arch.encoder:
        batch |= dict(zip(("encoder_ids", "encoder_segment_ids"), tiny_models.encoder_input(case), strict=True))
    batch = {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}

    def run(chunk: int):
        model_loss = ModelLoss(arch, Execution(remat="full", chunk=chunk), targets, CrossEntropy(7))

        def mean(trainable):
            return model_loss(trainable, frozen, batch, jax.random.key(3))[0] / ids.size

        return jax.jit(jax.value_and_grad(mean))(trainable)

    (loss, grads), (expected, expected_grads) = run(3), run(0)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in expected_grads.values())
    for path, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[path], rtol=0, atol=1e-6 * max(largest, 1.0), err_msg=path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))


def test_chunks_over_a_mesh_that_cuts_rows_and_weights(tiny: pathlib.Path) -> None:
    found = []
    for chunk in (6, 64):
        config = helpers.make_config(
            model__path=str(tiny),
            model__dtype="float32",
            lora__rank=4,
            lora__dropout=0.2,
            mesh__fsdp=2,
            lora__target_modules=["q_proj", "down_proj"],
            mesh__sequence=2,
            train__learning_rate=1e-2,
            model__token_chunk_size=chunk,
            data__max_length=24,
            train__per_device_train_batch_size=1,
        )
        model, steps = helpers.prepare(config, 2, 4)
        rows = helpers.rows_of([[one] for one in helpers.documents(24, 3, 24, 2, 0)], 24)
        batch = helpers.window(rows, 1)
        found.append(helpers.run_steps(model, steps, [batch, batch])[1])
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in found[0]] == pytest.approx([row[name] for row in found[1]], rel=1e-5)


def test_the_inner_states_of_all_tokens_never_exist(tiny: pathlib.Path) -> None:
    """88 tokens: no array of the program is (88, intermediate) unless all are taken at one time."""
    seen = []
    for chunk in (22, 88):
        config = helpers.make_config(
            model__path=str(tiny),
            lora__rank=4,
            lora__target_modules=["gate_proj", "down_proj"],
            data__max_length=88,
            mesh__fsdp=1,
            model__token_chunk_size=chunk,
            train__per_device_train_batch_size=1,
        )
        model, steps = helpers.prepare(config, 1)
        rows = helpers.rows_of([[one] for one in helpers.documents(88, 80, 88, 1, 0)], 88)
        batch = steps.put_batch(helpers.window(rows, 1), 1)
        text = steps.train.lower(steps.initial_state, model.frozen, batch).compile().as_text()
        seen.append(f"88,{model.architecture.intermediate_size}]" in text)
    assert seen == [False, True]


def test_chunks_by_default() -> None:
    config = helpers.make_config(data__max_length=8192)
    assert token_chunk(config, 1, 1) == 0 and token_chunk(config, 2, 2) == 0
    assert token_chunk(config, 2, 1) == 2048 and token_chunk(config, 4, 1) == 1024
    assert token_chunk(config, 2, 1, 8192) == 0 and token_chunk(config, 4, 1, 8192) == 2048
    assert loss_chunk(config, 32000, 1) == 1024 and loss_chunk(config, 128256, 1) == 512
    assert loss_chunk(config, 262144, 1) == 256 and loss_chunk(config, 262144, 8) == 32
    config.train.loss_chunk_size = config.model.token_chunk_size = 100
    assert loss_chunk(config, 262144, 2) == 50 and token_chunk(config, 2, 1) == 50
    config.model.token_chunk_size, config.model.remat = 0, "dots"
    assert token_chunk(config, 2, 1) == 0
