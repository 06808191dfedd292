"""PEFT both ways on tiny models: what is written here gives the same logits in peft, what peft writes loads here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.peft import adapter_config, adapter_tensors, read_adapter, read_spec, write_adapter
from tpu_tune.errors import UserError
from tpu_tune.models import Decoder, architecture
from tpu_tune.transforms import LoraConfig, QuantizeConfig, find_targets, quantize

# name -> (model, LoRA settings by our names)
SETTINGS = {
    "plain": ("llama2", {}),
    "embed_and_head": ("llama2", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embed_and_head_tied": ("llama_tied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embed_tied": ("llama_tied", {"target_modules": ["v_proj", "embed_tokens"]}),
    "save_head": ("llama2", {"modules_to_save": ["lm_head"]}),
    "save_embed_tied": ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "save_norm": ("llama2", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]}),
    "rslora": ("mistral_window", {"use_rslora": True, "target_modules": ["k_proj", "o_proj"]}),
    "dora": ("llama_biases", {"use_dora": True}),
    "dora_embed": ("llama_tied", {"use_dora": True, "target_modules": ["embed_tokens", "down_proj"]}),
    "dora_head_some_layers": (
        "llama2", {"use_dora": True, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "patterns": (
        "qwen3", {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5},
            "alpha_pattern": {"v_proj": 3.0, "layers.0.self_attn.q_proj": 1.0},
        },
    ),
    # Sorted, as PEFT writes them, the first key of each name is another one.
    "overlapping_patterns": (
        "qwen3", {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "q_proj": 2, r".*up_proj": 5, "layers.0.mlp.up_proj": 3},
            "alpha_pattern": {"self_attn.v_proj": 3.0, r"layers\.\d+\.self_attn\.(q|v)_proj": 7.0, "q_proj": 1.0},
        },
    ),
    "overlapping_patterns_of_neox_head": (
        "neox_parallel", {
            "target_modules": ["dense", "embed_out", "embed_in"],
            "rank_pattern": {"embed_out": 6, "embed.*": 2}, "alpha_pattern": {"embed_(in|out)": 3.0},
        },
    ),
    "some_layers": (
        "qwen2_upper_windows",
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
    ),
    "regex": ("llama2", {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"}),
    "bias_all": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias_lora_only": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "tokens": ("llama2", {"trainable_token_indices": [89, 3, 62]}),
    "tokens_tied": ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [89, 3, 62]}),
    "tokens_of_embed_and_head": (
        "llama2", {"trainable_token_indices": {"embed_tokens": [4, 89], "lm_head": [89, 5, 6]}},
    ),
    "tokens_of_head_tied": ("llama_tied", {"trainable_token_indices": {"lm_head": [4, 89]}}),
    "tokens_tied_twice": ("qwen2", {"trainable_token_indices": {"embed_tokens": [4, 89], "lm_head": [4, 89]}}),
    "tokens_tied_differing": ("llama_tied", {"trainable_token_indices": {"embed_tokens": [4, 89], "lm_head": [89, 5]}}),
    "tokens_and_adapted_head": (
        "llama2", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [4, 89]},
    ),
    "tokens_and_saved_head": (
        "llama2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [4, 89]},
    ),
    "neox_tokens": ("neox_parallel", {"target_modules": ["dense"], "trainable_token_indices": [4, 89]}),
    "neox_tokens_tied": ("neox_full_rotary", {"target_modules": ["dense"], "trainable_token_indices": [4, 89]}),
    "neox_tokens_of_head": (
        "neox_parallel",
        {"target_modules": ["dense"], "trainable_token_indices": {"embed_in": [4, 89], "embed_out": [3]}},
    ),
    "neox": ("neox_parallel", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
    "neox_bias": ("neox_sequential", {"target_modules": ["query_key_value"], "bias": "all"}),
}  # fmt: skip
IDS = tiny_models.input_ids("peft", 2, 10)


def spec_of(settings):
    return LoraConfig(
        rank=settings.get("rank", 4), alpha=12.0, **{key: value for key, value in settings.items() if key != "rank"}
    )


def randomized(tree, arch):
    """Give every trained leaf a random value that matters, zero padding of short ranks kept."""
    random = np.random.default_rng(7)
    moved = {}
    for path, leaf in tree.items():
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        if path.endswith(".lora_A"):
            moved[path] = (
                noise * 0.3 * (np.asarray(leaf) != 0).any(-2, keepdims=True) if "embed" not in path else noise * 0.3
            )
        elif path.endswith(".lora_B"):
            pad = (np.asarray(tree[path[:-1] + "A"]) != 0).any(-2)[..., None] if "embed" not in path else 1.0
            moved[path] = noise * 0.2 * pad
        else:
            moved[path] = np.asarray(leaf) * (1 + 0.2 * noise) + (0.2 * noise if path.endswith("bias") else 0)
    return jax.tree.map(jnp.asarray, moved)


def trained(case, settings, policy=None):
    """Return (config, architecture, base params, targets, trainable, logits) with a random adapter."""
    config = tiny_models.CONFIGS[case]
    arch, params = tiny_models.load(config)
    if policy is not None:
        params = quantize(params, arch.modules(), policy)
    targets = find_targets(arch.modules(), spec_of(settings), arch.default_targets)
    trainable, frozen = targets.split(params, targets.init(params, jax.random.key(0)))
    trainable = randomized(trainable, arch)
    return config, arch, params, targets, trainable, logits(arch, targets.combine(trainable, frozen))


def logits(arch, params):
    return np.asarray(jax.jit(lambda params: Decoder(arch, params)(jnp.asarray(IDS, jnp.int32)))(params))


def peft_logits(base, adapter):
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    return tiny_models.torch_logits(
        peft.PeftModel.from_pretrained(tiny_models.torch_model(base), str(adapter)).eval(), IDS
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_ours_in_peft_and_back(name, tmp_path):
    case, settings = SETTINGS[name]
    config, arch, params, targets, trainable, ours = trained(case, settings)
    base = tiny_models.write(tmp_path / "base", config)
    assert tiny_models.difference(logits(arch, params), ours) > 1e-2  # the adapter does something
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, base, params)
    spec, back = read_adapter(str(tmp_path / "adapter"), arch)
    again = find_targets(arch.modules(), spec, arch.default_targets)
    assert back.keys() == trainable.keys()
    for path, leaf in trainable.items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)
    np.testing.assert_array_equal(logits(arch, again.combine(*again.split(params, back))), ours)
    assert tiny_models.difference(ours, peft_logits(base, tmp_path / "adapter")) < 1e-4


# peft calls NeoX's head lm_head, and what it writes of overlapping patterns it reads otherwise: it sorts them.
OURS_ONLY = (
    "dora_head_some_layers", "some_layers", "neox_tokens_of_head", "overlapping_patterns",
    "overlapping_patterns_of_neox_head",
)  # fmt: skip
PEFT_MADE = [name for name in SETTINGS if name not in OURS_ONLY] + ["all_linear"]


@pytest.mark.parametrize("name", PEFT_MADE)
@pytest.mark.filterwarnings("ignore")
def test_peft_s_adapter_loads_here(name, tmp_path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    case, settings = SETTINGS.get(name, ("neox_parallel", {}))
    settings = {"target_modules": "all-linear", **settings}
    base = tiny_models.write(tmp_path / "base", tiny_models.CONFIGS[case])
    model = peft.get_peft_model(
        tiny_models.torch_model(base), peft.LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    noise * 0.3
                    if ".lora_A" in path or ".lora_B" in path or "lora_emb" in path
                    else parameter * (1 + 0.2 * noise)
                )
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = tiny_models.torch_logits(model, IDS)
    arch, params = tiny_models.load(tiny_models.CONFIGS[case])
    spec, trainable = read_adapter(str(tmp_path / "adapter"), arch)
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    assert tiny_models.difference(logits(arch, targets.combine(*targets.split(params, trainable))), expected) < 1e-4
    count, _ = model.get_nb_trainable_parameters()
    shorter = {f"{t.module.path}.{part}" for t in targets.adapted for part in ("lora_A", "lora_B")}
    ours = sum(leaf.size for path, leaf in trainable.items() if path not in shorter)
    assert count == ours + sum(target.num_parameters for target in targets.adapted)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_over_nf4_works_over_the_exported_base(tmp_path):
    policy = QuantizeConfig("nf4", group_size=16)
    config, arch, params, targets, trainable, ours = trained("llama_tied", {}, policy)
    write_model_of(tmp_path / "base", params, config, arch)
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, str(tmp_path / "base"), params)
    assert tiny_models.difference(ours, peft_logits(str(tmp_path / "base"), tmp_path / "adapter")) < 1e-4


def write_model_of(directory, params, config, arch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    write_model(
        str(directory), params, dataclasses.replace(tiny_models.source(config), load_tokenizer=lambda: tokenizer), arch
    )


@pytest.mark.parametrize("name", ["patterns", "overlapping_patterns", "overlapping_patterns_of_neox_head"])
def test_patterns_mean_the_same_in_any_order(name, tmp_path):
    """PEFT, `json.dumps(sort_keys=True)` and what else writes the file again may order its keys anew."""
    config, arch, params, targets, trainable, _ = trained(*SETTINGS[name])
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, "base", params)
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    for order in (sorted, lambda keys: sorted(keys, reverse=True), lambda keys: sorted(keys, key=len)):
        for table in ("rank_pattern", "alpha_pattern"):
            content[table] = {key: content[table][key] for key in order(content[table])}
        file.write_text(json.dumps(content))
        spec, back = read_adapter(str(tmp_path / "adapter"), arch)
        again = find_targets(arch.modules(), spec, arch.default_targets)
        assert [(one.ranks, one.scales) for one in again.adapted] == [
            (one.ranks, one.scales) for one in targets.adapted
        ]
        for path, leaf in trainable.items():
            np.testing.assert_array_equal(back[path], leaf, err_msg=path)


def test_patterns_without_overlap_are_written_as_they_were_given(tmp_path):
    _, arch, _, targets, _, _ = trained(*SETTINGS["patterns"])
    assert adapter_config(targets, "base", arch)["rank_pattern"] == SETTINGS["patterns"][1]["rank_pattern"]


def test_padding_of_short_ranks_never_reaches_a_file():
    _, arch, params, targets, trainable, _ = trained(*SETTINGS["patterns"])
    shapes = {
        name.split("model.layers.")[1]: value.shape for name, value in adapter_tensors(trainable, targets, arch).items()
    }
    assert shapes["0.self_attn.q_proj.lora_A.weight"] == (2, 32)
    assert shapes["0.mlp.up_proj.lora_A.weight"] == (4, 32) and shapes["1.mlp.up_proj.lora_A.weight"] == (5, 32)


@pytest.fixture
def written(tmp_path):
    _, arch, params, targets, trainable, _ = trained("llama2", {"target_modules": ["q_proj"]})
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, "base", params)
    return tmp_path / "adapter", arch


def edit(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
    ],
)
def test_a_setting_that_is_not_implemented_is_refused_by_name(written, key, value):
    directory, arch = written
    edit(directory, **{key: None})
    read_adapter(str(directory), arch)
    edit(directory, **{key: value})
    with pytest.raises(UserError, match=f"'{key}' is set and not implemented"):
        read_adapter(str(directory), arch)


def test_unknown_keys_are_ignored_where_they_are_off(written):
    directory, arch = written
    edit(directory, some_future_switch=False, another=None, third={}, revision="main", auto_mapping=None)
    read_adapter(str(directory), arch)


def test_broken_adapters_are_named(written, tmp_path):
    directory, arch = written
    with pytest.raises(UserError, match="there is no such file"):
        read_spec(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has shape .* the base model asks for"):
        read_adapter(str(directory), architecture({**tiny_models.CONFIGS["llama2"], "hidden_size": 48}))
    edit(directory, target_modules=["q_proj", "v_proj"])
    with pytest.raises(UserError, match="v_proj.lora_A.weight' is missing"):
        read_adapter(str(directory), arch)
    edit(directory, target_modules=["q_proj"], layers_to_transform=[0])
    with pytest.raises(UserError, match="tensors do not belong to a LoRA of this model.*layers.1"):
        read_adapter(str(directory), arch)
    edit(directory, peft_type="IA3")
    with pytest.raises(UserError, match="peft_type is IA3"):
        read_adapter(str(directory), arch)
    (directory / "adapter_model.safetensors").write_bytes(b"12")
    edit(directory, peft_type="LORA")
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(str(directory), arch)
