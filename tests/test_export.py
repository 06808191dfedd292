"""Merged and dequantized exports: what torch transformers loads gives the logits of the tree they came from."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_models
from test_peft import SETTINGS, logits, trained
from tokenizers import Tokenizer, models

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params
from tpu_tune.errors import UserError
from tpu_tune.models import architecture
from tpu_tune.transforms import QuantizeConfig, merge, quantize, unties_head


def source_of(config):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    return dataclasses.replace(tiny_models.source(config), load_tokenizer=lambda: tokenizer)


def written(directory, tree, config, **options):
    """Write a tree and load it here again."""
    write_model(str(directory), tree, source_of(config), architecture(config), **options)
    source = open_huggingface(directory)
    arch = architecture(source.config)
    return arch, load_params(source, arch)


EXPORTS = [
    "plain", "tokens_tied", "tokens_of_embed_and_head", "tokens_of_head_tied", "tokens_tied_differing", "embed_tied",
    "embed_and_head_tied", "embed_and_head", "save_embed_tied", "save_head", "save_norm", "dora", "dora_embed",
    "dora_head_some_layers", "patterns", "bias_all", "neox", "neox_bias",
]  # fmt: skip
UNTIED = {
    "tokens_of_head_tied",
    "tokens_tied_differing",
    "embed_tied",
    "embed_and_head_tied",
    "save_embed_tied",
    "dora_embed",
}


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.filterwarnings("ignore")
def test_the_merged_model_has_the_same_logits(name, tmp_path):
    case, settings = SETTINGS[name]
    config, arch, params, targets, trainable, ours = trained(case, settings)
    tree = targets.combine(*targets.split(params, trainable))
    assert unties_head(tree, arch.modules()) == (name in UNTIED)
    shard_bytes = 6000 if name in ("plain", "embed_tied", "neox") else 10**9
    back = written(tmp_path / "merged", tree, config, shard_bytes=shard_bytes)
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists() == (shard_bytes == 6000)
    assert back[0].tied == (arch.tied and name not in UNTIED)
    assert tiny_models.difference(logits(*back), ours) < 1e-4
    pytest.importorskip("torch")
    model = tiny_models.torch_model(str(tmp_path / "merged"))
    assert tiny_models.difference(tiny_models.torch_logits(model, tiny_models.input_ids("peft", 2, 10)), ours) < 1e-4


@pytest.mark.parametrize("case", ["llama_tied", "neox_parallel"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_the_dequantized_base_has_the_quantized_models_logits(case, format, tmp_path):
    config = tiny_models.CONFIGS[case]
    arch, params = tiny_models.load(config)
    tree = quantize(params, arch.modules(), QuantizeConfig(format, 16))
    ours = logits(arch, tree)
    assert tiny_models.difference(ours, logits(arch, params)) > 1e-3
    assert tiny_models.difference(logits(*written(tmp_path / "base", tree, config)), ours) < 1e-5
    pytest.importorskip("torch")
    model = tiny_models.torch_model(str(tmp_path / "base"))
    assert tiny_models.difference(tiny_models.torch_logits(model, tiny_models.input_ids("peft", 2, 10)), ours) < 1e-4


def test_a_quantized_tied_embedding_is_untied_by_an_adapter(tmp_path):
    """The head gets the dequantized weight that it used."""
    policy = QuantizeConfig("int8", 16, include=["embed_tokens"])
    config, _, params, targets, trainable, ours = trained("llama_tied", {"target_modules": ["embed_tokens"]}, policy)
    tree = targets.combine(*targets.split(params, trainable))
    assert tiny_models.difference(logits(*written(tmp_path / "merged", tree, config)), ours) < 1e-4


def test_merge_gives_plain_arrays_with_the_same_logits():
    _, arch, params, targets, trainable, ours = trained(*SETTINGS["plain"], QuantizeConfig("nf4", 16))
    merged = merge(targets.combine(*targets.split(params, trainable)))
    assert all(isinstance(leaf, type(params["model.norm.weight"])) for path, leaf in merged.items() if "proj" in path)
    assert tiny_models.difference(logits(arch, merged), ours) < 1e-4


def test_shards_config_and_index_are_as_hugging_face_writes_them(tmp_path):
    config = {**tiny_models.CONFIGS["llama2"], "torch_dtype": "bfloat16", "quantization_config": {"bits": 4}}
    arch, params = tiny_models.load(tiny_models.CONFIGS["llama2"])
    write_model(str(tmp_path / "m"), params, source_of(config), arch, shard_bytes=8000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert (
        files == sorted(set(index["weight_map"].values()))
        and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    )
    source = open_huggingface(tmp_path / "m")
    assert index["metadata"]["total_size"] == sum(2 * int(np.prod(shape)) for shape in source.shapes.values())
    assert source.read("model.norm.weight").dtype == "bfloat16"
    assert source.config == {key: value for key, value in config.items() if key != "quantization_config"}
    write_model(str(tmp_path / "m"), params, source_of(config), arch, dtype="float32")
    assert sorted(path.name for path in (tmp_path / "m").glob("*.safetensors")) == ["model.safetensors"]
    assert open_huggingface(tmp_path / "m").config["torch_dtype"] == "float32"


def test_a_failed_export_leaves_the_old_one(tmp_path):
    arch, params = tiny_models.load(tiny_models.CONFIGS["llama2"])
    source = source_of(tiny_models.CONFIGS["llama2"])
    write_model(str(tmp_path / "m"), params, source, arch)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def broken():
        raise UserError("no tokenizer")

    with pytest.raises(UserError, match="no tokenizer"):
        write_model(str(tmp_path / "m"), params, dataclasses.replace(source, load_tokenizer=broken), arch)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
