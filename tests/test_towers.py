"""Multimodal models opened as their text model: torch's transformers and peft, on the whole model, are the judges."""

import json
import pathlib
import shutil
import warnings

import helpers_training as helpers
import ml_dtypes
import numpy as np
import pytest
import tiny_models
import tiny_wrappers
from safetensors.numpy import load_file, save_file
from test_peft import randomized

import tpu_tune
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.peft import write_adapter
from tpu_tune.checkpoints.vocabulary import with_vocabulary
from tpu_tune.cli import main
from tpu_tune.errors import UserError
from tpu_tune.inference.inspection import inspect_model
from tpu_tune.inference.push import PushRequest, prepared
from tpu_tune.models import WRAPPERS, architecture, text_config
from tpu_tune.models.wrappers import TEXT_DEFAULTS
from tpu_tune.transforms import LoraConfig, find_targets

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IDS = np.random.default_rng(3).integers(3, 88, (2, 12))
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the directory of a case's model, made once; what is not language is stored in bfloat16."""
    made = {}

    def directory(case):
        if case not in made:
            made[case] = pathlib.Path(tiny_wrappers.save(case, tmp_path_factory.mktemp(case) / "model"))
            file = made[case] / "model.safetensors"
            tensors = load_file(file)
            for name in not_text(made[case]):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
            save_file(tensors, file, metadata={"format": "pt"})
        return made[case]

    return directory


def not_text(directory):
    """Return the names of the tensors that are no language model's, found without our own table."""
    names = load_file(directory / "model.safetensors")
    return [name for name in names if any(part in name for part in ("vis", "proj", "audio", "connector", "newline"))
            and not any(part in name for part in ("language_model.", "text_model.", "model.layers."))]  # fmt: skip


def opened(directory):
    """Return (source, architecture, tree)."""
    source = open_huggingface(str(directory))
    arch = open_architecture(source)
    return source, arch, load_params(source, arch)


def adapted(directory, **settings):
    """Return (source, architecture, tree, targets, trained leaves) with a random adapter."""
    import jax

    source, arch, params = opened(directory)
    spec = LoraConfig(**{"rank": 4, "alpha": 12.0, "target_modules": "all-linear", **settings})
    targets = find_targets(arch.modules(), spec, arch.default_targets)
    trainable, _ = targets.split(params, targets.init(params, jax.random.key(0)))
    return source, arch, params, targets, randomized(trainable, arch)


def logits(arch, params):
    return tiny_models.logits(arch, params, IDS)


def torch_logits(model):
    return tiny_models.torch_logits(model, IDS)


