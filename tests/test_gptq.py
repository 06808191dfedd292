"""Rounding against second moments (GPTQ) against the paper's algorithm, written column by column in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.tensors import quantize_tensor
from tpu_tune.tensors.formats import NF4_VALUES
from tpu_tune.transforms import QuantizeConfig
from tpu_tune.transforms.gptq import round_against

NUMBERS = {
    "int8": np.arange(-128, 128) / 127,
    "int4": np.arange(-8, 8) / 7,
    "nf4": np.array(NF4_VALUES, np.float64),
}


def reference(weight, moments, format, group):
    """Algorithm 1 of arXiv:2210.17323 without its blocks: W is (out, in), its columns go one by one."""
    numbers, columns = NUMBERS[format], weight.shape[0]
    left = weight.T.astype(np.float64).copy()
    damped = moments.astype(np.float64) + 0.01 * np.mean(np.diag(moments)) * np.eye(columns)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.zeros_like(left)
    for j in range(columns):
        if j % group == 0:
            block = left[:, j : j + group]
            extreme = block[np.arange(len(block)), np.abs(block).argmax(1)]
            scale = extreme / numbers[0] if format == "int4" else np.abs(extreme)
        nearest = np.abs(left[:, j, None] / scale[:, None] - numbers).argmin(1)
        rounded[:, j] = numbers[nearest] * scale
        error = (left[:, j] - rounded[:, j]) / inverse[j, j]
        left[:, j:] -= error[:, None] * inverse[j, None, j:]
    return rounded.T


def problem(rows=96, columns=24, tokens=400):
    random = np.random.default_rng(5)
    inputs = random.standard_normal((tokens, rows)) @ random.standard_normal((rows, rows)) * 0.3
    return random.standard_normal((rows, columns)).astype(np.float32), inputs.astype(np.float32)


@pytest.mark.parametrize(
    ("format", "group"),
    [("nf4", 32), ("int4", 40), *(pytest.param(format, 32, marks=pytest.mark.slow) for format in ("int4", "int8"))],
)
def test_rounding_is_the_papers(format, group):
    weight, inputs = problem()
    moments = inputs.T @ inputs
    config = QuantizeConfig(format, group, double_quant=False)
    found = np.asarray(round_against(jnp.asarray(weight), jnp.asarray(moments), config).dequantize())
    expected = reference(weight, moments, format, group)
    # A weight that lies in the middle of two levels may go either way in float32, and others after it with it.
    same = np.isclose(found, expected, atol=1e-4)
    assert same.mean() > 0.98

    def loss(rounded):
        return np.linalg.norm(inputs @ (rounded - weight))

    assert loss(found) == pytest.approx(loss(expected), rel=0.02)
    plain = np.asarray(quantize_tensor(jnp.asarray(weight), format, group).dequantize())
    assert loss(found) < 0.7 * loss(plain)


def test_what_is_stored_is_what_plain_rounding_stores():
    """The same arrays, so that plans, sharding and kernels need not know; inputs never seen are rounded plainly."""
    weight, inputs = problem()
    config = QuantizeConfig("int4", 32)
    plain = quantize_tensor(jnp.asarray(weight), "int4", 32, double_quant=True)
    found = round_against(jnp.asarray(weight), jnp.asarray(inputs.T @ inputs), config)
    assert jax.tree.map(lambda part: (part.shape, part.dtype), found) == jax.tree.map(
        lambda part: (part.shape, part.dtype), plain
    )
    unseen = round_against(jnp.asarray(weight), jnp.zeros((96, 96)), config)
    np.testing.assert_array_equal(unseen.codes, plain.codes)
    np.testing.assert_array_equal(unseen.scales, plain.scales)
