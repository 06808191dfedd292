"""GGUF files written here: read back by our reader and by the `gguf` package, the same model and the same tokenizer."""

import dataclasses
import json
import resource

import gguf
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from helpers_training import write_tiny_llama
from nasty_texts import TEXTS
from test_gguf_families import CASES, NOT_MODEL, WHOLE, transformers_config
from test_gguf_families import gguf_name as expected_name
from test_gguf_tokenizer import assert_equal
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.gguf_file import open_gguf_file
from tpu_tune.checkpoints.gguf_metadata import gguf_metadata
from tpu_tune.checkpoints.gguf_tokenizer import build_tokenizer
from tpu_tune.checkpoints.gguf_tokenizer_write import tokenizer_metadata
from tpu_tune.checkpoints.gguf_write import write_gguf
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.params import load_params
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.inference import model
from tpu_tune.models import architecture
from tpu_tune.transforms import merged_tensors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer of 40 tokens, fit for the smallest vocabulary here."""
    directory = write_tiny_llama(tmp_path_factory.mktemp("tokenizer") / "tiny")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["vocab"] = {chr(65 + index): index for index in range(38)} | {"</s>": 38, "<s>": 39}
    for token, index in zip(content["added_tokens"], (38, 39), strict=True):
        token["id"] = index
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


def in_memory(config, tensors, tokenizer):
    shapes = {name: value.shape for name, value in tensors.items()}
    return WeightSource("memory", config, shapes, tensors.__getitem__, lambda: tokenizer, "memory")


def write(path, source, kind="f16", **options):
    write_gguf(str(path), ((name, source.read(name)) for name in source.shapes), source, kind, **options)


def half(tensors):
    """Matrices that f16 holds exactly; vectors are float32 in GGUF anyway."""
    return {
        name: value.astype(np.float16).astype(np.float32) if value.ndim == 2 else value
        for name, value in tensors.items()
    }


def logits(source):
    arch = architecture(source.config)
    ids = [tiny_models.input_ids("gguf").astype(np.int32)] * (2 if arch.encoder else 1)
    return np.asarray(model.logits(arch, np.dtype("float32"), load_params(source, arch), *ids))


def head_of(source):
    """The head that a file holds, tied or not: llama.cpp scales no T5's states, and ties no GPT-NeoX's."""
    names = {
        "t5": ("lm_head.weight", "shared.weight"),
        "gpt_neox": ("embed_out.weight", "gpt_neox.embed_in.weight"),
    }.get(source.config["model_type"])
    return {names[0]: source.shapes[names[1]]} if names else {}


def zeros_of(source):
    """The biases without which llama.cpp opens no GPT-NeoX: zero where the model has none."""
    if source.config.get("attention_bias", True) or source.config["model_type"] != "gpt_neox":
        return {}
    at = "gpt_neox.layers.{}.attention.{}.bias".format
    sizes = {"query_key_value": 96, "dense": 32}
    return {at(layer, name): (size,) for layer in range(2) for name, size in sizes.items()}


# What GGUF cannot say is refused (see the test of that below).
EXPRESSIBLE = [
    "llama1", "llama2", "llama3", "llama3_parameters", "llama_linear", "llama_linear_parameters", "llama_tied",
    "llama_biases", "mistral_window", "mistral_no_window", "qwen2", "qwen3", "neox_parallel", "neox_sequential",
    "neox_full_rotary", "neox_parameters", "gpt2", "gemma", "gemma2", "gemma3", "phi", "phi3",
    "phi3_longrope_short", "phi3_longrope_long", "llama_yarn", "smollm3", "olmo2", "olmo3", "granite", "granite_biases",
    "glm", "glm4", "glm4_tied", "ministral3", "cohere", "cohere2", "seed_oss", "exaone4_no_window", "t5", "t5_gated",
    "neox_parallel_tied_here",
    "gemma4", "gemma4_wide", "gemma4_unified",
]  # fmt: skip


# What llama.cpp has built in and no key says.
BUILT_IN = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"sliding_window_pattern": 6, "num_hidden_layers": 7},
    "llama_yarn": {"rope_parameters": tiny_models._YARN},
    "glm": {"head_dim": 8},
    "olmo3": {"rope_scaling": {**tiny_models._YARN, "rope_theta": 500000.0}},
    "t5": {"relative_attention_max_distance": 128},
    "t5_gated": {"relative_attention_max_distance": 128, "num_decoder_layers": 1},
}


def expressible(name):
    tied = {"tie_word_embeddings": True} if name.endswith("_tied_here") else {}
    return {**tiny_models.CONFIGS[name.removesuffix("_tied_here")], **BUILT_IN.get(name, {}), **tied}


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_file_holds_the_same_model(tmp_path, tokenizer, name):
    """From the tree, as an export goes: exactly the same logits where f16 holds the weights exactly."""
    config = expressible(name)
    source = in_memory(config, half(tiny_models.weights(config)), tokenizer)
    arch = architecture(config)
    params = load_params(source, arch)
    write_gguf(str(tmp_path / "m.gguf"), merged_tensors(params, arch.modules()), source)
    back = open_gguf(tmp_path / "m.gguf")
    assert back.shapes == source.shapes | head_of(source) | zeros_of(source)
    for bias in zeros_of(source):
        assert not back.read(bias).any()
    # llama.cpp keeps Gemma's norms with the one added, which rounds what is below it.
    exact = not config["model_type"].startswith("gemma")
    for key in source.shapes:
        np.testing.assert_allclose(back.read(key), source.read(key), rtol=0, atol=0 if exact else 1.2e-7, err_msg=key)
    # A tied T5's head carries its scale in its weight, which f16 rounds to 11 bits: llama.cpp has no other place for it
    tolerance = 2**-11 if head_of(source).keys() - source.shapes.keys() else 0 if exact else 2e-6
    assert tiny_models.difference(logits(back), logits(source)) <= tolerance
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.filterwarnings("ignore")
def test_every_familys_file_reads_back(tmp_path, tokenizer, name):
    case = CASES[name]
    random = np.random.default_rng(0)
    tensors = {
        key: random.integers(-64, 64, shape).astype(np.float32) / 256 for key, shape in case.tensors.items()
    }  # exact in f16, and so that a norm's one can be added and taken away
    config = transformers_config(name).to_dict()
    if name == "flan-t5":  # what the published file says, and transformers 5 takes apart
        config["tie_word_embeddings"] = False
    source = in_memory(config, tensors, tokenizer)
    write(tmp_path / "m.gguf", source)
    back = open_gguf(tmp_path / "m.gguf")
    assert back.shapes == source.shapes | head_of(source)
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back.read(key), tensor, err_msg=key)
    from transformers import CONFIG_MAPPING

    if name == "t5":
        config["tie_word_embeddings"] = False  # as the file's own head, which is scaled already
        config.pop("scale_decoder_outputs")
    found, expected = (CONFIG_MAPPING[case.model_type](**one).to_dict() for one in (back.config, config))
    for key, value in expected.items():
        if not any(part in key for part in NOT_MODEL):
            assert found.get(key) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for key, tensor in tensors.items():
        stored = reader.pop(expected_name(case, key))
        value = np.ascontiguousarray(case.change(key, tensor))
        np.testing.assert_array_equal(np.asarray(stored.data, np.float32), value, err_msg=key)
        plain = value.ndim == 1 or stored.name == "position_embd.weight"
        assert stored.tensor_type.name == ("F32" if plain else "F16"), key
    assert set(reader) <= {"rope_factors_long.weight", "rope_factors_short.weight"} | (
        {"output.weight"} if name == "t5" else set()
    )


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_number_formats_as_the_gguf_package_reads_them(tmp_path, tokenizer, kind):
    config = tiny_models.CONFIGS["qwen3"] | {"intermediate_size": 64}
    source = in_memory(config, tiny_models.weights(config), tokenizer)
    write(tmp_path / "m.gguf", source, kind)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.file_type"].contents() == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]
    assert reader.fields["general.architecture"].contents() == "qwen3"
    stored = {tensor.name: tensor for tensor in reader.tensors}
    back = open_gguf(tmp_path / "m.gguf")
    names = {"model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight", "model.norm.weight": "output_norm.weight"}
    for key, name in (names | {"model.embed_tokens.weight": "token_embd.weight"}).items():
        value, tensor = source.read(key), stored[name]
        assert tensor.tensor_type.name == ("F32" if value.ndim == 1 else kind.upper())
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(value.shape)
        np.testing.assert_array_equal(back.read(key).astype(np.float32), found)
        if value.ndim == 1:
            np.testing.assert_array_equal(found, value)
        elif kind == "q8_0":
            blocks = np.abs(value.reshape(-1, 32))
            step = blocks.max(1, keepdims=True) / 127
            assert (np.abs((found - value).reshape(-1, 32)) <= step * 0.5 + blocks * 2**-10).all()
        else:
            rounded = value.astype({"f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind])
            np.testing.assert_array_equal(found, rounded.astype(np.float32))


def test_rows_that_make_no_blocks_become_f16(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["qwen3"] | {"intermediate_size": 40}
    write(tmp_path / "m.gguf", in_memory(config, tiny_models.weights(config), tokenizer), "q8_0")
    formats = {name: tensor.format.name for name, tensor in open_gguf_file(tmp_path / "m.gguf").tensors.items()}
    assert formats["blk.0.ffn_down.weight"] == "F16" and formats["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_mixture_of_formats_is_written_and_read(tmp_path, tokenizer):
    """Q4_K_M: the embedding is the tied head and has six bits; rows of 32 have no blocks of 256."""
    config = tiny_models.CONFIGS["llama_tied"] | {"hidden_size": 256, "intermediate_size": 32}
    source = in_memory(config, tiny_models.weights(config), tokenizer)
    write(tmp_path / "m.gguf", source, "q4_k_m")
    formats = {name: tensor.format.name for name, tensor in open_gguf_file(tmp_path / "m.gguf").tensors.items()}
    assert (formats["token_embd.weight"], formats["blk.0.ffn_up.weight"]) == ("Q6_K", "Q4_K")
    assert formats["blk.0.ffn_down.weight"] == "Q5_0" and formats["output_norm.weight"] == "F32"
    back = open_gguf(tmp_path / "m.gguf")
    for name in source.shapes:
        value = source.read(name)
        error = np.sqrt(np.mean((back.read(name).astype(np.float32) - value) ** 2))
        assert error < 0.1 * np.sqrt(np.mean(value**2)) + 1e-12, name


def test_an_untied_head_is_written_and_read(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["llama_tied"]
    tensors = half(tiny_models.weights(config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    source = in_memory(config, tensors, tokenizer)
    write(tmp_path / "m.gguf", source, untied=True)
    back = open_gguf(tmp_path / "m.gguf")
    assert back.config["tie_word_embeddings"] is False
    np.testing.assert_array_equal(back.read("lm_head.weight"), tensors["lm_head.weight"])
    gemma = CASES["gemma"]
    tensors = {name: np.zeros(shape, np.float32) for name, shape in gemma.tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = in_memory(transformers_config("gemma").to_dict(), tensors, tokenizer)
    with pytest.raises(UserError, match="ties the head of every gemma model"):
        write(tmp_path / "g.gguf", source, untied=True)
    assert not (tmp_path / "g.gguf").exists()


@pytest.mark.parametrize(
    ("tied", "scaled", "own"),
    [(True, True, False), (True, False, False), (False, False, True), (False, True, True), (True, None, False)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_t5s_head_is_what_the_unscaled_states_need(tmp_path, tokenizer, tied, scaled, own):
    """llama.cpp never scales T5's states: output.weight times them must be transformers' logits."""
    config = {**tiny_models.CONFIGS["t5"], **BUILT_IN["t5"], "tie_word_embeddings": tied}
    if scaled is not None:
        config["scale_decoder_outputs"] = scaled
    tensors = half(tiny_models.weights(config))
    assert ("lm_head.weight" in tensors) == own
    source = in_memory(config, tensors, tokenizer)
    write(tmp_path / "m.gguf", source, kind="bf16")
    back = open_gguf(tmp_path / "m.gguf")
    scale = 32**-0.5 if scaled in (True, None) else 1.0
    head = tensors["lm_head.weight" if own else "shared.weight"] * np.float32(scale)
    np.testing.assert_array_equal(back.read("lm_head.weight"), head.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert architecture(back.config).head_scale == 1.0 and not architecture(back.config).tied


def test_a_dense_granite_4_becomes_what_llama_cpp_calls_granite(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["granite4"]
    source = in_memory(config, half(tiny_models.weights(config)), tokenizer)
    write(tmp_path / "m.gguf", source)
    back = open_gguf(tmp_path / "m.gguf")
    assert back.config["model_type"] == "granite" and back.config["intermediate_size"] == 48
    fused = source.read("model.layers.1.shared_mlp.input_linear.weight")
    for part, expected in zip(("gate", "up"), np.split(fused, 2), strict=True):
        np.testing.assert_array_equal(back.read(f"model.layers.1.mlp.{part}_proj.weight"), expected)
    assert tiny_models.difference(logits(back), logits(source)) < 1e-6


@pytest.mark.parametrize("layers", [1, 2])
def test_a_t5_with_no_more_decoder_than_encoder_layers_is_written(layers):
    gguf_metadata({**tiny_models.CONFIGS["t5"], **BUILT_IN["t5"], "num_decoder_layers": layers})


# Tokenizers


@pytest.fixture(scope="module")
def hub_tokenizer(npm_tokenizer, text_dir):
    """Function from a name to (transformers' tokenizer, that of its tokenizer.json, rows of the model's embedding)."""

    def load(name):
        if name == "neox":
            backend = Tokenizer.from_file(str(text_dir / "20B_tokenizer.json"))
            words = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
            return PreTrainedTokenizerFast(tokenizer_object=backend, **words), backend, 50432
        rows = {"llama2": 32000, "llama3": 128256, "qwen3": 151936, "gemma3": 262144}[name]
        directory = npm_tokenizer(name)
        return AutoTokenizer.from_pretrained(directory), Tokenizer.from_file(str(directory / "tokenizer.json")), rows

    return load


@pytest.mark.parametrize(
    ("name", "kind", "pre"),
    [
        ("llama2", "llama", "default"),
        ("llama3", "gpt2", "llama-bpe"),
        ("qwen3", "gpt2", "qwen2"),
        ("gemma3", "llama", "default"),
        pytest.param("gemma3", "gemma4", "default", marks=pytest.mark.slow),
        ("neox", "gpt2", "mpt"),
    ],
)
def test_tokenizers_are_the_same_after_the_round_trip(hub_tokenizer, name, kind, pre):
    original, backend, rows = hub_tokenizer(name)
    metadata = tokenizer_metadata(original, rows, "gemma4" if kind == "gemma4" else "llama")
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == (kind, pre)
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.token_type"]) == rows
    rebuilt = build_tokenizer("a.gguf", metadata)
    assert_equal(rebuilt, backend)
    for text in ("a b", "", "</s>"):
        assert rebuilt(text).input_ids == original(text).input_ids  # with what is put round a text
    for role in ("bos", "eos", "pad"):
        assert getattr(rebuilt, f"{role}_token_id") == getattr(original, f"{role}_token_id")
    assert rebuilt.chat_template == original.chat_template


def test_a_t5_tokenizer_is_the_same_after_the_round_trip(text_dir, tmp_path):
    import sentencepiece

    lines = (text_dir / "t8.shakespeare.txt").read_text().splitlines()[200:1200]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=200,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 9999}')
    original = AutoTokenizer.from_pretrained(tmp_path)
    metadata = tokenizer_metadata(original, 320, "t5")
    assert metadata["tokenizer.ggml.model"] == "t5"
    rebuilt = build_tokenizer("a.gguf", metadata)
    for text in TEXTS:
        assert rebuilt(text).input_ids == original(text).input_ids, text
    assert rebuilt("<extra_id_7>").input_ids == [292, 1]


def test_a_gguf_sources_tokenizer_is_copied(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["llama2"]
    write(tmp_path / "a.gguf", in_memory(config, tiny_models.weights(config), tokenizer))
    write(tmp_path / "b.gguf", open_gguf(tmp_path / "a.gguf"))
    first, second = (open_gguf_file(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    assert first["tokenizer.chat_template"] == tokenizer.chat_template
    assert first["tokenizer.ggml.tokens"][:40] == tokenizer.convert_ids_to_tokens(range(40))
    assert first["tokenizer.ggml.tokens"][40] == "[PAD40]" and len(first["tokenizer.ggml.tokens"]) == 96
    for key, value in first.items():
        np.testing.assert_array_equal(second[key], value if key != "general.name" else "b", err_msg=key)


def test_a_tokenizer_without_merges_says_so(tmp_path, tokenizer):
    """llama.cpp opens none whose list of merges is missing; an empty one will do (tests/test_llama_cpp.py)."""
    config = tiny_models.CONFIGS["llama2"]
    write(tmp_path / "m.gguf", in_memory(config, tiny_models.weights(config), tokenizer))
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.merges"]
    assert field.types == [gguf.GGUFValueType.ARRAY] and not len(field.data)
    assert open_gguf_file(tmp_path / "m.gguf").metadata["tokenizer.ggml.merges"] == []
    assert open_gguf(tmp_path / "m.gguf").load_tokenizer()("AB").input_ids == tokenizer("AB").input_ids


def test_smollm2s_own_tokenizer_is_copied(smollm2_gguf, tmp_path):
    source = open_gguf(smollm2_gguf)
    small = {
        name: np.zeros((49152 if "embed" in name else 4, 4), np.float32) for name in ("model.embed_tokens.weight",)
    }
    write_gguf(str(tmp_path / "m.gguf"), small.items(), source)
    written, original = (open_gguf_file(path).metadata for path in (tmp_path / "m.gguf", smollm2_gguf))
    keys = [key for key in original if key.startswith("tokenizer.")]
    assert len(keys) > 8
    for key in keys:
        np.testing.assert_array_equal(written[key], original[key], err_msg=key)


def test_the_name_does_not_mislead_llama_cpp(tmp_path, tokenizer):
    """It treats special tokens by the words `phi-3` in a model's name, and fails where Phi 3's are missing."""
    config = tiny_models.CONFIGS["llama2"]
    write(tmp_path / "not-Phi3.gguf", in_memory(config, tiny_models.weights(config), tokenizer))
    assert open_gguf_file(tmp_path / "not-Phi3.gguf").metadata["general.name"] == "not-Phi 3"
    case = CASES["phi3"]
    tensors = {key: np.zeros(shape, np.float32) for key, shape in case.tensors.items()}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] += [
        content["added_tokens"][0] | {"id": index, "content": token}
        for index, token in ((1, "<unk>"), (2, "<|endoftext|>"))
    ]
    content["model"]["vocab"] = {key: index for key, index in content["model"]["vocab"].items() if index not in (1, 2)}
    content["model"]["vocab"] |= {"<unk>": 1, "<|endoftext|>": 2}
    phi = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    write(tmp_path / "mine.gguf", in_memory(transformers_config("phi3").to_dict(), tensors, phi))
    assert open_gguf_file(tmp_path / "mine.gguf").metadata["general.name"] == "Phi-3 mine"


def test_a_tokenizer_that_gguf_cannot_express_is_refused(tokenizer):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="GGUF knows no tokenizer of the kind WordLevel"):
        tokenizer_metadata(words, 8, "llama")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Lowercase"}
    lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(UserError, match="GGUF has no name for how this tokenizer cuts text"):
        tokenizer_metadata(lower, 40, "llama")
    with pytest.raises(UserError, match="has 40 tokens and the model's embedding 39 rows"):
        tokenizer_metadata(tokenizer, 39, "llama")


# Refusals


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "gptj"},
            "no GGUF is written of a 'gptj' model .*written: cohere, cohere2.*--merge",
        ),
        ({"model_type": "opt"}, "no GGUF is written of a 'opt' model"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "cannot express hidden_act='gelu' of a llama model"),
        (tiny_models.CONFIGS["llama_dynamic"], "rope_type 'dynamic' is not written"),
        (tiny_models.CONFIGS["nanochat"], "no GGUF is written of a 'nanochat' model"),
        (tiny_models.CONFIGS["qwen3_5"], "no GGUF is written of a 'qwen3_5_text' model"),
        (tiny_models.CONFIGS["qwen3_yarn"], r"yarn's attention factor 1\.4 \(llama.cpp has 1\.13863 built in\)"),
        (tiny_models.CONFIGS["llama_yarn"], "yarn's attention factor"),
        (tiny_models.CONFIGS["olmo3"], "yarn with truncate=false"),
        (tiny_models.CONFIGS["olmo3_parameters"], "cannot express tie_word_embeddings=True"),
        (
            {**tiny_models.CONFIGS["olmo3_parameters"], "tie_word_embeddings": False},
            "cannot express rope_theta=5000.0 of a olmo3",
        ),
        (tiny_models.CONFIGS["smollm3_windows"], "cannot express use_sliding_window=True"),
        ({**tiny_models.CONFIGS["smollm3"], "no_rope_layers": [1, 0, 1, 1]}, "cannot express no_rope_layers"),
        (tiny_models.CONFIGS["granite4_no_positions"], "cannot express position_embedding_type=None"),
        (tiny_models.CONFIGS["ministral3_window"], "cannot express sliding_window=5"),
        (tiny_models.CONFIGS["cohere_untied"], "cannot express attention_bias=True of a cohere model"),
        (tiny_models.CONFIGS["cohere2_untied"], "cannot express attention_bias=True of a cohere2 model"),
        (tiny_models.CONFIGS["seed_oss_biases"], "cannot express mlp_bias=True"),
        (tiny_models.CONFIGS["exaone4"], "cannot express sliding_window=5 of a exaone4 model"),
        (tiny_models.CONFIGS["glm"], r"cannot express head_dim=16 of a glm model \(llama.cpp has None or 8 built in\)"),
        ({**tiny_models.CONFIGS["exaone4_no_window"], "head_dim": 16}, "cannot express head_dim=16 of a exaone4"),
        ({**tiny_models.CONFIGS["seed_oss"], "attention_out_bias": True}, "cannot express attention_out_bias=True"),
        ({**tiny_models.CONFIGS["smollm3"], "attention_bias": True}, "cannot express attention_bias=True of a smollm3"),
        ({**tiny_models.CONFIGS["smollm3"], "mlp_bias": True}, "cannot express mlp_bias=True of a smollm3 model"),
        ({**tiny_models.CONFIGS["qwen3"], "attention_bias": True}, "cannot express attention_bias=True of a qwen3"),
        (tiny_models.CONFIGS["gemma4_alike"], "cannot express biases or another activation in a Gemma 4"),
        (
            {**tiny_models.CONFIGS["gemma4"], "layer_types": ["full_attention"] * 6},
            "cannot express a Gemma 4 without windows",
        ),
        (tiny_models.CONFIGS["qwen2_upper_windows"], "cannot express use_sliding_window=True"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 100}, "query_pre_attn_scalar=100 of a gemma2 model"),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, "without final_logit_softcapping"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, "cannot express layer_types"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm=True"),
        ({"model_type": "t5", "feed_forward_proj": "gated-silu"}, "feed_forward_proj='gated-silu'"),
        (
            {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 3},
            r"more decoder layers \(3\) than encoder layers \(2\)",
        ),
    ],
)
def test_what_gguf_cannot_express_is_named(config, says):
    with pytest.raises(UserError, match=says) as error:
        gguf_metadata(config)
    assert "\n" not in str(error.value)


def test_a_weight_beyond_f16_is_named(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["llama2"]
    tensors = tiny_models.weights(config)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    source = in_memory(config, tensors, tokenizer)
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has values beyond 65504.*bf16"):
        write(tmp_path / "m.gguf", source)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "m.gguf", source, "bf16")


def test_a_tensor_without_a_place_is_named(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["llama2"]
    tensors = tiny_models.weights(config) | {"model.layers.0.extra.weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(UserError, match=r"model\.layers\.0\.extra\.weight has no place in a GGUF file"):
        write(tmp_path / "m.gguf", in_memory(config, tensors, tokenizer))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_full_disk_leaves_nothing_but_the_old_file(tmp_path, tokenizer, late):
    """Both while the tensors are collected and while the file is put together."""
    config = tiny_models.CONFIGS["llama2"]
    source = in_memory(config, tiny_models.weights(config), tokenizer)
    write(tmp_path / "m.gguf", source)
    before = (tmp_path / "m.gguf").read_bytes()
    room = len(before) - 1_000 if late else 2_000  # the tensors alone fit, or do not
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
    try:
        with pytest.raises(UserError, match=r"m\.gguf cannot be written: File too large"):
            write(tmp_path / "m.gguf", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "m.gguf").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_path_that_cannot_be_written(tmp_path, tokenizer):
    config = tiny_models.CONFIGS["llama2"]
    source = in_memory(config, tiny_models.weights(config), tokenizer)
    with pytest.raises(UserError, match=r"none/m\.gguf cannot be written: No such file or directory"):
        write(tmp_path / "none" / "m.gguf", source)


def test_a_hugging_face_directory_becomes_a_gguf_file(tmp_path):
    """From files, with the tokenizer's own ids for beginning and end."""
    directory = write_tiny_llama(tmp_path / "tiny")
    source = open_huggingface(directory)
    write(tmp_path / "m.gguf", dataclasses.replace(source, read=lambda name: source.read(name).astype(np.float32)))
    back = open_gguf(tmp_path / "m.gguf")
    assert (back.config["bos_token_id"], back.config["eos_token_id"], back.config["vocab_size"]) == (257, 256, 264)
    assert back.load_tokenizer()("hi</s>").input_ids == [ord("h"), ord("i"), 256]
