"""Models that others have quantized: what is read equals the format's own dequantization, written here from its source.

The codes are random and packed one by one, and the referees unpack them with torch as the named library does.
"""

import json
import pathlib
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from helpers_training import make_config, write_rows, write_tiny_llama
from safetensors.numpy import load_file, save_file

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.config import QuantizeConfig
from tpu_tune.errors import UserError
from tpu_tune.inference.export import export_merged
from tpu_tune.inference.model import load
from tpu_tune.tensors import QuantizedTensor, dense
from tpu_tune.training.loop import train
from tpu_tune.training.prepare_model import abstract_model
from tpu_tune.transforms import quantize_weight, sharding

torch = pytest.importorskip("torch")

NAME = "model.layers.0.self_attn.q_proj"
HALF = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def write_model(directory, tensors, quantization):
    """Write single tensors beside a config.json that says how they are quantized."""
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return open_huggingface(directory)


def packed(codes, bits, axis):
    """Pack codes into int32 words along an axis, the first in the lowest bits."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] * bits // 32), np.uint32)
    for place in range(codes.shape[-1]):
        words[..., place * bits // 32] |= codes[..., place] << np.uint32(place * bits % 32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


def gptq_tensors(name, inputs, outputs, settings, scale_dtype=np.float16, seed=0):
    """Return a matrix of random codes as GPTQ's files have it."""
    random, bits = np.random.RandomState(seed), settings["bits"]
    size = inputs if settings["group_size"] == -1 else settings["group_size"]
    groups = -(-inputs // size)
    order = np.arange(inputs) // size
    order = random.permutation(order) if settings["desc_act"] else order
    zeros = np.full((groups, outputs), 2 ** (bits - 1))
    if not settings["sym"]:
        zeros = random.randint(1, 2**bits, (groups, outputs))
    less = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    return {
        f"{name}.qweight": packed(random.randint(0, 2**bits, (inputs, outputs)), bits, 0),
        f"{name}.qzeros": packed(zeros - less, bits, 1),
        f"{name}.scales": (random.rand(groups, outputs) / 50 + 0.001).astype(scale_dtype),
        f"{name}.g_idx": order.astype(np.int32),
    }


def gptq_dequantized(tensors, name, settings):
    """gptqmodel/nn_modules/qlinear, `dequantize_weight`, after `convert_gptq_v1_to_v2_format`; (out, in)."""
    bits = settings["bits"]
    qweight, qzeros, g_idx = (torch.from_numpy(tensors[f"{name}.{part}"]) for part in ("qweight", "qzeros", "g_idx"))
    scales = torch.from_numpy(tensors[f"{name}.scales"].astype(np.float32))
    wf = torch.arange(0, 32, bits, dtype=torch.int32)
    zeros = torch.bitwise_and(torch.bitwise_right_shift(qzeros.unsqueeze(2), wf[None, None]), 2**bits - 1)
    if settings.get("checkpoint_format") != "gptq_v2":
        zeros = torch.bitwise_and(zeros + 1, 2**bits - 1)
    weight = torch.bitwise_and(torch.bitwise_right_shift(qweight.unsqueeze(1), wf[None, :, None]), 2**bits - 1)
    weight, zeros = weight.reshape(-1, weight.shape[2]), zeros.reshape(scales.shape)
    return (scales[g_idx.long()] * (weight - zeros[g_idx.long()])).numpy().T


def gptq_settings(bits=4, group_size=32, sym=True, desc_act=False, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act, **more}


def as_array(value):
    """Return what a source reads as an array in torch's order."""
    return np.asarray(value.dequantize()).T if isinstance(value, QuantizedTensor) else value


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "inputs", "scales", "kept"),
    [
        (gptq_settings(), 96, "fp16", "int4"),
        (gptq_settings(bits=8, group_size=64), 128, "bf16", "int8"),
        (gptq_settings(group_size=128), 320, "bf16", "int4"),  # whose last group is short
        (gptq_settings(group_size=-1), 512, "fp16", "int4"),
        (gptq_settings(group_size=-1, checkpoint_format="gptq_v2"), 40, "bf16", "int4"),
        (gptq_settings(sym=False), 96, "fp16", ""),
        (gptq_settings(bits=8, sym=False, checkpoint_format="gptq_v2"), 96, "bf16", ""),
        (gptq_settings(desc_act=True), 96, "fp16", ""),
        (gptq_settings(sym=False, desc_act=True, checkpoint_format="gptq_v2"), 96, "bf16", ""),
    ],
)
def test_gptq_is_what_gptqmodel_dequantizes_it_to(tmp_path, settings, inputs, scales, kept):
    tensors = gptq_tensors(NAME, inputs, 24, settings, HALF[scales])
    source = write_model(tmp_path, tensors, settings)
    assert source.shapes == {f"{NAME}.weight": (24, inputs)}
    value = source.read(f"{NAME}.weight")
    assert getattr(value, "format", "") == kept
    assert ("1 stay as they are, int" in source.quantized()) is bool(kept)
    assert_close(as_array(value), gptq_dequantized(tensors, NAME, settings))


