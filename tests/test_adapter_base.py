"""Adapters whose base is not the model as it stands, against peft: PiSSA, OLoRA and their like, saved embeddings."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from test_peft import IDS

from tpu_tune.checkpoints.adapter_base import base_of_adapter
from tpu_tune.checkpoints.params import open_architecture
from tpu_tune.checkpoints.peft import read_adapter
from tpu_tune.checkpoints.source import open_source
from tpu_tune.errors import UserError
from tpu_tune.inference.model import load
from tpu_tune.transforms import find_targets

pytestmark = pytest.mark.filterwarnings("ignore")


def made_by_peft(tmp_path, case, prepare=None, **settings):
    """Make an adapter with peft and train it a little; return (base, adapter, torch's logits of the trained model)."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS[case])
    torch.manual_seed(0)
    model = tiny_models.torch_model(base)
    if prepare:
        prepare(model)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM" if case == "t5" else "CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path / "adapter")
    return base, str(tmp_path / "adapter"), tiny_models.torch_logits(model, IDS, encoder(case))


def encoder(case):
    return tiny_models.encoder_input("peft") if case == "t5" else None


def ours(base, adapter, case="", **options):
    model = load(base, adapter=adapter, **options)
    return tiny_models.logits(model.architecture, model.params, IDS, encoder(case))


def plain(base, adapter, case=""):
    """Our logits of the adapter over the base as it stands."""
    source = open_source(base)
    arch = open_architecture(source)
    spec, trained = read_adapter(adapter, arch, over_its_base=True)
    params = load(base).params
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    return tiny_models.logits(arch, targets.combine(*targets.split(params, trained)), IDS, encoder(case))


BASES = {
    "llama": ("llama2", {}),
    "rslora_and_patterns": (
        "qwen3", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 5}},
    ),
    "some_layers": (
        "qwen2_upper_windows",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    ),
    "dora": ("llama_biases", {"use_dora": True}),
    "fused_heads": ("neox_parallel", {}),
    "fused_matrices": ("phi3", {}),
    "conv1d": ("gpt2", {"target_modules": ["c_proj"], "exclude_modules": ".*mlp.*", "fan_in_fan_out": True}),
    "embeddings_too": ("llama2", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied_head": ("llama_tied", {"target_modules": ["q_proj", "lm_head"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi"]}),
}  # fmt: skip


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("name", BASES)
def test_the_base_is_the_one_that_peft_derives(how, name, tmp_path):
    case, settings = BASES[name]
    base, adapter, expected = made_by_peft(tmp_path, case, init_lora_weights=how, **settings)
    assert tiny_models.difference(ours(base, adapter, case), expected) < 1e-4
    assert tiny_models.difference(plain(base, adapter, case), expected) > 1e-3


def test_the_derived_base_is_quantized_as_any_other(tmp_path):
    base, adapter, expected = made_by_peft(tmp_path, "llama2", init_lora_weights="pissa")
    assert tiny_models.difference(ours(base, adapter, quantize="int8"), expected) < 0.1