def with_peft(case, base, adapter):
    """Load an adapter onto the whole multimodal model; nothing of it may be missing."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(tiny_wrappers.opened(case, base), str(adapter)).eval()
    assert not [warning for warning in said if "missing adapter keys" in str(warning.message)]
    return model


@pytest.mark.parametrize("case", tiny_wrappers.CASES)
def test_text_logits_are_the_whole_models(case, saved):
    _, arch, params = opened(saved(case))
    paths = [module.path for module in arch.modules()]
    model = tiny_wrappers.opened(case, saved(case))
    assert tiny_models.difference(logits(arch, params), torch_logits(model)) < 1e-4
    names = {*dict(model.named_modules()), *model.state_dict()}
    assert all(name in names for module in arch.modules() for name in module.names()), paths


@pytest.mark.slow
@pytest.mark.parametrize("case", tiny_wrappers.MORE)
def test_text_logits_of_further_wrappers(case, saved):
    test_text_logits_are_the_whole_models(case, saved)


def test_every_wrapper_whose_text_model_is_known_has_a_case():
    tested = {name.removesuffix("_tied") for name in tiny_wrappers.CASES | tiny_wrappers.MORE}
    # A family that makes one of these known wants a case in tiny_wrappers.
    for kind in WRAPPERS.keys() - tested:
        with pytest.raises(UserError, match=f"'{kind}' wraps the text model '.*', which is not known"):
            architecture({"model_type": kind})


@pytest.mark.parametrize("case", tiny_wrappers.CASES)
def test_an_adapter_from_here_on_the_whole_model(case, saved, tmp_path):
    """peft loads it onto the multimodal class, touches nothing but language, and what it saves loads here again."""
    _, arch, params, targets, trainable = adapted(saved(case))
    ours = logits(arch, targets.combine(*targets.split(params, trainable)))
    assert tiny_models.difference(logits(arch, params), ours) > 1e-2
    write_adapter(str(tmp_path / "ours"), trainable, targets, arch, str(saved(case)))
    model = with_peft(case, saved(case), tmp_path / "ours")
    assert tiny_models.difference(ours, torch_logits(model)) < 1e-4
    touched = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert touched == {f"base_model.model.{name}" for target in targets.adapted for name in target.names}
    model.save_pretrained(tmp_path / "theirs")
    again = tpu_tune.load(str(saved(case)), adapter=str(tmp_path / "theirs"))
    assert tiny_models.difference(np.asarray(again(IDS)), ours) < 1e-6


@pytest.mark.parametrize("case", tiny_wrappers.CASES)
def test_a_merged_model_keeps_the_rest_bit_for_bit(case, saved, tmp_path):
    source, arch, params, targets, trainable = adapted(saved(case))
    tree = targets.combine(*targets.split(params, trainable))
    write_model(str(tmp_path / "merged"), tree, source, arch, shard_bytes=30000)
    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 1
    after = {name: value for file in files for name, value in load_file(file).items()}
    before = load_file(saved(case) / "model.safetensors")
    assert after.keys() == before.keys()
    assert len(not_text(saved(case))) > 5
    for name in not_text(saved(case)):
        assert after[name].dtype == before[name].dtype and after[name].tobytes() == before[name].tobytes(), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["model_type"] == json.loads((saved(case) / "config.json").read_text())["model_type"]
    ours = logits(arch, tree)
    assert tiny_models.difference(ours, torch_logits(tiny_wrappers.opened(case, tmp_path / "merged"))) < 1e-4
    assert tiny_models.difference(logits(*opened(tmp_path / "merged")[1:]), ours) < 1e-5


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gemma3", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("mistral3", {"target_modules": ["q_proj", "lm_head"], "rank_pattern": {"lm_head": 2}}),
        ("mistral3_tied", {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]}),
        ("mistral3", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
        ("llava", {"target_modules": r".*\.(q_proj|fc1)", "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
        ("qwen3_vl", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
        ("qwen3_vl", {"target_modules": "all-linear", "exclude_modules": ["o_proj"], "use_dora": True}),
        ("qwen2_5_vl", {"target_modules": ["k_proj"], "trainable_token_indices": [5, 7], "bias": "lora_only"}),
    ],
)
def test_adapter_settings_mean_the_same_on_the_whole_model(case, settings, saved, tmp_path):
    source, arch, params, targets, trainable = adapted(saved(case), **settings)
    tree = targets.combine(*targets.split(params, trainable))
    ours = logits(arch, tree)
    write_adapter(str(tmp_path / "ours"), trainable, targets, arch, str(saved(case)), params)
    model = peft.PeftModel.from_pretrained(tiny_wrappers.opened(case, saved(case)), str(tmp_path / "ours")).eval()
    assert tiny_models.difference(ours, torch_logits(model)) < 1e-4
    again = tpu_tune.load(str(saved(case)), adapter=str(tmp_path / "ours"))
    assert tiny_models.difference(np.asarray(again(IDS)), ours) < 1e-6
    write_model(str(tmp_path / "merged"), tree, source, arch)
    assert tiny_models.difference(ours, torch_logits(tiny_wrappers.opened(case, tmp_path / "merged"))) < 1e-4


def made_by_peft(case, base, directory, trained="language_model", **settings):
    """Save an adapter that peft made on the whole model, random where `trained` is in a name; return its logits."""
    config = peft.LoraConfig(r=4, lora_alpha=8, **settings)
    model = peft.get_peft_model(tiny_wrappers.opened(case, base), config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and trained in name:
                value.copy_(torch.randn(value.shape, generator=random) * 0.3)
    model.save_pretrained(directory)
    return torch_logits(model.eval())


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj", "fc1"], "all-linear", r".*language_model.*\.(q_proj|up_proj)"]
)
@pytest.mark.parametrize("case", ["gemma3", "mistral3"])
def test_an_adapter_that_peft_made_on_the_whole_model(case, targets, saved, tmp_path):
    """What peft puts on the vision tower stays zero in training on text, and is no obstacle, for training on too."""
    theirs = made_by_peft(case, saved(case), tmp_path / "theirs", target_modules=targets)
    model = tpu_tune.load(str(saved(case)), adapter=str(tmp_path / "theirs"))
    assert tiny_models.difference(np.asarray(model(IDS)), theirs) < 1e-4
    spec, trained = tpu_tune.checkpoints.peft.read_adapter(str(tmp_path / "theirs"), model.architecture)
    assert trained and all("language_model" in path for path in trained) and spec.rank == 4


def test_an_adapter_trained_on_images_is_used_for_text_and_not_trained_on(saved, tmp_path, caplog):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    theirs = made_by_peft("llava", saved("llava"), tmp_path / "theirs", trained="", **settings)
    model = tpu_tune.load(str(saved("llava")), adapter=str(tmp_path / "theirs"))
    assert tiny_models.difference(np.asarray(model(IDS)), theirs) < 1e-4
    assert "were trained outside the text model" in caplog.text
    with pytest.raises(UserError, match="trained outside the text model.*not trained on"):
        tpu_tune.checkpoints.peft.read_adapter(str(tmp_path / "theirs"), model.architecture)


@pytest.mark.parametrize("place", ["language_model.model.", "model.", "model.language_model."])
@pytest.mark.parametrize("by", ["ends", "full", "regex"])
def test_adapters_made_on_another_class_of_the_model(place, by, saved, tmp_path):
    """Before transformers 4.52 the text model lay elsewhere, and peft can have been used on the text model alone."""
    _, arch, params, targets, trainable = adapted(saved("mistral3"), target_modules=["q_proj", "lm_head"])
    ours = logits(arch, targets.combine(*targets.split(params, trainable)))
    write_adapter(str(tmp_path / "adapter"), trainable, targets, arch, "base")
    head = "language_model.lm_head" if place == "language_model.model." else "lm_head"

    def moved(name):
        return name.replace("model.language_model.", place, 1).replace("lm_head", head)

    file, settings = tmp_path / "adapter/adapter_model.safetensors", tmp_path / "adapter/adapter_config.json"
    tensors = {name.replace("base_model.model.", "base_model.model;"): value for name, value in load_file(file).items()}
    save_file({moved(name).replace(";", "."): value for name, value in tensors.items()}, file)
    names = [f"{place}layers.{layer}.self_attn.q_proj" for layer in (0, 1)] + [head]
    written = {
        "ends": ["q_proj", "lm_head"],
        "full": names,
        "regex": "|".join(name.replace(".", r"\.") for name in names),
    }
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "target_modules": written[by]}))
    again = tpu_tune.load(str(saved("mistral3")), adapter=str(tmp_path / "adapter"))
    np.testing.assert_array_equal(np.asarray(again(IDS)), ours)


@pytest.mark.parametrize("place", ["language_model.model.", "model.language_model.", "model.", "language_model."])
@pytest.mark.parametrize("case", ["gemma3", "mistral3"])
def test_wherever_the_files_have_the_text_model(place, case, saved, tmp_path):
    tensors = load_file(saved(case) / "model.safetensors")
    shutil.copytree(saved(case), tmp_path / "moved")
    moved = {name.replace("language_model.model.", place): value for name, value in tensors.items()}
    moved = {
        name if place[0] == "l" else name.removeprefix("language_model.lm_"): value for name, value in moved.items()
    }
    moved = {"lm_head.weight" if name == "head.weight" else name: value for name, value in moved.items()}
    extra = {"mtp.layers.0.mlp.up_proj.weight": np.ones((2, 2), np.float32)}
    save_file(moved | extra, tmp_path / "moved/model.safetensors")
    source, arch, params = opened(tmp_path / "moved")
    assert arch == opened(saved(case))[1]
    np.testing.assert_array_equal(logits(arch, params), logits(arch, opened(saved(case))[2]))
    write_model(str(tmp_path / "written"), params, source, arch)
    written = load_file(tmp_path / "written/model.safetensors")
    assert written.keys() == (moved | extra).keys()


def test_the_head_for_further_tokens_goes_into_a_merged_model(saved, tmp_path):
    """Qwen3.5's files have one, which transformers does not load."""
    shutil.copytree(saved("qwen3_5"), tmp_path / "more")
    head = {"mtp.layers.0.mlp.up_proj.weight": np.arange(4, dtype=np.float32).reshape(2, 2)}
    save_file(load_file(saved("qwen3_5") / "model.safetensors") | head, tmp_path / "more/model.safetensors")
    source, arch, params = opened(tmp_path / "more")
    write_model(str(tmp_path / "written"), params, source, arch)
    written = load_file(tmp_path / "written/model.safetensors")
    before = load_file(tmp_path / "more/model.safetensors")
    assert written.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(written[name], value)