def awq_tensors(name, inputs, outputs, group_size, scale_dtype, seed=0):
    """Return a matrix of random codes and zero points as AutoAWQ's gemm layout has it."""
    random, order = np.random.RandomState(seed), [0, 2, 4, 6, 1, 3, 5, 7]
    groups = 1 if group_size == -1 else -(-inputs // group_size)

    def shuffled(codes):
        return packed(codes.reshape(len(codes), -1, 8)[..., order].reshape(codes.shape), 4, 1)

    return {
        f"{name}.qweight": shuffled(random.randint(0, 16, (inputs, outputs))),
        f"{name}.qzeros": shuffled(random.randint(0, 16, (groups, outputs))),
        f"{name}.scales": (random.rand(groups, outputs) / 50 + 0.001).astype(scale_dtype),
    }


def awq_dequantized(tensors, name, group_size):
    """autoawq/awq/utils/packing_utils.py: unpack_awq, reverse_awq_order, dequantize_gemm; (out, in)."""
    shifts = torch.arange(0, 32, 4)

    def unpacked(part):
        words = torch.from_numpy(tensors[f"{name}.{part}"])
        codes = torch.bitwise_right_shift(words[:, :, None], shifts[None, None, :]).to(torch.int8)
        codes = codes.view(codes.shape[0], -1)
        order = torch.arange(codes.shape[-1]).view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1)
        return torch.bitwise_and(codes[:, order], 15)

    weight, zeros = unpacked("qweight"), unpacked("qzeros")
    size = len(weight) if group_size == -1 else group_size
    scales = torch.from_numpy(tensors[f"{name}.scales"].astype(np.float32))
    scales, zeros = (each.repeat_interleave(size, dim=0)[: len(weight)] for each in (scales, zeros))
    return ((weight - zeros) * scales).numpy().T


@pytest.mark.parametrize(("group_size", "scales"), [(32, "fp16"), (64, "bf16"), (128, "fp16"), (-1, "bf16")])
def test_awq_is_what_autoawq_dequantizes_it_to(tmp_path, group_size, scales):
    tensors = awq_tensors(NAME, 160, 40, group_size, HALF[scales])
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    source = write_model(tmp_path, tensors, settings)
    assert source.shapes == {f"{NAME}.weight": (40, 160)}
    assert "1 are dequantized" in source.quantized()
    assert_close(source.read(f"{NAME}.weight"), awq_dequantized(tensors, NAME, group_size))


GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "compressed_tensors.npz")
KEPT = {
    "int4": "int4", "int4_channel_odd": "", "int4_channel": "int4", "int4_zeros": "", "int8_words": "int8",
    "int8": "int8", "int8_zeros": "", "int8_tensor": "int8", "fp8_channel": "", "fp8_tensor": "", "fp8_block": "",
    "mxfp4": "mxfp4", "nvfp4": "",
}  # fmt: skip


def golden_tensors(case):
    """Return what the compressed-tensors library has stored, and its settings."""
    dtypes, shapes = (json.loads(str(GOLDEN[f"{case}/{part}"])) for part in ("dtypes", "shapes"))
    tensors = {}
    for name, dtype in dtypes.items():
        dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        tensors[f"{NAME}.{name}"] = GOLDEN[f"{case}/{name}"].view(dtype).reshape(shapes[name])
    return tensors, json.loads(str(GOLDEN[f"{case}/config"]))


