"""Products with quantized kernels: the Pallas kernel (interpreted), pieces, and layers left in their stack."""

from __future__ import annotations

import dataclasses
import functools
import types

import helpers_training as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_tune.errors import UserError
from tpu_tune.kernels import quantized_blocks
from tpu_tune.kernels import quantized_matmul as kernel
from tpu_tune.kernels.quantized_blocks import Core, Tiles
from tpu_tune.kernels.quantized_matmul import MatmulPlan
from tpu_tune.tensors import FORMATS, LayerView, QuantizedTensor, layer_view, matmul, outside_scan, quantize_tensor
from tpu_tune.transforms.sharding import make_mesh

LAYERS, ROWS, COLUMNS = 3, 512, 384


@functools.cache
def stack(format: str, group_size: int = 64, double_quant: bool = True) -> QuantizedTensor:
    weight = jax.random.normal(jax.random.key(0), (LAYERS, ROWS, COLUMNS))
    return quantize_tensor(weight, format, group_size, double_quant)


def tokens(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def close(found: jax.Array, wanted: np.ndarray, tolerance: float = 2e-6) -> None:
    assert np.max(np.abs(np.asarray(found) - wanted)) <= tolerance * np.max(np.abs(wanted))


def by_pallas(leaf: QuantizedTensor, x: jax.Array, layer: int, transposed: bool, plan: MatmulPlan) -> jax.Array:
    """Return the product with one layer of a stack by the Pallas kernel, interpreted."""
    decode = FORMATS[leaf.format].decode
    return kernel.quantized_matmul(
        x,
        leaf.codes,
        leaf.scales,
        leaf.scale_max,
        jnp.int32(layer),
        decode,
        leaf.group_size,
        transposed,
        plan,
        interpret=True,
    )


def by_formula(leaf: QuantizedTensor, x: jax.Array, layer: int, transposed: bool) -> np.ndarray:
    """Return the same in float64, with the layer dequantized whole."""
    weight = np.asarray(leaf.dequantize(), np.float64)[layer]
    return np.asarray(x, np.float64) @ (weight.T if transposed else weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "format, group_size, double_quant, old",
    [
        ("nf4", 64, True, False),
        ("nf4", 32, False, True),
        ("int4", 128, True, False),
        ("int8", 64, True, False),
        ("mxfp4", 32, False, False),
    ],
)
def test_the_pallas_kernel_is_the_product_with_the_dequantized_layer(format, group_size, double_quant, old, transposed):
    leaf = stack(format, group_size, double_quant)
    assert kernel.fits(leaf.shape, leaf.pack_block, group_size)
    x = tokens(2, 23, COLUMNS if transposed else ROWS)  # 46 tokens: the last block is padded
    for layer in (0, LAYERS - 1):
        found = by_pallas(leaf, x, layer, transposed, MatmulPlan("pallas", Core(old=old)))
        close(found, by_formula(leaf, x, layer, transposed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "format, group_size, rows, tiles, cores",
    [
        ("nf4", 64, 768, Tiles(16, 256, 128), 2),  # three blocks of each kind, and for two cores
        ("int8", 128, 1280, Tiles(32, 256, 128), 1),  # ten groups, two to a block
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("nf4", 64, 2304, Tiles(48, 256, 384), 1),  # more groups than a block of scales holds
                ("int4", 2, 768, Tiles(16, 256, 128), 1),
                ("mxfp4", 32, 1280, Tiles(32, 256, 128), 2),
                ("int8", 64, 768, Tiles(16, 768, 384), 1),
            )
        ],
    ],
)
def test_the_pallas_kernel_cut_into_blocks(format, group_size, rows, tiles, cores, transposed, monkeypatch):
    weight = jax.random.normal(jax.random.key(0), (2, rows, COLUMNS))
    leaf = quantize_tensor(weight, format, group_size, True)
    x = tokens(41, COLUMNS if transposed else rows)
    monkeypatch.setattr(quantized_blocks, "best_tiles", lambda *_: tiles)
    found = by_pallas(leaf, x, 1, transposed, MatmulPlan("pallas", Core(count=cores)))
    close(found, by_formula(leaf, x, 1, transposed))


