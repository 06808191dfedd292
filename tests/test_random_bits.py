"""The hash behind dropout's masks: fair, without patterns between neighbours, and a function of key and place alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.kernels.random_bits import keep_mask, random_bits, uniform
from tpu_tune.tensors.lora import LoraTensor

KEYS = jax.random.split(jax.random.key(3), 64)


@pytest.fixture(scope="module")
def bits() -> np.ndarray:
    """(keys, rows, columns) words: keys as of 64 tokens that follow one another."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(7), jnp.arange(64))
    return np.asarray(random_bits(keys, (4, 4096)))


def test_every_bit_is_fair(bits):
    ones = np.stack([(bits >> bit) & 1 for bit in range(32)]).reshape(32, -1).mean(1)
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / np.sqrt(bits.size)


def test_values_are_uniform(bits):
    """Chi-square over 256 bins of the high and of the low bits: within five standard deviations of its mean."""
    for part in (bits >> 24, bits & 255):
        counts = np.bincount(part.reshape(-1), minlength=256)
        expected = bits.size / 256
        assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["tokens", "rows", "columns"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_neighbours_are_independent(bits, axis, step):
    """No bit of a word goes with any bit of a neighbour's, along any axis."""
    there, beside = (np.take(bits, range(start, bits.shape[axis] - step + start), axis) for start in (0, step))
    signs = [((part.reshape(-1)[:, None] >> np.arange(32, dtype=np.uint32)) & 1) * 2.0 - 1 for part in (there, beside)]
    correlation = np.float32(signs[0]).T @ np.float32(signs[1]) / len(signs[0])
    assert np.abs(correlation).max() < 5.5 / np.sqrt(len(signs[0]))


def test_changing_one_bit_of_key_or_place_changes_half_of_the_bits():
    places = np.asarray(random_bits(jax.random.key(0), (2**14,)))
    for bit in range(13):
        changed = np.unpackbits((places ^ places[np.arange(2**14) ^ (1 << bit)]).view(np.uint8)).mean()
        assert abs(changed - 0.5) < 0.01
    words = np.asarray(random_bits(KEYS, (256,)))
    assert abs(np.unpackbits((words[0] ^ words[1]).view(np.uint8)).mean() - 0.5) < 0.03


def test_an_element_depends_on_its_key_and_its_place_alone():
    whole = random_bits(KEYS, (3, 40))
    assert (whole[5] == random_bits(KEYS[5], (3, 40))).all()
    assert (whole[:, 0] == random_bits(KEYS, (40,))).all()  # the first row's places are the same in any number of rows
    grown = random_bits(KEYS[0], (5, 40))
    assert (whole[0] == grown[:3]).all()


def test_masks_keep_the_share_that_is_asked_and_numbers_have_the_moments_of_a_uniform():
    for share in (0.05, 0.5, 0.9, 1.0):
        kept = np.asarray(keep_mask(KEYS, (4096,), share)).mean()
        assert abs(kept - share) <= 4.5 * np.sqrt(share * (1 - share) / (64 * 4096)) + 1e-8
    numbers = np.asarray(uniform(KEYS, (4096,)), np.float64)
    assert -1 <= numbers.min() and numbers.max() < 1
    assert abs(numbers.mean()) < 4.5 / np.sqrt(3 * numbers.size)
    assert abs(numbers.var() - 1 / 3) < 4.5 * np.sqrt(4 / 45 / numbers.size)


def test_a_dropped_input_is_scaled_and_its_mask_is_the_same_for_derivatives():
    """With A and B the identity, the adapter's output is the dropped input; its derivative is the same mask."""
    one = jnp.eye(64)
    leaf = LoraTensor(jnp.zeros((64, 64)), one, one, jnp.float32(1), jax.random.key(1), dropout=0.25)
    x = jnp.ones((2, 32, 64))
    out, back = jax.vjp(leaf.matmul, x)
    assert set(np.unique(out)) == {0.0, np.float32(4 / 3)}
    assert (back(jnp.ones_like(out))[0] == out).all()
    assert (out[0] != out[1]).any() and (out[:, 0] != out[:, 1]).any()