@pytest.mark.parametrize("case", KEPT)
def test_compressed_tensors_are_what_the_library_decompresses_them_to(tmp_path, case):
    """Files and expected numbers are the library's own: `make_compressed_tensors_golden.py`."""
    source = write_model(tmp_path, *golden_tensors(case))
    expected = GOLDEN[f"{case}/expected"]
    assert source.shapes == {f"{NAME}.weight": expected.shape}
    value = source.read(f"{NAME}.weight")
    assert getattr(value, "format", "") == KEPT[case]
    rounded = 2**-8 if case == "nvfp4" else 2e-6  # which the library decompresses in bfloat16
    np.testing.assert_allclose(as_array(value), expected, rtol=rounded, atol=1e-9)


def fp8_tensors(name, shape, scales, scale_dtype=np.float32):
    """Return random 8-bit floats with scales of a shape."""
    random = np.random.RandomState(0)
    tensors = {name: random.randn(*shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)}
    return tensors | {f"{name}_scale_inv": np.asarray(random.rand(*scales) / 50 + 0.001).astype(scale_dtype)}


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((256, 128), (2, 1), [128, 128]),
        ((70, 100), (3, 4), [32, 32]),  # short blocks at both ends
        ((24, 48), (1, 1), None),  # Ministral's, one a tensor
        ((24, 48), (), None),
        ((3, 24, 48), (3, 1, 1), None),  # of experts
        ((3, 64, 96), (3, 2, 3), [32, 32]),
    ],
)
def test_fp8_is_what_transformers_dequantizes_it_to(tmp_path, shape, scales, block):
    reference = pytest.importorskip("transformers.integrations.finegrained_fp8")
    name = f"{NAME}.weight"
    tensors = fp8_tensors(name, shape, scales, ml_dtypes.bfloat16 if len(shape) == 2 else np.float32)
    tensors[f"{NAME}.activation_scale"] = np.ones((), np.float32)
    settings = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "static"}
    source = write_model(tmp_path, tensors, settings)
    assert source.shapes == {name: shape}
    weight = torch.from_numpy(tensors[name].view(np.uint8)).view(torch.float8_e4m3fn)
    scale = torch.from_numpy(np.asarray(tensors[f"{name}_scale_inv"], np.float32))
    wanted = reference._dequantize_fp8_weight(weight, scale, block, torch.float32)
    np.testing.assert_array_equal(source.read(name), wanted.numpy())


def test_scales_of_powers_of_two_in_a_byte(tmp_path):
    """DeepSeek's ue8m0, as safetensors' own dtype."""
    tensors = fp8_tensors(f"{NAME}.weight", (64, 64), (2, 2))
    wanted = np.array([[0.25, 2.0], [1.0, 0.5]], np.float32)
    tensors[f"{NAME}.weight_scale_inv"] = wanted.astype(ml_dtypes.float8_e8m0fnu)
    source = write_model(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    numbers = tensors[f"{NAME}.weight"].astype(np.float32)
    np.testing.assert_array_equal(source.read(f"{NAME}.weight"), numbers * wanted.repeat(32, 0).repeat(32, 1))


def without(end):
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(end)}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (gptq_settings() | {"bits": 3}, None, "has bits 3; only 4 and 8"),
        (gptq_settings(), without("qweight"), "says gptq, and no matrix in its files is quantized so"),
        (gptq_settings(checkpoint_format="marlin"), None, "checkpoint_format 'marlin' is not read"),
        (gptq_settings(), without("scales"), r"q_proj.scales is missing, so .*q_proj.qweight cannot be decoded"),
        (gptq_settings(group_size=64), None, r"has shape \(3, .* groups of 64 ask for \(2, "),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, None, "AWQ's version 'gemv' is not read"),
        ({"quant_method": "hqq"}, None, "weights quantized by 'hqq' are not read .known: .*gptq.*fp8"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, None, "'marlin-24' is not read"),
        ({"quant_method": ["fp8"]}, None, "are not read"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, None, "quantization_config .* cannot be used"),
        ("fp8", None, "must be an object"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, settings, change, message):
    tensors = gptq_tensors(NAME, 96, 24, gptq_settings())
    with pytest.raises(UserError, match=message) as caught:
        write_model(tmp_path, change(tensors) if change else tensors, settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "end", "message"),
    [
        ("int4", "weight_scale", "weight_scale is missing"),
        ("int4", "weight_shape", "weight_shape is missing"),
        ("int8", "weight_scale", "weight_scale is missing"),
        ("fp8_block", "weight_scale", "weight_scale is missing|_scale.* is missing"),
        ("nvfp4", "weight_global_scale", "weight_global_scale is missing"),
    ],
)
def test_a_missing_scale_is_named(tmp_path, case, end, message):
    tensors, settings = golden_tensors(case)
    with pytest.raises(UserError, match=message):
        write_model(tmp_path, without(end)(tensors), settings)


