"""`matmul`, `embed`, `unembed` over every kind of leaf: values, gradients, and what the backward pass keeps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.tensors import LoraTensor, SavedTensor, Transposed, dense, embed, matmul, quantize_tensor, unembed

IN, OUT, RANK = 64, 12, 3
FORMATS = ["int8", "int4", "nf4", "mxfp4"]


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def leaves(rows=IN, columns=OUT):
    """Return name -> (leaf, the dense float32 weight it stands for)."""
    weight, a, b, other = arrays((rows, columns), (rows, RANK), (RANK, columns), (rows, columns))
    magnitude = jnp.abs(arrays((columns,), seed=1)[0]) + 0.5
    scale = jnp.float32(0.7)
    found = {"array": (weight, weight)}
    bases = {"array": weight} | {format: quantize_tensor(weight, format, 16, True) for format in FORMATS}
    for name, base in bases.items():
        plain = np.asarray(base if name == "array" else base.dequantize())
        merged = plain + 0.7 * np.asarray(a) @ np.asarray(b)
        found[name] = base, plain
        found[f"lora over {name}"] = LoraTensor(base, a, b, scale), merged
        decomposed = merged * np.asarray(magnitude) / np.linalg.norm(merged, axis=0)
        found[f"dora over {name}"] = LoraTensor(base, a, b, scale, magnitude=magnitude), decomposed
    found["saved"] = SavedTensor(weight, other), other
    found["transposed"] = Transposed(weight.T), weight
    found["transposed nf4"] = (
        Transposed(quantize_tensor(weight.T, "nf4", 4)),
        quantize_tensor(weight.T, "nf4", 4).dequantize().T,
    )
    found["lora over transposed"] = LoraTensor(Transposed(weight.T), a, b, scale), weight + 0.7 * a @ b
    return found


LEAVES = leaves()


@pytest.mark.parametrize("name", LEAVES)
def test_matmul_and_its_gradient_equal_the_dense_weights(name):
    leaf, plain = LEAVES[name]
    x, g = arrays((2, 5, IN), (2, 5, OUT), seed=2)
    np.testing.assert_allclose(dense(leaf), plain, atol=1e-5)
    found, pull = jax.vjp(lambda x: matmul(x, leaf), x)
    np.testing.assert_allclose(found, np.asarray(x) @ np.asarray(plain), rtol=1e-5, atol=3e-5)
    np.testing.assert_allclose(pull(g)[0], np.asarray(g) @ np.asarray(plain).T, rtol=1e-5, atol=3e-5)
    assert matmul(x.astype(jnp.bfloat16), leaf).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", [name for name in LEAVES if "transposed" not in name])
def test_embed_takes_rows_of_the_dense_weight(name):
    leaf, plain = LEAVES[name]
    ids = jnp.asarray([[0, 5, 63], [5, 5, 1]])
    np.testing.assert_allclose(embed(ids, leaf, jnp.float32), np.asarray(plain)[np.asarray(ids)], atol=1e-5)


def test_unembed_ignores_adapters_and_trained_copies():
    """A tied head goes on using the frozen embedding, as PEFT's does."""
    (x,) = arrays((2, OUT))
    for name in ("array", *FORMATS):
        base, plain = LEAVES[name]
        expected = np.asarray(x) @ np.asarray(plain).T
        for leaf in (base, LEAVES[f"lora over {name}"][0], SavedTensor(base, jnp.zeros((IN, OUT)))):
            found, pull = jax.vjp(lambda x, leaf=leaf: unembed(x, leaf), x)
            np.testing.assert_allclose(found, expected, atol=1e-4)
            np.testing.assert_allclose(pull(found)[0], expected @ np.asarray(plain), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("base", ["array", *FORMATS])
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_gradients(base, dora):
    """A, B and the magnitude get the gradient of the written-out formula, DoRA's norm being a constant to it."""
    frozen, plain = LEAVES[base]
    a, b, x, g = arrays((IN, RANK), (RANK, OUT), (7, IN), (7, OUT), seed=5)
    magnitude = jnp.ones(OUT) * 1.3

    def ours(a, b, magnitude):
        return jnp.sum(g * matmul(x, LoraTensor(frozen, a, b, jnp.float32(0.7), magnitude=magnitude if dora else None)))

    def formula(a, b, magnitude):
        merged = plain + 0.7 * a @ b
        if dora:
            merged = merged * (magnitude / jax.lax.stop_gradient(jnp.linalg.norm(merged, axis=0)))
        return jnp.sum(g * (x @ merged))

    for found, expected in zip(
        jax.grad(ours, (0, 1, 2))(a, b, magnitude), jax.grad(formula, (0, 1, 2))(a, b, magnitude), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_embedding_adapter_gradients():
    a, b = arrays((IN, RANK), (RANK, OUT), seed=6)
    ids = jnp.asarray([1, 1, 9])
    grad_a, grad_b = jax.grad(
        lambda a, b: jnp.sum(embed(ids, LoraTensor(LEAVES["nf4"][0], a, b, jnp.float32(2.0)), jnp.float32) ** 2), (0, 1)
    )(a, b)
    plain = jnp.asarray(LEAVES["nf4"][1])
    expected = jax.grad(lambda a, b: jnp.sum((plain + 2 * a @ b)[ids] ** 2), (0, 1))(a, b)
    np.testing.assert_allclose(grad_a, expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_b, expected[1], rtol=1e-4, atol=1e-4)


def residual_shapes(function, *args):
    """Return (dtype, shape) of what the forward pass leaves for the backward pass."""
    _, pull = jax.vjp(function, *args)
    return [(leaf.dtype, leaf.shape) for leaf in jax.tree.leaves(pull) if hasattr(leaf, "shape")]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["matmul", "unembed", "lora"])
def test_the_residual_is_the_codes(format, kind):
    base = LEAVES[format][0]
    a, b, x, narrow = arrays((IN, RANK), (RANK, OUT), (5, IN), (5, OUT))
    if kind == "matmul":
        kept = residual_shapes(lambda x: matmul(x, base), x)
    elif kind == "unembed":
        kept = residual_shapes(lambda x: unembed(x, base), narrow)
    else:
        kept = residual_shapes(lambda a, b, x: matmul(x, LoraTensor(base, a, b, jnp.float32(1))), a, b, x)
    floats = [shape for dtype, shape in kept if jnp.issubdtype(dtype, jnp.floating)]
    assert (jnp.uint8, base.codes.shape) in kept
    assert not any(np.prod(shape) >= IN * OUT for shape in floats)
    dequantized = residual_shapes(lambda x: x @ base.dequantize(), x)
    assert (jnp.float32, (IN, OUT)) in dequantized  # the test would notice


def test_the_residual_of_a_scan_over_layers_is_the_codes():
    weight = arrays((4, IN, IN))[0] / 8
    stacked = quantize_tensor(weight, "nf4", 16, True)
    a, b, x = arrays((4, IN, RANK), (4, RANK, IN), (2, IN))

    def loss(a, b):
        def layer(x, scanned):
            base, a, b = scanned
            return jnp.tanh(matmul(x, LoraTensor(base, a, b, jnp.float32(0.1)))), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, (stacked, a, b))[0])

    floats = [shape for dtype, shape in residual_shapes(loss, a, b) if jnp.issubdtype(dtype, jnp.floating)]
    assert floats and not any(np.prod(shape) >= 4 * IN * IN for shape in floats)


