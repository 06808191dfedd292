"""The delta rule in chunks is the delta rule token by token, and packing or padding changes neither it nor its taps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import difference

from tpu_tune.kernels.convolution import causal_convolution
from tpu_tune.kernels.delta_rule import delta_rule, delta_rule_reference
from tpu_tune.kernels.layout import documents

HEADS, SHARED, KEY, VALUE, TAPS = 2, 3, 8, 6, 4


def inputs(length: int, rows: int = 2, seed: int = 0) -> tuple[jax.Array, ...]:
    """Queries, keys, values, decays and betas; in the second row keys hardly differ and hardly anything decays."""
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, rows, length, HEADS, KEY))
    k[1:] = k[1:, :1] + 0.1 * k[1:]
    v = random.standard_normal((rows, length, HEADS, SHARED, VALUE))
    decay = -np.exp(random.standard_normal((rows, length, HEADS, SHARED)) * 2)
    decay[1:] *= 1e-4
    beta = random.uniform(0.2, 1, decay.shape)
    return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, decay, beta))


def with_gradients(run):
    """Return (outputs, state, gradients of a sum that weighs all of them)."""

    def loss(given, segments, state):
        out, state = run(*given, segments, state)
        out = jnp.where((segments != 0)[..., None, None, None], out, 0)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state)), (out, state)

    value = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
    return lambda *given: (lambda found: (*found[0][1], *found[1][0], found[1][1]))(value(*given))


CHUNKED, REFERENCE = with_gradients(delta_rule), with_gradients(delta_rule_reference)


def state_of(rows: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, HEADS, SHARED, KEY, VALUE))


def segments_of(length: int) -> jax.Array:
    """Documents of one token, of more than a chunk, on a chunk's border, and padding at either end and between."""
    row = np.ones(length, np.int32)
    row[length // 3] = 2
    row[length // 3 + 1 :] = 3
    row[length // 2 : length // 2 + 2] = 0
    row[-1:] = 0
    other = np.where(np.arange(length) < min(64, length // 2), 7, 4)
    other[:2] = 0
    return jnp.asarray(np.stack([row, other]))


@pytest.mark.parametrize("length", [150, 5])
def test_chunks_give_the_values_and_gradients_of_the_recurrence(length: int) -> None:
    given = (inputs(length), segments_of(length), state_of())
    for found, expected in zip(CHUNKED(*given), REFERENCE(*given), strict=True):
        assert difference(found, expected) < 1e-5


@pytest.mark.parametrize("run", [CHUNKED, REFERENCE])
def test_a_packed_row_gives_what_its_documents_give_alone(run) -> None:
    lengths, state = (100, 1, 49), jnp.zeros_like(state_of())
    given = inputs(150)
    segments = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths), total_repeat_length=150)
    _, _, *packed_gradients, _ = packed = run(given, jnp.broadcast_to(segments, (2, 150)), state)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = tuple(jnp.zeros_like(x).at[:, :length].set(x[:, part]) for x in given)
        out, _, *gradients, _ = run(alone, jnp.broadcast_to(jnp.arange(150) < length, (2, 150)).astype(int), state)
        assert difference(packed[0][:, part], out[:, :length]) < 1e-5
        if part.stop == 150:  # the state of the last document is what the row leaves, and the loss counts it
            for found, expected in zip(packed_gradients, gradients, strict=True):
                assert difference(found[:, part], expected[:, :length]) < 1e-5
        start += length


def test_a_state_goes_on_where_it_was_whatever_the_padding() -> None:
    given, run = inputs(90), jax.jit(delta_rule)
    ones = functools.partial(jnp.ones, dtype=jnp.int32)
    whole, last = run(*given, ones((2, 90)))
    # 70 tokens between padding, then one, then 19 behind padding.
    padded = [jnp.pad(x[:, :70], [(0, 0), (5, 3)] + [(0, 0)] * (x.ndim - 2), constant_values=0.5) for x in given]
    first, state = run(*padded, jnp.pad(ones((2, 70)), ((0, 0), (5, 3))))
    second, state = run(*(x[:, 70:71] for x in given), ones((2, 1)), state)
    padded = [jnp.pad(x[:, 71:], [(0, 0), (4, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=0.5) for x in given]
    third, state = run(*padded, jnp.pad(ones((2, 19)), ((0, 0), (4, 0))), state)
    assert difference(jnp.concatenate([first[:, 5:75], second, third[:, 4:]], axis=1), whole) < 1e-5
    assert difference(state, last) < 1e-5
    _, same = run(*(x[:, :3] for x in given), jnp.zeros((2, 3), int), state)
    assert (same == state).all()


def test_equal_keys_and_no_decay_stay_exact() -> None:
    """A token said again and again: powers of the triangular system would reach 1e18."""
    q, k, v, decay, beta = inputs(64)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    given = (q, k, v, 0 * decay, 1 + 0 * beta)
    segments = jnp.ones((2, 64), jnp.int32)
    assert difference(delta_rule(*given, segments)[0], delta_rule_reference(*given, segments)[0]) < 1e-5


def test_memory_grows_with_the_tokens_not_with_their_square() -> None:
    def temporary_bytes(length: int) -> int:
        given = (*inputs(length), jnp.ones((2, length), jnp.int32))
        loss = lambda *given: jnp.sum(delta_rule(*given)[0])  # noqa: E731
        return (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))
            .lower(*given)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporary_bytes(4096) < 2.2 * temporary_bytes(2048)


def test_convolution_is_torchs_for_each_document_alone() -> None:
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((2, 20, 5)), random.standard_normal((TAPS, 5))
    segments = np.array([[1] * 7 + [2] + [3] * 10 + [0] * 2, [0] * 3 + [5] * 17])
    out, _ = causal_convolution(jnp.float32(x), jnp.float32(weight), jnp.asarray(segments))
    for row, segment in ((0, 1), (0, 2), (0, 3), (1, 5)):
        here = segments[row] == segment
        alone = torch.as_tensor(x[row, here].T[None])
        filters = torch.as_tensor(weight.T[:, None].copy())
        expected = torch.nn.functional.conv1d(alone, filters, padding=TAPS - 1, groups=5)[0, :, : here.sum()].numpy().T
        assert difference(out[row, here], expected) < 1e-5


def test_convolution_goes_on_from_its_taps_whatever_the_padding() -> None:
    x, weight = jax.random.normal(jax.random.key(0), (2, 12, 5)), jax.random.normal(jax.random.key(1), (TAPS, 5))
    ones = functools.partial(jnp.ones, dtype=jnp.int32)
    whole, taps = causal_convolution(x, weight, ones((2, 12)))
    assert (taps == x[:, -3:]).all()
    pieces, before, start = [], None, 0
    for length, left, right in ((2, 4, 1), (1, 0, 0), (1, 0, 2), (0, 1, 0), (8, 3, 0)):
        padded = jnp.pad(x[:, start : start + length], ((0, 0), (left, right), (0, 0)), constant_values=9.0)
        segments = jnp.pad(ones((2, length)), ((0, 0), (left, right)))
        out, before = causal_convolution(padded, weight, segments, before)
        pieces.append(out[:, left : left + length])
        start += length
    assert difference(jnp.concatenate(pieces, axis=1), whole) < 1e-6
    assert (before == taps).all()


def test_padding_belongs_to_the_document_beside_it() -> None:
    segments = jnp.array([[0, 0, 5, 5, 0, 2, 2, 5, 0], [0] * 9])
    assert documents(segments).tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2], [0] * 9]