def quantize_files(directory, settings, chosen, make):
    """Replace matrices of a model's files by quantized ones; return name -> what they stand for, (out, in)."""
    tensors, expected = load_file(directory / "model.safetensors"), {}
    for seed, name in enumerate([name for name in tensors if chosen(name)]):
        outputs, inputs = tensors.pop(name).shape
        more, expected[name] = make(name.removesuffix(".weight"), inputs, outputs, seed)
        tensors |= more
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return expected


def make_gptq(settings):
    def make(name, inputs, outputs, seed):
        tensors = gptq_tensors(name, inputs, outputs, settings, seed=seed)
        return tensors, gptq_dequantized(tensors, name, settings)

    return make


def gptq_model(directory, **changes):
    """Write a tiny Llama whose layers' matrices are in GPTQ's bits; return it, and what the matrices stand for."""
    directory = write_tiny_llama(directory, hidden_size=64)
    settings = gptq_settings(**changes)
    return directory, quantize_files(
        directory, settings, lambda name: name.endswith("_proj.weight"), make_gptq(settings)
    )


def loaded(directory, quantize="none"):
    source = open_huggingface(directory)
    return source, load_params(source, open_architecture(source), quantization=QuantizeConfig(quantize))


def layer_of(leaf, *index):
    """Return one matrix of a leaf as (out, in)."""
    return np.asarray(jax.tree.map(lambda part: part[index], dense(leaf))).T


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_what_is_ours_keeps_its_codes_whatever_is_asked(tmp_path, quantize):
    directory, expected = gptq_model(tmp_path / "model")
    _, params = loaded(directory, quantize)
    for name, wanted in expected.items():
        leaf = params[name.replace(".0.", ".").replace(".1.", ".")]
        assert (leaf.format, leaf.group_size) == ("int4", 32)
        assert_close(layer_of(leaf, int(name.split(".")[2])), wanted)


def test_zero_points_are_dequantized_and_quantized_again_as_asked(tmp_path):
    directory, expected = gptq_model(tmp_path / "model", sym=False)
    source, params = loaded(directory)
    assert "14 are dequantized, and stored as quantize.* and the dtype say" in source.quantized()
    path = "model.layers.mlp.down_proj.weight"
    assert_close(layer_of(params[path], 1), expected[path.replace("layers.", "layers.1.")])
    _, again = loaded(directory, "int8")
    assert again[path].format == "int8"
    np.testing.assert_array_equal(again[path].codes, quantize_weight(params[path], QuantizeConfig("int8")).codes)


def test_a_layer_that_is_not_quantized_takes_the_others_of_its_leaf_along(tmp_path):
    directory = write_tiny_llama(tmp_path / "model", hidden_size=64)
    settings = gptq_settings()

    def chosen(name):
        return name.endswith("_proj.weight") and name != "model.layers.0.mlp.up_proj.weight"

    expected = quantize_files(directory, settings, chosen, make_gptq(settings))
    source, params = loaded(directory)
    assert "12 stay as they are, int4" in source.quantized() and "1 are dequantized" in source.quantized()
    assert isinstance(params["model.layers.mlp.gate_proj.weight"], QuantizedTensor)
    assert_close(layer_of(params["model.layers.mlp.up_proj.weight"], 1), expected["model.layers.1.mlp.up_proj.weight"])


