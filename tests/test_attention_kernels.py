"""The devices' attention kernels in Pallas' interpreter, rows cut over devices, and which implementation runs where."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.errors import UserError
from tpu_tune.kernels import attention as choosing
from tpu_tune.kernels import gpu
from tpu_tune.kernels.attention import attention, chosen, for_device, reference
from tpu_tune.kernels.blockwise import blockwise
from tpu_tune.kernels.layout import TokenLayout
from tpu_tune.kernels.sequence import ring
from tpu_tune.kernels.splash import fits, splash
from tpu_tune.kernels.strips import strips
from tpu_tune.models.scan import REMAT_POLICIES
from tpu_tune.transforms.sharding import make_mesh

SCALE = 0.3


@functools.cache
def inputs(length: int, heads: int, groups: int, size: int, rows: int = 2) -> tuple[list[jax.Array], jax.Array]:
    """Return [q, k, v], and weights for the results that make a scalar of them."""
    random = np.random.default_rng(0)
    shapes = [(rows, length, heads, size), *[(rows, length, groups, size)] * 2, (rows, length, heads, size)]
    *states, weights = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    return states, weights


def layout(length: int, ends: tuple[int, ...] = (), rows: int = 2, **facts: Any) -> TokenLayout:
    """Return rows whose documents end there, the second row's one token later; behind the last is padding."""
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        first = 0
        for number, end in enumerate(ends, start=1):
            segments[row, first : end + row] = number
            first = end + row
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    return TokenLayout(index, index, jnp.asarray(segments), jnp.asarray(segments), **facts)


