"""Products of rows sorted by expert, against the formula: values, gradients, uneven loads, every kind of leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.kernels.grouped_matmul import _ragged_matmul, _ragged_outer, reference
from tpu_tune.kernels.quantized_matmul import MatmulPlan
from tpu_tune.tensors import grouped_matmul, quantize_tensor

ROWS, GROUPS, INNER, OUTER = 300, 5, 16, 24
LOADS = {
    "uneven": [3, 0, 140, 1, 100],  # rows behind the last group are padding; a group spans several pieces
    "all to one": [0, 0, 0, ROWS, 0],
    "none": [0] * GROUPS,
    "full": [60] * GROUPS,
}


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((ROWS, INNER), (GROUPS, INNER, OUTER), (ROWS, OUTER))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@jax.jit
def product_and_gradients(x, w, sizes, g):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    return y, *pull(g)


@jax.jit
def expected(x, w, sizes, g):
    y, pull = jax.vjp(lambda x, w: reference(x, w, sizes), x, w)
    return y, *pull(g)


@pytest.mark.parametrize("load", LOADS)
def test_values_and_gradients_are_the_formulas(operands, load):
    x, w, g = operands
    sizes = jnp.asarray(LOADS[load], jnp.int32)
    with jax.default_matmul_precision("highest"):
        for one, other in zip(product_and_gradients(x, w, sizes, g), expected(x, w, sizes, g), strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("shape", [(INNER, OUTER), (OUTER, INNER)], ids=["narrow", "wide"])
def test_a_tpus_way_gives_the_same(operands, shape):
    x, w, g = operands
    if shape[0] > shape[1]:
        x, w, g = g, jnp.swapaxes(w, 1, 2), x
    sizes = jnp.asarray(LOADS["uneven"], jnp.int32)
    with jax.default_matmul_precision("highest"):
        y, x_gradient, w_gradient = expected(x, w, sizes, g)
        np.testing.assert_allclose(_ragged_matmul(x, w, sizes, axis=0), y, atol=2e-4)
        np.testing.assert_allclose(_ragged_matmul(g, w, sizes, axis=1), x_gradient, atol=2e-4)
        np.testing.assert_allclose(_ragged_outer(x, g, sizes), w_gradient, atol=2e-4)


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_a_quantized_stack_multiplies_as_its_dequantized_matrices(operands, format):
    x, w, g = operands
    sizes = jnp.asarray(LOADS["uneven"], jnp.int32)
    stored = quantize_tensor(w[None], format, 8, double_quant=format == "nf4")
    leaves = {
        "layer": jax.tree.map(lambda part: part[0], stored),
        "view of a stack": stored.layer_view(jnp.int32(0), MatmulPlan("pieces")),
    }

    @jax.jit
    def both(leaf):
        y, pull = jax.vjp(lambda x: grouped_matmul(x, leaf, sizes), x)
        return y, *pull(g)

    want = expected(x, stored.dequantize()[0], sizes, g)
    for leaf in leaves.values():
        for one, other in zip(both(leaf), want, strict=False):
            np.testing.assert_allclose(one, other, atol=2e-4)


def test_what_the_backward_pass_keeps_of_a_quantized_stack_is_its_codes(operands):
    x, w, _ = operands
    stored = quantize_tensor(w, "nf4", 8)
    sizes = jnp.asarray(LOADS["uneven"], jnp.int32)
    kept = jax.eval_shape(lambda x: jax.vjp(lambda x: grouped_matmul(x, stored, sizes), x)[1], x)
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
    assert largest < w.size  # bytes: less than one a weight
