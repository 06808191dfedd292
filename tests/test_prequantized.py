"""Models that others have quantized: what is read equals the format's own dequantization, written here from its source.

The codes are random and packed one by one, and the referees unpack them with torch as the named library does.
"""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers_training import make_config, write_rows, write_tiny_llama
from safetensors.numpy import load_file, save_file

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.tensors import QuantizedTensor
from tpu_tune.training.loop import train

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
    ("settings", "inputs", "kept"),
    [
        (gptq_settings(), 96, "int4"),
        (gptq_settings(bits=8, group_size=64), 128, "int8"),
        (gptq_settings(group_size=128), 320, "int4"),  # whose last group is short
        (gptq_settings(group_size=-1), 512, "int4"),
        (gptq_settings(group_size=-1, checkpoint_format="gptq_v2"), 40, "int4"),
        (gptq_settings(sym=False), 96, ""),
        (gptq_settings(bits=8, sym=False, checkpoint_format="gptq_v2"), 96, ""),
        (gptq_settings(desc_act=True), 96, ""),
        (gptq_settings(sym=False, desc_act=True, checkpoint_format="gptq_v2"), 96, ""),
    ],
)
@pytest.mark.parametrize("scales", ["fp16", "bf16"])
def test_gptq_is_what_gptqmodel_dequantizes_it_to(tmp_path, settings, inputs, kept, scales):
    tensors = gptq_tensors(NAME, inputs, 24, settings, HALF[scales])
    source = write_model(tmp_path, tensors, settings)
    assert source.shapes == {f"{NAME}.weight": (24, inputs)}
    value = source.read(f"{NAME}.weight")
    assert getattr(value, "format", "") == kept
    assert ("1 stay as they are, int" in source.quantized()) is bool(kept)
    assert_close(as_array(value), gptq_dequantized(tensors, NAME, settings))


def gptq_model(directory, layers=2, **overrides):
    """Write a tiny Llama whose layers' matrices are in GPTQ's 4 bits; return it."""
    directory = write_tiny_llama(directory, hidden_size=64, num_hidden_layers=layers, **overrides)
    tensors = load_file(directory / "model.safetensors")
    settings = gptq_settings()
    for seed, name in enumerate([name for name in tensors if name.endswith("_proj.weight")]):
        outputs, inputs = tensors.pop(name).shape
        tensors |= gptq_tensors(name.removesuffix(".weight"), inputs, outputs, settings, seed=seed)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return directory


def test_lora_is_trained_on_a_gptq_model_whose_codes_stay(tmp_path):
    base = gptq_model(tmp_path / "base")
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
