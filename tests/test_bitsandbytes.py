"""bitsandbytes' 4-bit files: what is read dequantizes to what bitsandbytes itself says."""

import json

import numpy as np
import pytest

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.errors import UserError
from tpu_tune.tensors import QuantizedTensor

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")
safetensors_torch = pytest.importorskip("safetensors.torch")

NAME = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def write_model(directory, weights, quant_type="nf4", nested=True, dtype=torch.bfloat16):
    """Write 4-bit matrices as bitsandbytes serializes them; return what it dequantizes them to."""
    tensors, expected = {NORM: torch.ones(3)}, {}
    for name, weight in weights.items():
        packed, state = functional.quantize_4bit(
            weight.to(dtype), blocksize=64, compress_statistics=nested, quant_type=quant_type
        )
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in state.as_dict(packed=True).items()}
        state.dtype = torch.float32  # the codes' and scales' own values, not rounded to the model's dtype
        expected[name] = functional.dequantize_4bit(packed, state).numpy()
    safetensors_torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantization = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": quant_type}
    config = {"model_type": "llama", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("nested", [True, False])
def test_matrices_dequantize_as_in_bitsandbytes(tmp_path, nested):
    torch.manual_seed(0)
    shapes = {NAME: (96, 128), NAME.replace("q_proj", "k_proj"): (320, 256), NAME.replace("q_proj", "v_proj"): (5, 64)}
    weights = {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}
    expected = write_model(tmp_path, weights, nested=nested)
    source = open_huggingface(tmp_path)
    assert source.shapes == {NORM: (3,)} | shapes
    assert isinstance(source.read(NORM), np.ndarray)
    for name, (outputs, inputs) in shapes.items():
        tensor = source.read(name)
        assert isinstance(tensor, QuantizedTensor)
        assert tensor.format == "nf4" and tensor.shape == (inputs, outputs) and tensor.group_size == 64
        np.testing.assert_allclose(np.asarray(tensor.dequantize()).T, expected[name], rtol=1e-6, atol=0)


def test_codes_pass_unchanged(tmp_path):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(1))
    write_model(tmp_path, {NAME: weight})
    packed, _ = functional.quantize_4bit(weight.to(torch.bfloat16), blocksize=64, quant_type="nf4")
    codes = np.stack([packed.numpy().reshape(-1) >> 4, packed.numpy().reshape(-1) & 15], axis=1).reshape(16, 128)
    np.testing.assert_array_equal(np.asarray(open_huggingface(tmp_path).read(NAME).unpacked()).T, codes)


def test_fp4_is_refused_by_name(tmp_path):
    write_model(tmp_path, {NAME: torch.randn(8, 64)}, quant_type="fp4")
    with pytest.raises(UserError, match="q_proj.weight is in bitsandbytes' fp4"):
        open_huggingface(tmp_path)


def test_blocks_across_rows_are_refused_by_name(tmp_path):
    write_model(tmp_path, {NAME: torch.randn(64, 96)})
    with pytest.raises(UserError, match=r"q_proj.weight of shape \(64, 96\)"):
        open_huggingface(tmp_path)


def test_a_missing_part_is_named(tmp_path):
    write_model(tmp_path, {NAME: torch.randn(8, 64)})
    path = tmp_path / "model.safetensors"
    tensors = safetensors_torch.load_file(path)
    del tensors[f"{NAME}.nested_absmax"]
    safetensors_torch.save_file(tensors, path)
    with pytest.raises(UserError, match="nested_absmax is missing"):
        open_huggingface(tmp_path)
