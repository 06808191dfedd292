"""Attention and the chunked cross-entropy against torch, and against their own plain references.

Kernels for one kind of device, and rows cut over several, have `test_attention_kernels.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from tpu_tune.errors import UserError
from tpu_tune.kernels.attention import attention, reference, rematerialised
from tpu_tune.kernels.blockwise import blockwise
from tpu_tune.kernels.cross_entropy import IGNORED, chunked_cross_entropy, token_log_probs, token_losses
from tpu_tune.kernels.layout import TokenLayout
from tpu_tune.kernels.splash import gradient_keys, splash
from tpu_tune.models import apply_head as apply_head_of
from tpu_tune.models import architecture
from tpu_tune.tensors import LoraTensor, quantize_tensor

B, T, H, K, D = 2, 22, 4, 2, 8


def queries(heads=H, groups=K):
    random = np.random.default_rng(0)
    shapes = [(B, T, heads, D), (B, T, groups, D), (B, T, groups, D)]
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]


def layout(segments):
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    segments = jnp.asarray(segments)
    return TokenLayout(index, index, segments, segments)


ONE = np.ones((B, T), np.int32)
PACKED = np.array([[1] * 9 + [2] * 13, [1] * 5 + [2] * 10 + [0] * 7], np.int32)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("segments", [ONE, PACKED], ids=["one", "packed"])
def test_reference_equals_torch(groups, window, segments):
    torch = pytest.importorskip("torch")
    q, k, v = queries(groups=groups)
    row, column = np.arange(T)[:, None], np.arange(T)[None]
    mask = (column <= row) & (segments[:, :, None] == segments[:, None, :])
    if window:
        mask &= row - column < window
    heads_first = [torch.from_numpy(np.array(x)).transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=torch.from_numpy(mask)[:, None], enable_gqa=True
    )
    found = reference(q, k, v, layout(segments), window, D**-0.5)
    np.testing.assert_allclose(found, expected.transpose(1, 2).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("window", "block", "cap", "causal", "groups"),
    [
        (None, 8, None, True, 2),
        (6, 4, None, True, 4),
        (1, 8, 1.5, True, 2),
        (6, 32, 1.5, True, 1),
        (None, 8, 1.5, False, 2),
        (6, 8, None, False, 4),
    ],
)
def test_blockwise_equals_reference_with_gradients(window, block, cap, causal, groups):
    where = dataclasses.replace(layout(PACKED), causal=causal)

    def run(implementation, **extra):
        def loss(q, k, v):
            out = implementation(q, k, v, where, window, 0.3, cap=cap, **extra)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*queries(groups=groups))
        return out, grads

    for found, expected in zip(
        jax.tree.leaves(run(blockwise, block=block)), jax.tree.leaves(run(reference)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "window", "cap", "groups"),
    [(200, None, None, 2), (200, 50, None, 4), (300, None, 3.0, 1), (200, 130, 5.0, 2)],
)
def test_splash_equals_reference_with_gradients(length, window, cap, groups):
    """In Pallas' interpreter: two documents and padding, a length that is no multiple of 128; 300 are three blocks."""
    random = np.random.default_rng(0)
    shapes = [(2, length, 4, 64), (2, length, groups, 64), (2, length, groups, 64)]
    inputs = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    segments = jnp.asarray(np.repeat([[1] * 90 + [2] * (length - 120) + [0] * 30], 2, axis=0), jnp.int32)
    index = jnp.broadcast_to(jnp.arange(length), (2, length))
    where = TokenLayout(index, index, segments, segments)
    weights = jnp.asarray(random.standard_normal(shapes[0]), jnp.float32)

    def run(implementation):
        def loss(*inputs):
            out = implementation(*inputs)
            return jnp.sum(out * weights), out

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
        return [out, *grads]

    ours = run(lambda q, k, v: splash(q, k, v, segments, window, 0.125, cap, interpret=True))
    for found, expected in zip(ours, run(lambda q, k, v: reference(q, k, v, where, window, 0.125, cap)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_the_kernel_of_all_gradients_leaves_at_most_four_of_the_queries():
    sizes = {length: gradient_keys(length, 64) for length in (384, 512, 1664, 2048, 4096, 8192, 16384)}
    assert sizes == {384: 128, 512: 512, 1664: 0, 2048: 512, 4096: 1024, 8192: 2048, 16384: 0}
    assert gradient_keys(8192, 256) == 0 and gradient_keys(4096, 256) == 1024  # the chip's own memory


def test_blocks_with_a_bias_equal_reference():
    def bias(query_index, key_index):
        distance = (query_index[:, :, None] - key_index[:, None, :]).astype(jnp.float32)
        return jnp.stack([jnp.cos(distance * (head + 1)) for head in range(H)], axis=1)

    inputs, where = queries(), layout(PACKED)
    expected = reference(*inputs, where, 6, 0.3, 2.0, bias)
    np.testing.assert_allclose(rematerialised(*inputs, where, 6, 0.3, bias, 2.0, 8), expected, atol=1e-5)
    for cap, added in ((None, bias), (2.0, None)):
        assert float(jnp.abs(reference(*inputs, where, 6, 0.3, cap, added) - expected).max()) > 1e-2


def test_a_query_that_sees_nothing_gives_no_nan():
    q, k, v = queries()
    index = jnp.broadcast_to(jnp.arange(T), (B, T))
    where = TokenLayout(index, index, jnp.full((B, T), 7), jnp.ones((B, T), jnp.int32))
    grads = jax.grad(lambda q, k, v: jnp.sum(reference(q, k, v, where, None, 1.0) ** 2), argnums=(0, 1, 2))(q, k, v)
    assert all(bool(jnp.all(jnp.isfinite(grad))) for grad in grads)


def test_unknown_attention_is_named():
    with pytest.raises(UserError, match="model.attention is 'flash'"):
        attention(*queries(), layout(ONE), implementation="flash")


# --- cross-entropy -----------------------------------------------------------------------------------------------

WIDTH, VOCABULARY = 6, 31


apply_head = functools.partial(apply_head_of, architecture(tiny_models.CONFIGS["llama2"]))


def batch(length=13, ignored=0.3):
    random = np.random.default_rng(1)
    hidden = jnp.asarray(random.standard_normal((2, length, WIDTH)), jnp.float32)
    targets = random.integers(0, VOCABULARY, (2, length))
    targets[random.random(targets.shape) < ignored] = IGNORED
    head = jnp.asarray(random.standard_normal((WIDTH, VOCABULARY)), jnp.float32)
    return hidden, jnp.asarray(targets), head


def plain(weights, hidden, targets):
    return jnp.sum(token_losses(apply_head(weights, hidden), targets)[0])


def chunked(chunk):
    return lambda weights, hidden, targets: chunked_cross_entropy(apply_head, weights, hidden, targets, chunk)[0]


def test_token_losses_equal_torch():
    torch = pytest.importorskip("torch")
    hidden, targets, head = batch()
    logits = hidden @ head
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.array(logits)).reshape(-1, VOCABULARY),
        torch.from_numpy(np.array(targets)).reshape(-1).long(),
        ignore_index=IGNORED,
        reduction="none",
    )
    np.testing.assert_allclose(token_losses(logits, targets)[0].reshape(-1), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_chunks_equal_the_plain_loss_and_gradients(chunk):
    """Chunks that do not divide the length too; the factor stands for the division by the tokens of the window."""
    hidden, targets, head = batch()
    weights = {"weight": head, "bias": jnp.arange(VOCABULARY) / 50}
    for frozen in (False, True):
        argnums = (1,) if frozen else (0, 1)
        expected = jax.value_and_grad(lambda *args: 0.37 * plain(*args), argnums)(weights, hidden, targets)
        found = jax.jit(jax.value_and_grad(lambda *args: 0.37 * chunked(chunk)(*args), argnums))(
            weights, hidden, targets
        )
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * float(jnp.max(jnp.abs(other))))


