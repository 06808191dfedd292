"""Added special tokens: rows that are the mean of the old ones, trained if asked, in torch and peft as here."""

from __future__ import annotations

import dataclasses
import json
import shutil

import helpers_training as helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from test_gguf import VOCABULARY, write_gguf
from test_gguf_tokenizer import small_metadata
from transformers import AutoTokenizer

import tpu_tune
from tpu_tune import UserError
from tpu_tune.checkpoints import vocabulary
from tpu_tune.checkpoints.huggingface import open_huggingface
from tpu_tune.checkpoints.huggingface_write import write_model
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.vocabulary import with_added_tokens, with_tokens_of
from tpu_tune.cli import main
from tpu_tune.config import from_dict
from tpu_tune.models import Decoder, architecture
from tpu_tune.training.prepare_model import prepare_model
from tpu_tune.transforms import sharding

TOKENS = ["<|im_start|>", "<|im_end|>"]
SPARE = 258  # the tiny tokenizer's length, and its first free id
TEXTS = ["hello </s> world", "  two  blanks\n", "<|user|>hi", "é 🙂", "<s>a"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def write_models(root):
    """Return a function that gives a tiny model's directory: padded (264 rows, tied) or full (258 rows, own head)."""
    for name, changes in {"padded": {}, "full": {"vocab_size": SPARE, "tie_word_embeddings": False}}.items():
        path = helpers.write_tiny_llama(root / name, **changes)
        words = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(
            json.dumps({**words, "chat_template": TEMPLATE, "pad_token": "</s>"})
        )
        (path / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.5}')
    return lambda name: str(root / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


def plain_tokenizer(known=()):
    """Return a tokenizer of the words t0 ... t93, and `known` as added tokens behind them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({f"t{number}": number for number in range(94)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(list(known))
    return tokenizer


def in_memory(config, known=(), tensors=None):
    """Return a source of 96 rows, whose tokenizer leaves two of them spare."""
    source = tiny_models.source(config, tensors)
    return dataclasses.replace(source, load_tokenizer=lambda: plain_tokenizer(known))


@pytest.mark.parametrize("case", ["llama2", "llama_tied", "neox_parallel", "neox_full_rotary"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_new_rows_are_the_mean_and_old_ones_stay(case, count):
    config = tiny_models.CONFIGS[case]
    old = in_memory(config)
    new = with_added_tokens(old, [f"<{number}>" for number in range(count)])
    size = max(96, 94 + count)
    assert new.config == {**config, "vocab_size": size} and old.config == config
    assert (
        list(new.added_tokens.values())
        == list(range(94, 94 + count))
        == new.load_tokenizer().convert_tokens_to_ids(list(new.added_tokens))
    )
    grown = {name for name in old.shapes if any(part in name for part in ("embed", "lm_head"))}
    assert len(grown) == (1 if config["tie_word_embeddings"] else 2)
    for name, shape in old.shapes.items():
        before, after = old.read(name), new.read(name)
        assert after.shape == new.shapes[name] and after.dtype == before.dtype
        if name not in grown:
            np.testing.assert_array_equal(after, before)
            continue
        assert after.shape == (size, *shape[1:])
        added = np.isin(np.arange(size), range(94, 94 + count))
        np.testing.assert_array_equal(after[: min(size, 96)][~added[:96]], before[~added[:96]])
        mean = (before.astype(np.float64).sum(0) / 96).astype(np.float32)
        np.testing.assert_allclose(after[added], np.broadcast_to(mean, (count, shape[1])), rtol=1e-6, atol=1e-7)
    params = load_params(new, open_architecture(new))
    assert params[f"{architecture(config).names.embed}.weight"].shape[0] == size


def test_a_head_s_bias_grows_too(monkeypatch):
    def with_bias(source):
        return dataclasses.replace(architecture(source.config), head_bias=True)

    monkeypatch.setattr(vocabulary, "open_architecture", with_bias)
    tensors = {**tiny_models.weights(tiny_models.CONFIGS["llama2"]), "lm_head.bias": np.arange(96, dtype=np.float32)}
    new = with_added_tokens(in_memory(tiny_models.CONFIGS["llama2"], tensors=tensors), ["<a>", "<b>", "<c>"])
    np.testing.assert_array_equal(new.read("lm_head.bias"), [*range(94), 47.5, 47.5, 47.5])
    assert new.shapes["lm_head.bias"] == (97,) and new.shapes["lm_head.weight"] == (97, 32)


def test_the_file_s_dtype_stays():
    tensors = {
        name: value.astype(ml_dtypes.bfloat16)
        for name, value in tiny_models.weights(tiny_models.CONFIGS["llama2"]).items()
    }
    new = with_added_tokens(in_memory(tiny_models.CONFIGS["llama2"], tensors=tensors), ["<a>"])
    rows = new.read("lm_head.weight")
    assert rows.dtype == ml_dtypes.bfloat16
    mean = tensors["lm_head.weight"].astype(np.float64).mean(0).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rows[94], mean)


def test_known_tokens_keep_their_row():
    old = in_memory(tiny_models.CONFIGS["llama2"], known=["<a>"])
    new = with_added_tokens(old, ["<a>", "t7", "<b>"])
    assert new.added_tokens == {"<a>": 94, "t7": 7, "<b>": 95}
    before, after = (source.read("model.embed_tokens.weight") for source in (old, new))
    np.testing.assert_array_equal(after[:95], before[:95])
    assert (after[95] != before[95]).any()
    same = with_added_tokens(old, ["<a>"])
    assert same.read("lm_head.weight") is old.read("lm_head.weight") and same.shapes == old.shapes
    assert len({old.fingerprint, new.fingerprint, same.fingerprint}) == 3
    assert with_added_tokens(old, ["<a>", "t7", "<b>"]).fingerprint == new.fingerprint


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_grows_and_is_written_for_transformers(tmp_path):
    words = {f"w{number}": number for number in range(VOCABULARY - 10)}
    known = small_metadata()
    tokens = [*known["tokenizer.ggml.tokens"][:9], *words][: VOCABULARY - 1]
    metadata = [
        ("string", "tokenizer.ggml.model", "llama"), ("array", "tokenizer.ggml.tokens", tokens),
        ("array", "tokenizer.ggml.scores", [-float(number) for number in range(len(tokens))]),
        ("array", "tokenizer.ggml.token_type", [2, 3, 3] + [1] * (len(tokens) - 3)),
        ("uint32", "tokenizer.ggml.bos_token_id", 1), ("uint32", "tokenizer.ggml.eos_token_id", 2),
        ("uint32", "tokenizer.ggml.unknown_token_id", 0),
    ]  # fmt: skip
    tensors = write_gguf(tmp_path / "m.gguf", "llama", metadata=metadata)
    source = with_added_tokens(open_source(str(tmp_path / "m.gguf")), TOKENS)
    assert list(source.added_tokens.values()) == [VOCABULARY - 1, VOCABULARY]
    arch = open_architecture(source)
    params = load_params(source, arch)
    write_model(str(tmp_path / "out"), params, source, arch)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("<|im_start|>ab<|im_end|>").input_ids == source.load_tokenizer()("<|im_start|>ab<|im_end|>").input_ids
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    rows = open_huggingface(tmp_path / "out").read("lm_head.weight")
    np.testing.assert_array_equal(rows[: VOCABULARY - 1], tensors["lm_head.weight"][:-1])
    np.testing.assert_allclose(rows[VOCABULARY], tensors["lm_head.weight"].mean(0), atol=1e-6)
    pytest.importorskip("torch")
    ids = np.array([[1, 5, VOCABULARY - 1, 7, VOCABULARY]])
    found = tiny_models.torch_logits(tiny_models.torch_model(str(tmp_path / "out")), ids)
    assert tiny_models.difference(Decoder(arch, params)(jnp.asarray(ids)), found) < 1e-4


# Runs, from the configuration to what others load

RUNS = {
    # name: (model, tokens, settings)
    "qlora_tied": (
        "padded", [*TOKENS, *[f"<{n}>" for n in range(6)]], {"quantize.format": "nf4", "quantize.group_size": 32},
    ),
    "lora_untied": ("full", TOKENS, {}),
    "untrained": ("full", TOKENS, {"model.train_added_tokens": False}),
    "full": ("full", TOKENS, {"method": "full"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def run_of(models, tmp_path_factory):
    """Return a function that gives the directory of a finished run, each trained once."""
    root = tmp_path_factory.mktemp("runs")
    rows = [json.loads(line) for line in helpers.write_rows(root / "plain.jsonl", 40).read_text().splitlines()]
    for row in rows:
        row["completion"] = f"<|im_start|>{row['completion']}<|im_end|>"
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {}

    def words(name):
        model, tokens, changes = RUNS[name]
        keys = {
            "output_dir": str(root / name),
            "model.path": models(model),
            "model.dtype": "float32",
            "lora.rank": 4,
            "model.add_special_tokens": tokens,
            "model.train_added_tokens": True,
            "lora.target_modules": ["q_proj"],
            "data.train": str(root / "rows.jsonl"),
            "data.cache_dir": str(root),
            "data.max_length": 64,
            "data.num_workers": 1,
            "train.per_device_train_batch_size": 1,
            "train.max_steps": 3,
            "train.learning_rate": 1e-2,
            "train.eval_strategy": "no",
            "data.eval_ratio": 0.0,
            **changes,
        }
        return keys

    def run(name):
        if name not in done:
            done[name] = tpu_tune.train(nested(words(name)))
        return done[name].output_dir

    run.keys = words
    return run


def nested(keys):
    config = {}
    for key, value in keys.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return from_dict(config)


def check_tokenizer(directory, original, tokens, ids):
    old, new = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert new(text).input_ids == old(text).input_ids, text
    for token, number in zip(tokens, ids, strict=True):
        assert new(f"a{token}b").input_ids == [*old("a").input_ids, number, *old("b").input_ids]
        assert new.decode([97, number], skip_special_tokens=True) == "a"
    chat = [{"role": "user", "content": "hi"}]
    assert new.apply_chat_template(chat, tokenize=False) == "<|im_start|>hi<|im_end|>"
    assert new.chat_template == old.chat_template and new.model_max_length == old.model_max_length
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(new, name) == getattr(old, name)


IDS = np.array([[257, 104, 105, 258, 97, 259, 256], [258, 258, 259, 104, 32, 97, 259]])


@pytest.mark.parametrize("name", ["qlora_tied", "lora_untied", "untrained"])
@pytest.mark.filterwarnings("ignore")
def test_a_lora_run_in_torch_and_peft(run_of, models, name, tmp_path):
    run, (model, tokens, changes) = run_of(name), RUNS[name]
    size, trained = SPARE + len(tokens), changes.get("model.train_added_tokens", True)
    base, adapter, merged = str(tmp_path / "base"), f"{run}/adapter", str(tmp_path / "merged")
    assert main(["export", run, "--base", "--output", base]) == 0
    assert main(["export", run, "--merge", "--merge-base", "dequantized", "--output", merged]) == 0
    # the base: grown by mean rows, and nothing else about it is new
    written, original = open_huggingface(base), open_huggingface(models(model))
    assert written.config["vocab_size"] == size
    assert {**written.config, "vocab_size": 0} == {**original.config, "vocab_size": 0}
    embedding, old = (source.read("model.embed_tokens.weight") for source in (written, original))
    np.testing.assert_array_equal(embedding[:SPARE], old[:SPARE])
    mean = old.astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(embedding[SPARE:], np.broadcast_to(mean, (len(tokens), 32)))
    # the merged model: old rows are bit-equal, the new ones have moved if they should; a tied head stays tied
    merged_source = open_huggingface(merged)
    assert merged_source.config["tie_word_embeddings"] == (model == "padded")
    for tensor in {"model.embed_tokens.weight", "lm_head.weight"} & set(original.shapes):
        rows = merged_source.read(tensor)
        np.testing.assert_array_equal(rows[:SPARE], original.read(tensor)[:SPARE])
        moved = (rows[SPARE:] != written.read(tensor)[SPARE:]).any(1)
        assert list(moved[:2]) == [trained, trained]  # the tokens that the data has
    for directory in (base, merged):
        check_tokenizer(directory, models(model), tokens, range(SPARE, size))
    assert json.loads((tmp_path / "base" / "generation_config.json").read_text())["temperature"] == 0.5
    # here: the adapter brings its tokens along, over the original and over the exported base
    ours = tpu_tune.load(base, adapter=adapter)(IDS)
    brought = tpu_tune.load(models(model), adapter=adapter)
    assert brought.tokenizer.convert_tokens_to_ids(tokens) == list(range(SPARE, size))
    if name != "qlora_tied":  # there the exported base has the quantized weights
        np.testing.assert_array_equal(brought(IDS), ours)
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    assert tiny_models.difference(tiny_models.torch_logits(tiny_models.torch_model(merged), IDS), ours) < 1e-4
    theirs = peft.PeftModel.from_pretrained(tiny_models.torch_model(base), adapter).eval()
    assert tiny_models.difference(tiny_models.torch_logits(theirs, IDS), ours) < 1e-4
    assert any("trainable_tokens" in key for key in theirs.state_dict()) == trained
    if name == "lora_untied":  # peft itself grows the original by the tokenizer beside the adapter
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
        assert tiny_models.difference(tiny_models.torch_logits(theirs, IDS), ours) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_a_full_run_writes_the_grown_model(run_of, models, tmp_path):
    run = run_of("full")
    source = open_huggingface(f"{run}/model")
    assert source.shapes["lm_head.weight"] == source.shapes["model.embed_tokens.weight"] == (260, 32)
    check_tokenizer(f"{run}/model", models("full"), TOKENS, [258, 259])
    pytest.importorskip("torch")
    found = tiny_models.torch_logits(tiny_models.torch_model(f"{run}/model"), IDS)
    assert tiny_models.difference(tpu_tune.load(f"{run}/model")(IDS), found) < 1e-4


def test_a_run_goes_on_only_with_its_tokens(run_of, tmp_path):
    run = shutil.copytree(run_of("lora_untied"), tmp_path / "out")
    keys = {**run_of.keys("lora_untied"), "train.max_steps": 4, "output_dir": str(run)}
    with pytest.raises(UserError, match=r"model.add_special_tokens was .*im_end.* and is now"):
        tpu_tune.train(nested({**keys, "model.add_special_tokens": TOKENS[:1]}))
    with pytest.raises(UserError, match="model.train_added_tokens was true and is now false"):
        tpu_tune.train(nested({**keys, "model.train_added_tokens": False}))
    before = open_adapter(run)
    assert tpu_tune.train(nested(keys)).step == 4
    after = open_adapter(run)
    assert before.keys() == after.keys() and all((before[key] != after[key]).any() for key in before if "token" in key)


def open_adapter(run):
    from safetensors.numpy import load_file

    return load_file(f"{run}/adapter/adapter_model.safetensors")


def test_going_on_from_an_adapter(run_of, tmp_path):
    """Another run starts from the adapter: with its tokens, and from its rows."""
    run, keys = run_of("qlora_tied"), run_of.keys("qlora_tied")
    keys |= {"model.adapter": f"{run}/adapter", "output_dir": str(tmp_path / "out")}
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}, jax.devices()[:1])
    model = prepare_model(nested(keys), mesh)
    path = "model.embed_tokens.trainable_tokens_delta"
    held = open_adapter(run)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    np.testing.assert_array_equal(model.trainable[path], held)
    with pytest.raises(
        UserError, match="was trained with the added token '<.im_start.>'; set model.add_special_tokens"
    ):
        tpu_tune.train(nested({**keys, "model.add_special_tokens": [], "model.train_added_tokens": False}))
    with pytest.raises(UserError, match="as token 258, which is 259 in"):
        tpu_tune.train(
            nested({**keys, "model.add_special_tokens": TOKENS[::-1] + keys["model.add_special_tokens"][2:]})
        )
    with pytest.raises(UserError, match="trains other tokens"):
        tpu_tune.train(nested({**keys, "model.add_special_tokens": [*keys["model.add_special_tokens"], "<more>"]}))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / vocabulary.RECORD).write_text("[1]")
    with pytest.raises(UserError, match="must be an object"):
        with_tokens_of(open_source(keys["model.path"]), str(tmp_path / "adapter"))


# Mistakes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model.add_special_tokens": ["<a>", "<a>"]}, "'model.add_special_tokens' names '<a>' twice"),
        ({"model.add_special_tokens": ["<a>", ""]}, "holds ''; a token must not be empty"),
        ({"model.add_special_tokens": ["<a>", 5]}, "'model.add_special_tokens' holds 5; its entries must be text"),
        ({"model.add_special_tokens": 5}, "'model.add_special_tokens' is 5; it must be of type list"),
        ({"model.train_added_tokens": True}, "there are no tokens to train"),
        ({"lora.trainable_token_indices": ["a"]}, "holds 'a'; its entries must be whole numbers"),
        ({"lora.trainable_token_indices": {"embed_tokens": [1, 2.5]}}, "holds 2.5; its entries must be whole numbers"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(UserError, match=message) as error:
        nested(keys)
    assert "\n" not in str(error.value)


def test_keys_from_the_command_line():
    config = tpu_tune.config.default()
    for key, text in {
        "model.add_special_tokens": "<|a|>,<|b|>",
        "model.train_added_tokens": "true",
        "lora.trainable_token_indices": "5,6",
    }.items():
        tpu_tune.config.assign(config, key, text)
    assert list(config.model.add_special_tokens) == ["<|a|>", "<|b|>"] and config.model.train_added_tokens is True
    assert config.lora.trainable_token_indices == [5, 6]
    tpu_tune.config.assign(config, "lora.trainable_token_indices", '{"lm_head": [7]}')
    tpu_tune.config.assign(config, "lora.trainable_token_indices.embed_tokens", "[1, 2]")
    assert config.lora.trainable_token_indices == {"lm_head": [7], "embed_tokens": [1, 2]}


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    path = tiny_models.write(tmp_path / "m", tiny_models.CONFIGS["llama2"])
    with pytest.raises(UserError, match="no usable tokenizer"):
        vocabulary.open_configured(helpers.make_config(model__path=path, model__add_special_tokens=TOKENS))