@pytest.mark.parametrize("how", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_other_beginnings_leave_the_base_as_it_is(how, tmp_path):
    base, adapter, expected = made_by_peft(tmp_path, "llama2", init_lora_weights=how)
    assert tiny_models.difference(ours(base, adapter), expected) < 1e-4


def edit(adapter, **changes):
    file = f"{adapter}/adapter_config.json"
    with open(file, encoding="utf-8") as stream:
        content = json.load(stream) | changes
    with open(file, "w", encoding="utf-8") as stream:
        json.dump(content, stream)


@pytest.mark.parametrize("how", ["pissa_niter_4", "corda", "loftq", "lora_ga", "some_new_one", 3])
def test_what_cannot_be_derived_is_refused_by_name(how, tmp_path):
    base, adapter, _ = made_by_peft(tmp_path, "llama2")
    edit(adapter, init_lora_weights=how)
    with pytest.raises(UserError, match=f"init_lora_weights '?{how}") as error:
        load(base, adapter=adapter)
    assert "\n" not in str(error.value)


def test_an_adapter_that_peft_has_converted_is_a_plain_one(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS["llama2"])
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = peft.get_peft_model(tiny_models.torch_model(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.mul_(1.2)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    found = ours(base, str(tmp_path / "adapter"))
    assert tiny_models.difference(found, tiny_models.torch_logits(model.eval(), IDS)) < 1e-4


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_training_on_from_such_an_adapter_is_refused(how, tmp_path):
    base, adapter, _ = made_by_peft(tmp_path, "llama2", init_lora_weights=how)
    with pytest.raises(UserError, match=f"init_lora_weights='{how}' changes the weights of its base; it can be used"):
        read_adapter(adapter, open_architecture(open_source(base)))


# Embeddings and heads of the adapter's own


def grow(model):
    """Resize as for added tokens, with rows that are nothing special."""
    import torch

    model.resize_token_embeddings(101)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            parameter[96:] = torch.randn(5, parameter.shape[1], generator=generator)


OWN = {
    "grown": ("llama2", grow, {"target_modules": ["q_proj"]}),
    "grown_tied": ("llama_tied", grow, {"target_modules": ["q_proj"]}),
    "grown_neox": ("neox_parallel", grow, {"target_modules": ["query_key_value"]}),
    "grown_and_adapted": ("llama2", grow, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "grown_and_saved": ("llama2", grow, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "grown_tied_and_saved": (
        "llama_tied", grow, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "grown_and_trained_tokens": ("llama2", grow, {"target_modules": ["q_proj"], "trainable_token_indices": [97, 100]}),
    "grown_pissa": ("llama2", grow, {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    "head_of_tied": ("llama_tied", None, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head_of_tied_neox": ("neox_full_rotary", None, {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}),
    "head_of_tied_t5": ("t5", None, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}),
    "both_of_tied": (
        "llama_tied", None, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_the_adapters_own_embeddings_are_used(name, tmp_path):
    case, prepare, settings = OWN[name]
    base, adapter, expected = made_by_peft(tmp_path, case, prepare, **settings)
    assert tiny_models.difference(ours(base, adapter, case), expected) < 1e-4


@pytest.mark.parametrize("name", ["grown", "grown_tied", "head_of_tied"])
def test_training_on_over_the_plain_base_says_why_not(name, tmp_path):
    case, prepare, settings = OWN[name]
    base, adapter, _ = made_by_peft(tmp_path, case, prepare, **settings)
    with pytest.raises(UserError, match=r"\(101 rows for its 96; peft saves it|it is tied to 'model.embed_tokens'"):
        read_adapter(adapter, open_architecture(open_source(base)))


def test_rows_that_are_not_in_the_adapter_are_named(tmp_path):
    """With a tied model's saved embedding, the head goes on using the grown base, which is not there."""
    base, adapter, _ = made_by_peft(tmp_path, "llama2", grow, target_modules=["q_proj"])
    file = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(file)
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match="over 101 tokens, .* has 96, and it lacks the rows of lm_head.weight"):
        load(base, adapter=adapter)


def test_shared_training_of_tied_ends_is_refused_by_name(tmp_path):
    base, adapter, _ = made_by_peft(
        tmp_path, "llama_tied", target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    with pytest.raises(UserError, match="'ensure_weight_tying'|tied"):
        load(base, adapter=adapter)
    edit(adapter, modules_to_save=None, ensure_weight_tying=True)


def test_tying_that_does_not_matter_is_passed_over(tmp_path):
    base, adapter, expected = made_by_peft(tmp_path, "llama_tied", target_modules=["q_proj"], ensure_weight_tying=True)
    assert tiny_models.difference(ours(base, adapter), expected) < 1e-4


def test_the_tokenizer_is_asked_for_when_it_is_used(tmp_path):
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS["llama2"])
    model = load(base)
    assert jax.tree.leaves(model(IDS))[0].shape == (*IDS.shape, 96)
    with pytest.raises(UserError, match="no usable tokenizer"):
        model.tokenizer  # noqa: B018
    with pytest.raises(UserError, match="no usable tokenizer"):
        model.generate(["hi"])


def test_the_source_says_whose_base_it_is(tmp_path):
    base, adapter, _ = made_by_peft(tmp_path, "llama2", init_lora_weights="pissa")
    source = open_source(base)
    changed = base_of_adapter(source, adapter)
    assert changed.base_of == adapter and changed.fingerprint != source.fingerprint
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.linalg.matrix_rank(source.read(name) - changed.read(name), tol=1e-4) == 4
    assert dataclasses.replace(changed, base_of="").config == source.config