def test_log_probs_of_tokens_equal_the_plain_ones_and_their_gradients():
    """Of any function of them: the gradient of each token is not known when its logits are first there."""
    hidden, targets, head = batch()
    weights = {"weight": head, "bias": jnp.arange(VOCABULARY) / 50}

    def squares(log_probs):
        return jnp.sum(jnp.sum(log_probs, 1) ** 2 / (1 + jnp.arange(len(log_probs))))

    def reference(weights, hidden):
        return squares(-token_losses(apply_head(weights, hidden), targets)[0])

    def ours(weights, hidden):
        return squares(token_log_probs(apply_head, weights, hidden, targets, 5))

    expected = jax.value_and_grad(reference, (0, 1))(weights, hidden)
    found = jax.jit(jax.value_and_grad(ours, (0, 1)))(weights, hidden)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * float(jnp.max(jnp.abs(other))))


def test_chunks_count_right_guesses():
    hidden, targets, head = batch()
    _, right = chunked_cross_entropy(apply_head, {"weight": head}, hidden, targets, 4)
    assert int(right) == int(np.sum((np.argmax(hidden @ head, -1) == targets) & (targets != IGNORED)))


def test_only_a_lora_on_the_head_is_trained():
    hidden, targets, head = batch()
    random = np.random.default_rng(2)
    a, b = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((WIDTH, 2), (2, VOCABULARY)))
    base = quantize_tensor(head, "int8", 2)

    def loss(function):
        return lambda a, b, hidden: function({"weight": LoraTensor(base, a, b, jnp.float32(0.5))}, hidden, targets)

    expected = jax.grad(loss(plain), argnums=(0, 1, 2))(a, b, hidden)
    found = jax.jit(jax.grad(loss(chunked(4)), argnums=(0, 1, 2)))(a, b, hidden)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_rows_without_targets_give_zero():
    hidden, targets, head = batch(ignored=1.1)
    assert bool(jnp.all(targets == IGNORED))
    loss, grads = jax.value_and_grad(chunked(4), argnums=(0, 1))({"weight": head}, hidden, targets)
    assert float(loss) == 0.0
    assert all(bool(jnp.all(grad == 0)) for grad in jax.tree.leaves(grads))


def test_the_full_logits_never_exist():
    hidden, targets, head = batch(length=12)
    for transformed in (chunked(4), jax.grad(chunked(4), argnums=(0, 1))):
        text = str(jax.make_jaxpr(transformed)({"weight": head}, hidden, targets))
        assert f"f32[2,12,{VOCABULARY}]" not in text and f"f32[24,{VOCABULARY}]" not in text
        assert f"f32[2,4,{VOCABULARY}]" in text