def test_dropout_drops_only_the_adapters_input():
    """Kept elements are scaled by 1 / (1 - p); base path and evaluation get none; the same key drops the same."""
    frozen = jnp.zeros((IN, IN))
    leaf = LoraTensor(frozen, jnp.eye(IN), jnp.eye(IN), jnp.float32(1), jax.random.key(0), dropout=0.25)
    x = jnp.ones((200, IN))
    found = np.asarray(matmul(x, leaf))
    assert set(np.unique(found)) == {np.float32(0), np.float32(1 / 0.75)}
    assert np.mean(found == 0) == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(found, matmul(x, leaf))
    assert np.any(found != matmul(x, dataclasses.replace(leaf, key=jax.random.key(1))))
    np.testing.assert_array_equal(matmul(x, dataclasses.replace(leaf, key=None)), x)
    over = dataclasses.replace(leaf, base=jnp.eye(IN))
    np.testing.assert_allclose(matmul(x, over), found + np.asarray(x), atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 3), (3, 64), (24, 16)])  # a narrow result, a narrow input, neither
@pytest.mark.parametrize("product", [matmul, unembed])
def test_the_gradient_of_a_weight_is_summed_in_float32(shape, product):
    """With bfloat16 activations too: the only roundings are those of the operands."""
    rows, columns = shape if product is matmul else shape[::-1]
    w, x, g = arrays(shape, (2, 5, rows), (2, 5, columns), seed=7)
    pattern = "io,bti->bto" if product is matmul else "oi,bti->bto"
    for dtype in (jnp.float32, jnp.bfloat16):
        found, pull = jax.vjp(lambda x, w: product(x, w), x.astype(dtype), w)
        assert found.dtype == dtype
        grad_x, grad_w = pull(g.astype(dtype))
        assert (grad_x.dtype, grad_w.dtype) == (dtype, jnp.float32)
        rounded = [np.asarray(array.astype(dtype).astype(jnp.float32)) for array in (w, x, g)]
        expected, pull = jax.vjp(lambda x, w: jnp.einsum(pattern, w, x), rounded[1], rounded[0])
        expected_x, expected_w = pull(jnp.asarray(rounded[2]))
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(grad_x.astype(jnp.float32), expected_x, rtol=tolerance, atol=10 * tolerance)
        np.testing.assert_allclose(grad_w, expected_w, rtol=1e-5, atol=1e-5)
