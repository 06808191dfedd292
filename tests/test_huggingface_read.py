"""Reading Hugging Face directories: against the safetensors library, and what a broken directory is told."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.errors import UserError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


def random_tensors(seed=0):
    random = np.random.default_rng(seed)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_]
    tensors = {f"layer.{i}.weight": (random.normal(size=(5 + i, 3)) * 9).astype(d) for i, d in enumerate(dtypes)}
    return tensors | {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32)}


def write_model(directory, tensors, shards=1, config=CONFIG):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_comes_as_stored(tmp_path, shards):
    tensors = random_tensors()
    source = open_huggingface(write_model(tmp_path / "m", tensors, shards))
    assert source.config == CONFIG
    assert source.shapes == {name: tensor.shape for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read, tensor)


def test_reading_agrees_with_the_safetensors_library(tmp_path):
    directory = write_model(tmp_path / "m", random_tensors())
    source = open_huggingface(directory)
    for name, tensor in load_file(directory / "model.safetensors").items():
        np.testing.assert_array_equal(source.read(name), tensor)


def test_fingerprint_follows_the_weights_not_the_place(tmp_path):
    tensors = random_tensors()
    first = open_huggingface(write_model(tmp_path / "a", tensors)).fingerprint
    assert open_huggingface(write_model(tmp_path / "b", tensors)).fingerprint == first
    changed = tensors | {"layer.1.weight": tensors["layer.1.weight"] * np.float16(1.01)}
    assert open_huggingface(write_model(tmp_path / "c", changed)).fingerprint != first
    other = CONFIG | {"hidden_size": 16}
    assert open_huggingface(write_model(tmp_path / "d", tensors, config=other)).fingerprint != first


def test_tokenizer_comes_from_the_directory(tmp_path):
    directory = write_model(tmp_path / "m", random_tensors())
    with pytest.raises(UserError, match="no usable tokenizer"):
        open_huggingface(directory).load_tokenizer()
    Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert open_huggingface(directory).load_tokenizer()("hello").input_ids == [0]


def _truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _truncate_shard_header(directory):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def _rewrite_index(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


def _bad_offsets(directory):
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": "none"}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


@pytest.mark.parametrize(
    ("shards", "damage", "message"),
    [
        (1, lambda d: (d / "config.json").unlink(), "has no config.json"),
        (1, lambda d: (d / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (1, lambda d: (d / "config.json").write_text("[]"), r"config\.json: holds a list"),
        (1, lambda d: (d / "config.json").write_text("{}"), "model_type"),
        (1, lambda d: (d / "model.safetensors").unlink(), "has no weights"),
        (1, lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "not a file that torch.save wrote"),
        (1, lambda d: (d / "model.safetensors").write_bytes(b"abc"), r"model\.safetensors: cut short or not"),
        (1, _truncate, r"model\.safetensors: cut short: its header promises"),
        (1, _bad_offsets, r"model\.safetensors: its header"),
        (
            3,
            lambda d: (d / "model-00002-of-00003.safetensors").unlink(),
            "model-00002-of-00003.safetensors: this shard",
        ),
        (3, _truncate_shard_header, "model-00002-of-00003.safetensors: cut short"),
        (3, lambda d: (d / "model.safetensors.index.json").write_text('{"a": 1}'), "no weight_map"),
        (3, _rewrite_index, "does not hold ghost"),
    ],
)
def test_a_broken_directory_is_named(tmp_path, shards, damage, message):
    directory = write_model(tmp_path / "m", random_tensors(), shards)
    damage(directory)
    with pytest.raises(UserError, match=message) as error:
        open_huggingface(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_other_quantizations_are_refused_by_name(tmp_path):
    for quantization, name in [({"quant_method": "gptq"}, "gptq"), ({"load_in_8bit": True}, "int8")]:
        config = CONFIG | {"quantization_config": quantization}
        directory = write_model(tmp_path / name, random_tensors(), config=config)
        with pytest.raises(UserError, match=name):
            open_huggingface(directory)


def test_an_adapter_directory_is_told_where_it_belongs(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.adapter"):
        open_huggingface(tmp_path)