@pytest.mark.slow
def test_outputs_behind_the_end_of_a_block_are_dropped(monkeypatch):
    leaf = quantize_tensor(jax.random.normal(jax.random.key(0), (1, 768, COLUMNS)), "nf4", 64, True)
    for transposed, tiles in ((False, Tiles(16, 256, 256)), (True, Tiles(16, 512, 128))):
        monkeypatch.setattr(quantized_blocks, "best_tiles", lambda *_, tiles=tiles: tiles)
        x = tokens(23, COLUMNS if transposed else 768)
        close(by_pallas(leaf, x, 0, transposed, MatmulPlan("pallas")), by_formula(leaf, x, 0, transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_pallas_kernel_runs_on_each_devices_tokens(transposed):
    leaf, mesh = stack("nf4"), make_mesh({"data": 2, "fsdp": 2, "tensor": 1, "sequence": 2})
    x = tokens(4, 16, COLUMNS if transposed else ROWS)
    close(by_pallas(leaf, x, 1, transposed, MatmulPlan("pallas", mesh=mesh)), by_formula(leaf, x, 1, transposed))


@pytest.mark.parametrize(
    "cut, transposed",
    [
        (("tensor", None), False),  # sums of parts
        pytest.param(("tensor", None), True, marks=pytest.mark.slow),
        pytest.param((None, "tensor"), False, marks=pytest.mark.slow),
        pytest.param((None, "tensor"), True, marks=pytest.mark.slow),
    ],
)
def test_the_pallas_kernel_runs_on_each_devices_part_of_the_weight(cut, transposed):
    weight = jax.random.normal(jax.random.key(0), (2, 512, 256))
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 2, "sequence": 1}, jax.devices()[:2])
    leaf = quantize_tensor(weight, "nf4", 64, True)
    plan = MatmulPlan("pallas", mesh=mesh, cut=cut)
    assert kernel.fits(leaf.shape, leaf.pack_block, 64, plan)
    assert not kernel.fits((256, 128), leaf.pack_block, 64, plan)  # half of it is no whole block
    x = tokens(1, 16, 256 if transposed else 512)
    close(by_pallas(leaf, x, 1, transposed, plan), by_formula(leaf, x, 1, transposed))


def test_the_tiles_fit_the_fast_memory_and_are_the_fastest_by_the_bundles():
    wide = quantized_blocks.Kernel(FORMATS["nf4"].decode, None, True, 64, False, jnp.bfloat16, Core())
    deep = dataclasses.replace(wide, transposed=True)
    x = jnp.zeros(1, jnp.bfloat16)
    assert quantized_blocks.best_tiles(2048, (4096, 11008), wide, x) == Tiles(1024, 512, 1024)
    assert quantized_blocks.best_tiles(2048, (4096, 11008), deep, x) == Tiles(688, 2048, 256)
    assert quantized_blocks.best_tiles(2048, (4096, 1024), deep, x) == Tiles(1024, 1024, 512)
    old = dataclasses.replace(deep, core=Core(macs=32768, decoding=0.05, old=True))  # decoding is dear: once
    assert quantized_blocks.best_tiles(2048, (4096, 11008), old, x) == Tiles(2048, 512, 256)
    assert quantized_blocks.best_tiles(512, (4096, 4096), wide, x).columns >= 1024
    assert quantized_blocks.best_tiles(4100, (4096, 4096), wide, x).tokens == 1376  # three even parts
    assert quantized_blocks.best_tiles(3, (256, 128), wide, x) == Tiles(16, 256, 128)


def test_what_the_pallas_kernel_takes():
    assert kernel.fits((512, 128), 256, 64)
    assert not kernel.fits((512, 100), 256, 64)  # a last block of columns that is not whole
    assert not kernel.fits((384, 128), 384, 64)  # packed over all rows
    assert kernel.fits((512, 128), 1, 64)  # a code a byte
    assert not kernel.fits((512, 128), 256, 256)  # a group over both halves of a block