def test_a_tensor_of_the_text_model_that_has_no_place_is_refused(saved, tmp_path):
    shutil.copytree(saved("gemma3"), tmp_path / "more")
    tensors = load_file(saved("gemma3") / "model.safetensors")
    tensors["language_model.model.layers.0.self_attn.sinks"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "more/model.safetensors")
    with pytest.raises(UserError, match="1 tensors are not part of a gemma3_text model: language_model.*sinks"):
        opened(tmp_path / "more")


@pytest.mark.parametrize("case", ["mistral3", "mistral3_tied", "gemma3"])
@pytest.mark.parametrize("outside", [True, False, None])
@pytest.mark.parametrize("inside", [True, False, None])
def test_the_head_is_tied_where_the_files_have_none(case, outside, inside, saved, tmp_path):
    """Whatever the config says of it, in either place, as long as it does not deny it outright."""
    shutil.copytree(saved(case), tmp_path / "model")
    config = json.loads((saved(case) / "config.json").read_text())
    for place, value in ((config, outside), (config["text_config"], inside)):
        place.pop("tie_word_embeddings", None)
        place |= {} if value is None else {"tie_word_embeddings": value}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    tied = case != "mistral3"
    if tied and outside is False and not inside:
        with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
            opened(tmp_path / "model")
        return
    _, arch, params = opened(tmp_path / "model")
    assert arch.tied == tied
    np.testing.assert_array_equal(logits(arch, params), logits(*opened(saved(case))[1:]))