def test_files_of_the_first_tools_empty_biases_and_settings_in_a_file_of_their_own(tmp_path):
    directory, expected = gptq_model(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    tensors |= {name.replace("weight", "bias"): np.zeros(len(value), np.float16) for name, value in expected.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (directory / "config.json").write_text(json.dumps(config))
    _, params = loaded(directory)
    assert params["model.layers.mlp.up_proj.weight"].format == "int4"


def make_fp8(name, inputs, outputs, seed):
    tensors = fp8_tensors(f"{name}.weight", (outputs, inputs), (-(-outputs // 16), -(-inputs // 16)))
    scales = tensors[f"{name}.weight_scale_inv"].repeat(16, 0).repeat(16, 1)[:outputs, :inputs]
    return tensors, tensors[f"{name}.weight"].astype(np.float32) * scales


@pytest.mark.parametrize(
    ("settings", "make", "kept"),
    [
        ({"quant_method": "fp8", "weight_block_size": [16, 16]}, make_fp8, False),
        (gptq_settings(group_size=16), make_gptq(gptq_settings(group_size=16)), True),
    ],
)
def test_experts_with_a_tensor_each(tmp_path, settings, make, kept):
    directory = pathlib.Path(tiny_models.write(tmp_path / "mixtral", tiny_models.CONFIGS["mixtral"]))
    expected = quantize_files(directory, settings, lambda name: ".experts." in name, make)
    _, params = loaded(directory)
    assert expected
    for name, wanted in expected.items():
        layer, expert = (int(part) for part in name.split(".") if part.isdigit())
        leaf = params[re.sub(r"\.\d+(?=\.)", "", name)]
        assert isinstance(leaf, QuantizedTensor) is kept
        assert_close(layer_of(leaf, layer, expert), wanted)


def test_a_plan_has_the_leaves_that_the_files_give(tmp_path):
    directory, _ = gptq_model(tmp_path / "model")
    _, params = loaded(directory)
    config = make_config(model__path=str(directory), method="lora", output_dir="none", data__train="none")
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    frozen = abstract_model(config, json.loads((directory / "config.json").read_text()), mesh).frozen
    for path, leaf in params.items():
        if isinstance(leaf, QuantizedTensor):
            assert jax.tree.map(lambda part: (part.shape, part.dtype), frozen[path]) == jax.tree.map(
                lambda part: (part.shape, part.dtype), leaf
            ), path


def test_a_gptq_models_logits_are_those_of_its_numbers(tmp_path):
    directory, expected = gptq_model(tmp_path / "model")
    plain = write_tiny_llama(tmp_path / "plain", hidden_size=64)
    save_file(
        load_file(plain / "model.safetensors")
        | {name: np.ascontiguousarray(value) for name, value in expected.items()},
        plain / "model.safetensors",
        metadata={"format": "pt"},
    )
    ids = np.arange(24)[None]
    with jax.default_matmul_precision("highest"):
        found, wanted = (np.asarray(load(str(each), dtype="float32")(ids)) for each in (directory, plain))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.slow
def test_lora_is_trained_on_a_gptq_model_whose_codes_stay(tmp_path):
    base, _ = gptq_model(tmp_path / "base")
    rows = write_rows(tmp_path / "rows.jsonl", 8)
    config = make_config(
        model__path=str(base), output_dir=str(tmp_path / "run"), data__train=str(rows), data__max_length=64,
        method="lora", lora__rank=2, lora__target_modules=["q_proj"], train__max_steps=2, train__save_steps=2,
        train__per_device_train_batch_size=2,
    )  # fmt: skip
    lines = []
    run = train(config, lines.append)
    assert run.status == "finished"
    assert any("14 matrices of its files are quantized by GPTQ: 14 stay as they are, int4" in line for line in lines)
    export_merged(config.output_dir, str(tmp_path / "merged"))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "merged" / "model.safetensors")