@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4"])
@pytest.mark.parametrize("implementation", ["xla", "pieces", "gpu_pieces"])
@pytest.mark.parametrize("piece", [128 * COLUMNS, 300 * ROWS, 2**24])  # small ones, some that overlap, all at once
def test_a_layer_in_its_stack_multiplies_like_the_layer_alone(format, implementation, piece, monkeypatch):
    monkeypatch.setattr(layer_view, "PIECE", piece)
    monkeypatch.setitem(layer_view.GPU_PIECES, "gpu_pieces", piece)
    leaf, x = stack(format), tokens(2, 5, ROWS)
    alone = jax.tree.map(lambda part: part[2], leaf)
    view = LayerView(leaf, jnp.int32(2), MatmulPlan(implementation))
    for mine, wanted in (
        (matmul(x, view), matmul(x, alone)),
        (jax.grad(lambda x: jnp.sum(matmul(x, view) ** 2))(x), jax.grad(lambda x: jnp.sum(matmul(x, alone) ** 2))(x)),
    ):
        close(mine, np.asarray(wanted))


def test_parts_of_a_layer():
    leaf = stack("nf4")
    view, whole = LayerView(leaf, jnp.int32(1)), np.asarray(leaf.dequantize()[1])
    np.testing.assert_array_equal(view.cut().dequantize(), whole)
    np.testing.assert_array_equal(view.cut(1, 128, 200).dequantize(), whole[:, 128:328])
    np.testing.assert_array_equal(view.cut(0, 256, 256).dequantize(), whole[256:])


@pytest.mark.parametrize("format", ["nf4", "int4", "int8", "mxfp4"])
@pytest.mark.parametrize("rows", [ROWS, 192])  # blocks of 256, and one block of all rows
def test_looking_numbers_up_gives_the_same_bits(format, rows):
    leaf = quantize_tensor(jax.random.normal(jax.random.key(0), (2, rows, 130)), format, 32, format == "nf4")
    for dtype in (jnp.float32, jnp.bfloat16):
        found, wanted = leaf.looked_up(dtype), leaf.dequantize(dtype)
        np.testing.assert_array_equal(np.asarray(found.astype(jnp.float32)), wanted.astype(jnp.float32))


def test_quantized_leaves_stay_outside_a_scan():
    leaves = {"w": stack("nf4"), "b": jnp.arange(LAYERS)}
    walked, layer_of = outside_scan(leaves, MatmulPlan("pieces"))
    assert len(jax.tree.leaves(walked)) == 1

    def step(_: None, scanned: tuple) -> tuple[None, jax.Array]:
        number, inside = scanned
        leaves = layer_of(inside, number)
        return None, matmul(tokens(4, ROWS), leaves["w"]) + leaves["b"]

    _, found = jax.lax.scan(step, None, (jnp.arange(LAYERS), walked))
    wanted = np.einsum("tk,lkn->ltn", tokens(4, ROWS), stack("nf4").dequantize()) + np.arange(LAYERS)[:, None, None]
    close(found, wanted)


def test_training_in_pieces_equals_training_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_view, "PIECE", 2**14)
    base = helpers.write_tiny_llama(tmp_path / "base", hidden_size=256, intermediate_size=512)
    documents = [helpers.documents(24, 3, 16, 2, seed) for seed in (0, 50)]
    batches = [helpers.window(helpers.rows_of(list(zip(*documents, strict=True)), 32), 1)]
    losses = {}
    for name in ("xla", "pieces"):
        config = helpers.make_config(
            **{
                "model.path": str(base),
                "method": "lora",
                "quantize.format": "nf4",
                "model.quantized_matmul": name,
                "train.per_device_train_batch_size": 2,
                "train.learning_rate": 1e-2,
            }
        )
        model, steps = helpers.prepare(config, 2)
        losses[name] = [row["loss"] for row in helpers.run_steps(model, steps, batches * 2)[1]]
    assert losses["xla"][0] != losses["xla"][1]
    np.testing.assert_allclose(losses["xla"], losses["pieces"], rtol=1e-5)