@pytest.mark.parametrize("family", TEXT_DEFAULTS)
def test_what_a_text_config_leaves_out_is_what_transformers_takes(family):
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(family)
    for key, value in TEXT_DEFAULTS[family].items():
        assert (theirs.rope_parameters if key == "rope_theta" else theirs.to_dict())[key] == value, key


def test_a_vocabulary_that_stands_outside_of_the_text_config():
    config = {"model_type": "llava", "vocab_size": 77, "text_config": {"model_type": "llama", "hidden_size": 64}}
    assert architecture(config).vocab_size == 77
    grown = with_vocabulary(config, 80)
    assert grown["vocab_size"] == grown["text_config"]["vocab_size"] == 80
    bare = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "sliding_window": 1024}}
    assert architecture(bare).vocab_size == 262208
    grown = with_vocabulary(bare, 262300)
    assert architecture(grown).vocab_size == 262300 and "vocab_size" not in grown


def test_qwen2_vl_without_a_text_config():
    """Its first files have the text model's keys among the wrapper's."""
    text = {**tiny_wrappers.TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "rope_theta": 20000.0}
    flat = {"model_type": "qwen2_vl", **text, "vision_config": {"hidden_size": 16}, "tie_word_embeddings": True}
    nested = {"model_type": "qwen2_vl", "text_config": text, "tie_word_embeddings": True}
    assert architecture(flat) == architecture(nested)
    assert architecture(flat).layer_kinds[0].rope.kind == "default"
    assert text_config(flat)["model_type"] == "qwen2"


def test_a_class_of_the_text_model_alone_has_plain_names():
    config = {"model_type": "mistral3", "text_config": {"model_type": "mistral", **tiny_wrappers.TEXT}}
    assert architecture(config).names.layers == "model.language_model.layers"
    assert architecture({**config, "architectures": ["MistralForCausalLM"]}).names.layers == "model.layers"


def test_unknown_model_types_name_the_nearest():
    with pytest.raises(UserError, match="'gemma3n' is not known.*did you mean 'gemma3'"):
        architecture({"model_type": "gemma3n"})
    with pytest.raises(
        UserError, match="'new_vl' is not known.*it wraps a 'qwen3' model; the known wrappers are gemma3"
    ):
        architecture({"model_type": "new_vl", "text_config": {"model_type": "qwen3"}})
    with pytest.raises(UserError, match="'text_config' is 'llama'; it must be an object or null"):
        architecture({"model_type": "llava", "text_config": "llama"})


