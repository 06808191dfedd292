"""Whether a head is tied is decided by the files, as transformers 5 does; against its logits, for every family."""

import json

import jax
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from test_families import adapted
from test_peft import write_model_of
from tokenizers import Tokenizer, models

from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.peft import read_adapter, write_adapter
from tpu_tune.errors import UserError
from tpu_tune.transforms import LoraConfig, find_targets

pytestmark = pytest.mark.filterwarnings("ignore")
TIED = ["llama_tied", "qwen2", "neox_full_rotary", "gpt2", "opt", "gemma", "gemma2", "gemma3", "phi3_tied", "t5"]


def config_of(case):
    if case == "phi3_tied":
        return {**tiny_models.CONFIGS["phi3"], "tie_word_embeddings": True}
    return tiny_models.CONFIGS[case]


def write(directory, case, head, **changes):
    """Write a tied case with a head of its own: `other`, `equal`, or none; return the directory."""
    config = {**config_of(case), **changes}
    tensors = tiny_models.weights({**config_of(case)})
    embedding = next(value for name, value in tensors.items() if name.endswith(EMBEDDINGS))
    name = "embed_out.weight" if config["model_type"] == "gpt_neox" and head == "other" else "lm_head.weight"
    if head != "none":
        other = embedding + np.random.default_rng(3).standard_normal(embedding.shape).astype(np.float32) * 0.3
        tensors[name] = other if head == "other" else embedding.copy()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "shared.weight")


def both(directory, case):
    """Return (our architecture, our logits, torch's)."""
    source = open_huggingface(directory)
    arch = open_architecture(source)
    ids = tiny_models.input_ids(case)
    encoder = tiny_models.encoder_input(case) if arch.encoder else None
    found = tiny_models.logits(arch, load_params(source, arch), ids, encoder)
    return arch, found, tiny_models.torch_logits(tiny_models.torch_model(str(directory)), ids, encoder)


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("head", ["other", "equal"])
def test_a_stored_head_that_differs_is_the_head(case, head, tmp_path):
    pytest.importorskip("torch")
    arch, found, expected = both(write(tmp_path / "m", case, head), case)
    assert arch.tied == (head == "equal")
    assert tiny_models.difference(found, expected) < 1e-4


@pytest.mark.parametrize("head", ["other", "none"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True, "scale_decoder_outputs": False},  # as transformers 5 saves T5 1.1
        {"tie_word_embeddings": True, "scale_decoder_outputs": True},
        {"tie_word_embeddings": False},  # as T5 1.1 was published
        {"tie_word_embeddings": False, "scale_decoder_outputs": True},
        {},
    ],
)
def test_t5s_head_and_scaling_are_transformers(changes, head, tmp_path):
    pytest.importorskip("torch")
    arch, found, expected = both(write(tmp_path / "m", "t5", head, **changes), "t5")
    assert arch.tied == (head == "none")
    assert tiny_models.difference(found, expected) < 1e-4


def test_what_transformers_saves_of_a_t5_without_scaling_loads(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(**{**tiny_models.CONFIGS["t5"], "tie_word_embeddings": False})
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (said["tie_word_embeddings"], said["scale_decoder_outputs"]) == (True, False)
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    arch, found, expected = both(tmp_path / "m", "t5")
    assert arch.tied and arch.head_scale == 1.0
    assert tiny_models.difference(found, expected) < 1e-4


def test_an_embedding_of_the_encoders_own_is_refused(tmp_path):
    directory = write(tmp_path / "m", "t5", "none")
    tensors = load_file(directory / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    open_huggingface(directory)
    tensors["encoder.embed_tokens.weight"] += 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match="'encoder.embed_tokens.weight' is not the same as 'shared.weight'"):
        open_huggingface(directory)


@pytest.mark.parametrize("case", ["t5", "llama_tied"])
def test_a_merged_head_keeps_its_scale(case, tmp_path):
    """An adapter on T5's tied head unties it in the merged model; its states are then no longer scaled."""
    pytest.importorskip("torch")
    arch, _, targets, trainable, frozen = adapted(case, ["lm_head"])
    tree = targets.combine(trainable, frozen)
    write_model_of(tmp_path / "m", tree, tiny_models.CONFIGS[case], arch)
    ours = tiny_models.logits_of(case, arch, tree)
    _, found, expected = both(tmp_path / "m", case)
    assert tiny_models.difference(found, ours) < 1e-4 and tiny_models.difference(expected, ours) < 1e-4


def test_an_adapter_over_an_untied_base_works_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    directory = write(tmp_path / "m", "llama_tied", "other")
    source = open_huggingface(directory)
    arch = open_architecture(source)
    params = load_params(source, arch)
    targets = find_targets(arch.modules(), LoraConfig(rank=4, target_modules=["q_proj", "lm_head"]))
    trainable, frozen = targets.split(params, targets.init(params, jax.random.key(0)))
    trainable = {path: leaf + 0.05 for path, leaf in trainable.items()}
    write_adapter(str(tmp_path / "a"), trainable, targets, arch, str(directory), params)
    read_adapter(str(tmp_path / "a"), arch)
    ids = tiny_models.input_ids("peft")
    found = tiny_models.logits(arch, targets.combine(trainable, frozen), ids)
    model = peft.PeftModel.from_pretrained(tiny_models.torch_model(str(directory)), str(tmp_path / "a")).eval()
    assert tiny_models.difference(found, tiny_models.torch_logits(model, ids)) < 1e-4


def test_a_merged_untied_base_stays_untied(tmp_path):
    pytest.importorskip("torch")
    directory = write(tmp_path / "m", "llama_tied", "other")
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(directory / "tokenizer.json"))
    from tpu_tune.checkpoints.huggingface_write import write_model

    source = open_huggingface(directory)
    arch = open_architecture(source)
    write_model(str(tmp_path / "w"), load_params(source, arch), source, arch)
    assert json.loads((tmp_path / "w" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = both(directory, "llama_tied"), both(tmp_path / "w", "llama_tied")
    np.testing.assert_array_equal(before[1], after[1])