def results(function: Any, states: list[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """Return a function's result, and the gradients of its weighted sum."""

    def loss(*states: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*states)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*states)
    return [out, *grads]


def assert_near(found: list[jax.Array], expected: list[jax.Array]) -> None:
    """Hold each to 1e-5 of its largest value; a gradient of zero (a window of one) to 1e-5 of the largest of all."""
    sizes = [float(jnp.abs(other).max()) for other in expected]
    for one, other, size in zip(found, expected, sizes, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * (size or max(sizes)), rtol=0)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "size", "hopper"),
    [(200, 4, 2, 64, False), (128, 2, 2, 16, False), (140, 3, 1, 48, False), (200, 2, 1, 128, True)],
)
def test_pallas_equals_reference_with_gradients(length, heads, groups, size, hopper):
    """Lengths that are no multiples of the kernel's blocks, head sizes that are no powers of two."""
    states, weights = inputs(length, heads, groups, size)
    where = layout(length, (length // 3, length - 20))
    kernel = functools.partial(gpu.pallas, segments=where.query_segments, scale=SCALE, hopper=hopper, interpret=True)
    found = results(kernel, states, weights)
    assert_near(found, results(lambda *qkv: reference(*qkv, where, None, SCALE), states, weights))


@pytest.mark.parametrize(
    ("length", "window", "cap", "groups", "size"),
    [(200, None, None, 2, 64), (200, 70, 2.0, 4, 64), (300, 1, None, 1, 128), (100, None, 1.5, 2, 256)],
)
def test_strips_equal_reference_with_gradients(length, window, cap, groups, size):
    """Documents that end inside a strip, a last strip of fewer tokens, windows over two strips, a row that is one."""
    states, weights = inputs(length, 4, groups, 16)
    where = layout(length, (length // 3, length - 20))
    found = results(lambda *qkv: strips(*qkv, where, window, SCALE, cap, size=size), states, weights)
    assert_near(found, results(lambda *qkv: reference(*qkv, where, window, SCALE, cap), states, weights))


@pytest.mark.parametrize(("window", "groups"), [(None, 2), (7, 1), (1, 4)])
def test_the_call_of_cudnn_needs_no_segments_where_a_row_is_one_document(window, groups):
    """jax's own plain implementation of that call: what real tokens give and get is the same, windows too."""
    length, real = 40, 29
    states, weights = inputs(length, 4, groups, 16)
    where = layout(length, (real,))
    weights = weights * (where.query_segments > 0)[:, :, None, None]  # no loss reads what padding gives
    real = (where.query_segments > 0)[:, :, None, None]
    found = results(lambda *qkv: gpu.cudnn(*qkv, window, SCALE, implementation="xla") * real, states, weights)
    assert_near(found, results(lambda *qkv: reference(*qkv, where, window, SCALE) * real, states, weights))


MESHES = {"sequence=8": (1, 1, 8), "all three": (2, 2, 2), "whole heads": (1, 4, 2)}  # fsdp, tensor, sequence


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh(dict(zip(("data", "fsdp", "tensor", "sequence"), (1, *MESHES[name]), strict=True)))


@pytest.mark.parametrize(
    ("mesh", "groups", "window", "cap", "causal", "block"),
    [
        ("sequence=8", 2, None, None, True, 4),
        ("sequence=8", 4, 9, 2.0, True, 512),
        ("sequence=8", 1, 30, None, True, 3),
        ("all three", 2, None, None, True, 5),
        ("all three", 2, 1, None, True, 512),
        ("whole heads", 2, 9, None, True, 4),
        ("sequence=8", 2, None, 1.5, False, 4),
        ("all three", 4, 9, None, False, 512),
    ],
)
def test_the_ring_equals_reference_with_gradients(mesh, groups, window, cap, causal, block):
    """Documents that begin and end inside a device's part, on it alone, and across several."""
    length = 48
    states, weights = inputs(length, 4, groups, 8)
    where = layout(length, (3, 5, 26, 40), causal=causal)
    found = results(lambda *qkv: ring(*qkv, where, window, SCALE, mesh_of(mesh), cap, block), states, weights)
    assert_near(found, results(lambda *qkv: reference(*qkv, where, window, SCALE, cap), states, weights))


def test_the_ring_never_gathers_a_row():
    length, mesh = 64, mesh_of("sequence=8")
    states, weights = inputs(length, 4, 2, 8)
    where = layout(length, (30,))
    home = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
    states = [jax.device_put(part, home) for part in states]

    def loss(implementation: str, *qkv: jax.Array) -> jax.Array:
        return jnp.sum(attention(*qkv, where, implementation=implementation, mesh=mesh) * weights)

    def program(implementation: str) -> str:
        step = jax.jit(jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2)))
        return step.lower(*states).compile().as_text()

    assert "all-gather" in program("reference")
    assert "all-gather" not in program("auto") and "collective-permute" in program("auto")


@pytest.mark.parametrize(("mesh", "window", "cap"), [("all three", 150, 2.0), ("whole heads", None, None)])
def test_splash_takes_rows_that_are_cut_over_devices(mesh, window, cap):
    length = 256
    states, weights = inputs(length, 4, 2, 64)
    where = layout(length, (100, 230))
    found = results(
        lambda *qkv: splash(*qkv, where.query_segments, window, SCALE, cap, mesh_of(mesh), interpret=True),
        states,
        weights,
    )
    assert_near(found, results(lambda *qkv: reference(*qkv, where, window, SCALE, cap), states, weights))
    assert fits(length, mesh_of(mesh)) and not fits(length - 128, mesh_of(mesh)) and fits(length - 56, None)


@pytest.mark.parametrize("name", ["splash", "strips"])
def test_dots_keeps_what_attention_gives_for_the_backward_pass(name, capsys):
    states, _ = inputs(128, 4, 2, 64)
    where = layout(128, (100,))

    def kept(remat: str) -> str:
        attend = {
            "splash": lambda *qkv: splash(*qkv, where.query_segments, None, SCALE, None, interpret=True),
            "strips": lambda *qkv: strips(*qkv, where, None, SCALE),
        }[name]
        layer = jax.checkpoint(attend, policy=REMAT_POLICIES[remat])
        jax.ad_checkpoint.print_saved_residuals(layer, *states)
        return capsys.readouterr().out

    arrays = {"splash": ("f32[2,4,128,64]", "f32[2,4,128]"), "strips": ("f32[2,128,2,2,64]", "f32[2,2,2,128]")}[name]
    for array in arrays:  # the result, and the scores' log-sum-exp
        array += " output" if name == "splash" else " named 'attention'"
        assert array in kept("dots") and array not in kept("full")


@functools.cache
def with_sinks(length: int, size: int, window: int | None, ends: tuple[int, ...]) -> tuple[list[Any], list[np.ndarray]]:
    """Return [q, k, v, sinks, weights], and the formula's result and gradients in float64, by torch."""
    torch = pytest.importorskip("torch")
    states, weights = inputs(length, 4, 2, size)
    sinks = jnp.asarray([-2.0, 0.5, 1.0, 4.0])
    q, k, v, logits, g = (torch.tensor(np.asarray(x), dtype=torch.float64) for x in (*states, sinks, weights))
    for part in (q, k, v, logits):
        part.requires_grad_()
    heads_first = [part.transpose(1, 2) for part in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    scores = heads_first[0] @ heads_first[1].transpose(2, 3) * SCALE
    visible = torch.tensor(np.asarray(layout(length, ends).mask(window)))[:, None]
    scores = torch.cat([scores.masked_fill(~visible, -torch.inf), logits[:, None, None].expand(2, 4, length, 1)], -1)
    out = (torch.softmax(scores, -1)[..., :-1] @ heads_first[2]).transpose(1, 2)
    (out * g).sum().backward()
    return [*states, sinks, weights], [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad, logits.grad)]


def sunk(name: str, where: TokenLayout, window: int | None) -> Any:
    """Return the function (q, k, v, sinks) of an implementation."""
    in_parts = mesh_of("all three")
    return {
        "reference": lambda q, k, v, sinks: reference(q, k, v, where, window, SCALE, sinks=sinks),
        "blockwise": lambda q, k, v, sinks: blockwise(q, k, v, where, window, SCALE, 16, sinks=sinks),
        "strips": lambda q, k, v, sinks: strips(q, k, v, where, window, SCALE, sinks=sinks, size=16),
        "with a bias": lambda q, k, v, sinks: choosing.rematerialised(
            q, k, v, where, window, SCALE, lambda *index: jnp.zeros((2, 4, 16, 48)), block=16, sinks=sinks
        ),
        "ring": lambda q, k, v, sinks: ring(q, k, v, where, window, SCALE, in_parts, block=5, sinks=sinks),
        "splash": lambda q, k, v, sinks: splash(
            q, k, v, where.query_segments, window, SCALE, None, interpret=True, sinks=sinks
        ),
        "splash on a mesh": lambda q, k, v, sinks: splash(
            q, k, v, where.query_segments, window, SCALE, None, in_parts, interpret=True, sinks=sinks
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "length", "window"),
    [
        ("reference", 48, 9),
        ("blockwise", 48, 9),
        ("blockwise", 48, None),
        ("strips", 48, 9),
        ("with a bias", 48, 9),
        ("ring", 48, None),
        ("ring", 48, 9),
        ("splash", 200, 70),
        ("splash on a mesh", 256, None),
    ],
)
def test_sinks_are_the_float64_formulas_with_gradients(name, length, window):
    """Two documents in a row, and padding: also the sinks' own gradient."""
    ends = (length // 3, length - 12)
    size = 64 if "splash" in name else 8
    (*states, weights), expected = with_sinks(length, size, window, ends)
    function = sunk(name, layout(length, ends), window)

    def loss(*states: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(*states)
        return jnp.sum(out * weights), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*states)
    assert_near([out, *grads], expected)


def device(platform: str, kind: str, capability: str | None = None) -> types.SimpleNamespace:
    facts = {} if capability is None else {"compute_capability": capability}
    return types.SimpleNamespace(platform=platform, device_kind=kind, **facts)


H100, RTX3090, T4 = (device("gpu", *card) for card in (("NVIDIA H100", "9.0"), ("RTX 3090", "8.6"), ("T4", "7.5")))
B200 = device("gpu", "NVIDIA B200", "10.0")
AMD, CPU = device("gpu", "AMD Instinct", "gfx942"), device("cpu", "cpu")
V2, V3, V4, V5E = (device("tpu", kind) for kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v5 lite"))


def test_each_device_gets_the_attention_that_it_has():
    for new in (V4, V5E):
        assert for_device("auto", new) == for_device("auto", new, jnp.float32) == "splash"
    assert for_device("blockwise", V4) == "blockwise"
    for card, kernel in ((H100, "pallas_hopper"), (B200, "pallas"), (RTX3090, "pallas")):
        for dtype in (jnp.bfloat16, jnp.float16):
            assert for_device("auto", card, dtype) == kernel
            assert for_device("auto", card, dtype, packed=False) == "cudnn"
            assert for_device("pallas", card, dtype, packed=False) == kernel
        assert for_device("auto", card, jnp.float32, packed=False) == "strips"
        with pytest.raises(UserError, match="model.attention=cudnn takes no packed rows; set data.packing=false"):
            for_device("cudnn", card)
        for name in ("cudnn", "pallas"):
            with pytest.raises(UserError, match=f"model.attention={name} takes bfloat16 or float16, .* is float32"):
                for_device(name, card, jnp.float32, packed=False)
    for other in (V2, V3, T4, AMD, CPU):
        assert for_device("auto", other, packed=False) == ("strips" if other is T4 else "auto")
        for name in ("cudnn", "pallas"):
            with pytest.raises(
                UserError, match=f"model.attention={name} needs an NVIDIA GPU of compute capability 8.0"
            ):
                for_device(name, other, packed=False)
    for other in (V2, V3, H100, CPU):
        with pytest.raises(UserError, match="model.attention=splash needs a TPU v4 or later"):
            for_device("splash", other)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function (implementation, keywords) -> the name of what `attention` ran."""
    for module, name in (
        (choosing.gpu, "cudnn"),
        (choosing.gpu, "pallas"),
        (choosing.tpu, "splash"),
        (choosing.strips, "strips"),
        (choosing, "ring"),
        (choosing, "blockwise"),
        (choosing, "reference"),
        (choosing, "rematerialised"),
    ):
        monkeypatch.setattr(module, name, lambda *args, _name=name, **kwargs: _name)

    def run(implementation: str, packed: bool = True, causal: bool = True, keys: int = 0, **facts: Any) -> str:
        size, length, dtype = facts.pop("size", 64), facts.pop("length", 1024), facts.pop("dtype", jnp.bfloat16)
        q = jnp.zeros((1, length, 2, size), dtype)
        where = layout(length, (5,), rows=1, packed=packed, causal=causal)
        if not keys:
            return attention(q, q, q, where, implementation=implementation, **facts)
        k = jnp.zeros((1, keys, 2, size), dtype)
        where = dataclasses.replace(where, key_index=jnp.zeros((1, keys), jnp.int32))
        return attention(q, k, k, where, implementation=implementation, **facts)

    return run


def test_a_kernel_runs_where_it_can_and_else_the_next_best(ran):
    assert ran("cudnn", packed=False) == ran("cudnn", packed=False, window=100) == "cudnn"
    assert ran("cudnn") == ran("pallas", packed=False) == ran("pallas") == ran("pallas_hopper") == "pallas"
    assert ran("cudnn", packed=False, size=256) == ran("pallas", window=1024) == "pallas"
    for facts in ({"cap": 5.0}, {"window": 20}, {"size": 512}, {"dtype": jnp.float32}, {"keys": 2048}):
        assert ran("pallas", **facts) == ("blockwise" if "keys" in facts else "strips")
        assert ran("pallas", **facts | {"length": 32}) == "reference" or "keys" in facts
        assert ran("pallas", **facts | {"length": 4096}) == "blockwise"
    assert ran("cudnn", packed=False, cap=5.0) == "strips"
    assert ran("splash") == ran("splash", packed=False, window=100, cap=5.0) == "splash"
    for name in ("splash", "cudnn", "pallas", "auto", "blockwise"):
        assert ran(name, causal=False, packed=False) == "blockwise"
        assert ran(name, bias=lambda *index: 0.0) == "rematerialised"
    assert ran("reference", packed=False) == "reference"


def test_strips_are_for_rows_of_middle_length_seen_from_their_beginning(ran):
    for facts in ({}, {"cap": 5.0}, {"window": 20, "dtype": jnp.float32}, {"sinks": jnp.zeros(2)}, {"length": 2048}):
        assert ran("strips", **facts) == "strips"
    assert ran("strips", length=512) == "reference" and ran("strips", length=4096) == "blockwise"
    assert ran("strips", keys=2048) == ran("strips", causal=False) == "blockwise"
    assert ran("strips", bias=lambda *index: 0.0) == "rematerialised"
    assert ran("strips", mesh=mesh_of("all three")) == "ring"


def test_rows_cut_over_devices_go_round_the_ring(ran):
    cut, whole = mesh_of("all three"), make_mesh({"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1})
    for name in ("auto", "blockwise", "cudnn", "pallas"):
        assert ran(name, packed=False, mesh=cut) == ran(name, packed=False, mesh=cut, causal=False) == "ring"
        assert ran(name, packed=False, mesh=whole) != "ring"
    assert ran("splash", mesh=cut) == "splash"
    assert ran("splash", mesh=cut, length=128) == "ring"  # 64 tokens a device are half of what the kernel takes
    assert ran("auto", mesh=cut, length=33) == ran("reference", mesh=cut) == "reference"
    assert ran("auto", mesh=cut, bias=lambda *index: 0.0) == "rematerialised"


def test_auto_holds_the_scores_of_short_rows_only():
    assert chosen("auto", 512, 512) == chosen("auto", 1, 4096) == "reference"
    assert chosen("auto", 1024, 1024) == "blockwise"


def test_what_has_no_sinks_is_not_chosen(ran):
    sinks = jnp.zeros(2)
    assert ran("cudnn", packed=False, sinks=sinks) == ran("pallas", sinks=sinks) == "strips"
    assert ran("pallas", sinks=sinks, length=32) == "reference"
    assert ran("splash", sinks=sinks) == "splash"
    assert ran("pallas", sinks=sinks, mesh=mesh_of("all three")) == "ring"