def test_inspect_says_what_is_left_aside(saved, capsys):
    facts = inspect_model(str(saved("gemma3")), LoraConfig())
    tensors = load_file(saved("gemma3") / "model.safetensors")
    for part in ("vision_tower", "multi_modal_projector"):
        sizes = [value.size for name, value in tensors.items() if name.startswith(part)]
        assert facts["left_aside"][part] == {"tensors": len(sizes), "parameters": sum(sizes)}
    assert main(["inspect", str(saved("gemma3"))]) == 0
    said = capsys.readouterr().out
    assert "left aside, and passed on unchanged by a merged export:\n  " in said
    assert "model.language_model.layers.N.self_attn.q_proj" in said


# A run from the first step to its exports.


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A Gemma 3 with a vision tower, and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    case = tiny_wrappers.CASES["gemma3"]
    # The pattern of layers is the one that llama.cpp has built in.
    text = {**case[1]["text_config"], "vocab_size": 300, "max_position_embeddings": 256, "sliding_window_pattern": 6}
    tokens = {"image_token_index": 297, "boi_token_index": 298, "eoi_token_index": 299}
    tiny_wrappers.CASES["words"] = ("Gemma3", {**case[1], "text_config": text, **tokens})
    try:
        tiny_wrappers.save("words", folder / "model")
    finally:
        words_case = tiny_wrappers.CASES.pop("words")
    assert words_case
    helpers._write_tokenizer(folder / "model")
    (folder / "model/preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return folder / "model"


def settings(words, folder, **keys):
    data = helpers.write_rows(words.parent / "rows.jsonl", 24)
    return helpers.make_config(
        **{
            "output_dir": str(folder / "out"), "model__path": str(words), "model__dtype": "float32", "lora__rank": 4,
            "lora__target_modules": "all-linear", "data__train": str(data), "data__num_workers": 1,
            "data__cache_dir": str(words.parent / "cache"), "data__max_length": 96, "train__max_steps": 4,
            "train__save_steps": 2,
            "train__per_device_train_batch_size": 1, "train__learning_rate": 1e-2, **keys,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """A finished run, stopped after two steps and resumed."""
    folder = tmp_path_factory.mktemp("run")
    tpu_tune.train(settings(words, folder, train__max_steps=2))
    tpu_tune.train(settings(words, folder))
    return folder / "out"


def test_a_run_is_used_merged_and_written_for_llama_cpp(run, words, tmp_path, capsys):
    trained = tpu_tune.load(str(words), adapter=str(run / "adapter"))
    ours = np.asarray(trained(IDS))
    model = peft.PeftModel.from_pretrained(tiny_wrappers.opened("gemma3", words), str(run / "adapter")).eval()
    assert tiny_models.difference(ours, torch_logits(model)) < 1e-4
    assert main(["generate", "--model", str(run), "--prompt", "a", "--no-chat", "--max-new-tokens", "2"]) == 0
    assert main(["export", str(run), "--merge", "--output", str(tmp_path / "merged")]) == 0
    assert tiny_models.difference(ours, torch_logits(tiny_wrappers.opened("gemma3", tmp_path / "merged"))) < 1e-4
    assert (tmp_path / "merged/preprocessor_config.json").read_bytes() == (
        words / "preprocessor_config.json"
    ).read_bytes()
    with prepared(str(run), PushRequest("me/seeing")) as (files, _):
        assert "AutoModelForImageTextToText.from_pretrained(base)" in files[0].content.decode()
    assert main(["export", str(run), "--gguf", "--output", str(tmp_path / "model.gguf")]) == 0
    out = tpu_tune.load(str(tmp_path / "model.gguf"))
    assert out.architecture.family == "gemma3_text" and not out.architecture.names.tower
    assert tiny_models.difference(np.asarray(out(IDS)), ours) < 2e-2


@pytest.mark.slow
def test_training_every_weight_and_new_tokens_leaves_the_rest_alone(words, tmp_path):
    tokens = [f"<{number}>" for number in range(50)]  # 42 rows of the embedding have no token yet
    tpu_tune.train(settings(words, tmp_path, method="full", train__max_steps=1, model__add_special_tokens=tokens))
    before, after = (load_file(place / "model.safetensors") for place in (words, tmp_path / "out/model"))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed and not changed & set(not_text(words))
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 308 and "vocab_size" not in config
    model = tiny_wrappers.opened("gemma3", tmp_path / "out/model")
    assert model.get_input_embeddings().weight.shape[0] == 308