@pytest.mark.slow
def test_training_with_the_pallas_kernel_on_a_tensor_mesh_equals_training_without(tmp_path, monkeypatch):
    sizes = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    base = helpers.write_tiny_llama(tmp_path / "base", **sizes)
    documents = [helpers.documents(24, 3, 16, 2, seed) for seed in (0, 50)]
    batches = [helpers.window(helpers.rows_of(list(zip(*documents, strict=True)), 32), 1)]
    interpreted, cuts = functools.partial(kernel.quantized_matmul, interpret=True), []

    def product(*arguments) -> jax.Array:
        cuts.append(arguments[-1].cut)
        return interpreted(*arguments)

    monkeypatch.setattr(layer_view, "quantized_matmul", product)
    losses = {}
    for name in ("xla", "pallas"):
        monkeypatch.setattr(kernel, "for_device", lambda _, mesh, name=name: MatmulPlan(name, Core(), mesh))
        config = helpers.make_config(
            **{
                "model.path": str(base),
                "method": "lora",
                "quantize.format": "nf4",
                "train.per_device_train_batch_size": 2,
                "train.learning_rate": 1e-2,
                "mesh.data": 1,
                "mesh.fsdp": 1,
                "mesh.tensor": 2,
            }
        )
        model, steps = helpers.prepare(config, 2, devices=2)
        losses[name] = [row["loss"] for row in helpers.run_steps(model, steps, batches * 2)[1]]
    assert {("tensor", None), (None, "tensor")} <= set(cuts)
    np.testing.assert_allclose(losses["xla"], losses["pallas"], rtol=1e-5)


def test_the_choice_by_device():
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1})
    assert kernel.for_device("auto", mesh) == MatmulPlan("xla", Core(), mesh)
    assert kernel.for_device("pieces", mesh).implementation == "pieces"
    assert (
        kernel.for_device("pieces", make_mesh({"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1})).implementation
        == "xla"
    )
    with pytest.raises(UserError, match="quantized_matmul=pallas needs a TPU"):
        kernel.for_device("pallas", mesh)

    def on(kind: str, tensor: int) -> str:
        device = types.SimpleNamespace(platform="tpu", device_kind=kind)
        chips = types.SimpleNamespace(devices=np.array([device] * 8), shape={"tensor": tensor}, size=8)
        return kernel.for_device("auto", chips).implementation

    assert on("TPU v3", 1) == "pieces" and on("TPU v3", 8) == on("TPU v5 lite", 1) == "pallas"


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336), (14336, 4096)])
def test_blocks_leave_the_compiler_room_for_another_copy_of_the_tokens(kind, transposed, shape):
    """Of 16 MiB: libtpu refused blocks of 1,024 x 256 on a v4 and a v5p."""
    core = quantized_blocks.core_of(types.SimpleNamespace(device_kind=kind))
    cut = quantized_blocks.Kernel(abs, abs, True, 64, transposed, jnp.bfloat16, core)
    tiles = quantized_blocks.best_tiles(2048, shape, cut, jax.ShapeDtypeStruct((), jnp.bfloat16))
    deep, wide = cut.matrix(tiles.rows, tiles.columns)
    tokens = tiles.tokens
    held = tokens * (wide * (4 + 2 * 2) + deep * 2 * 2) + deep * wide * (1 + 2)  # sums, results, tokens; codes, weights
    assert held + tokens * deep * 2 <= 2**24


@pytest.mark.parametrize("number", [1, 3, 43, 172, 256, 5504])
def test_a_steps_block_is_the_quotient(number):
    for most in (1, 172, 2753):
        steps = jnp.arange(most + 1)
        quotient, rest = quantized_blocks._divmod(steps, number, most)
        np.testing.assert_array_equal(quotient, steps // number)
        np.testing.assert_array_equal(rest, steps % number)
