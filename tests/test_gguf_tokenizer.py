"""Tokenizers from GGUF metadata: ids and texts as transformers' loader and the models' own tokenizer.json give them."""

import json

import numpy as np
import pytest

from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.gguf_tokenizer import build_tokenizer
from tpu_tune.errors import UserError

TEXTS = [
    "",
    " ",
    "  a   b\t\tc\n\n\n d  ",
    "a\r\n\r\nb  \n",
    "\x00\x07 \u00a0\u3000|",
    "1234 5.67 89 007",
    "don't DON'T we'll it's",
    "e\u0301 é ſ's",
    "🙂👩\u200d👩\u200d👧 ok",
    "你好，世界 12",
    "한국어 ütf",
    "def f(x):\n    return x**2  # ok\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>x<repo_name>",
    "</s>a<s>",
]


def test_smollm2_tokenizer_equals_that_of_transformers(smollm2_gguf, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    tokenizer = open_gguf(smollm2_gguf).load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS:
            ids = candidate(text).input_ids
            assert ids == reference(text).input_ids, text
            assert candidate.decode(ids) == text
        assert candidate.chat_template == tokenizer.chat_template
        assert (candidate.bos_token, candidate.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_smollm2_cuts_every_digit(smollm2_gguf):
    """SmolLM2's own tokenizer.json cuts digits of all scripts; transformers' GGUF loader leaves that out."""
    tokenizer = open_gguf(smollm2_gguf).load_tokenizer()
    assert tokenizer.tokenize("x 12") == ["x", "Ġ", "1", "2"]
    assert tokenizer.tokenize(" ٣")[0] == "Ġ"
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("hello").input_ids == tokenizer("hello", add_special_tokens=False).input_ids


def as_metadata(directory, kind, pre):
    """A tokenizer.json's content as llama.cpp's converter stores it."""
    content = json.loads((directory / "tokenizer.json").read_text())
    vocabulary, types = dict(content["model"]["vocab"]), {}
    for token in content["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        types[token["content"]] = 3 if token["special"] else 4
    tokens = sorted(vocabulary, key=vocabulary.get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    metadata = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([types.get(t, 6 if t.startswith("<0x") else 1) for t in tokens]),
    }
    if kind == "gpt2":
        return metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    rank = {}
    for merge in merges:
        rank.setdefault(merge.replace(" ", "", 1), len(rank))
    scores = np.array([-float(rank.get(token, 0)) for token in tokens], np.float32)
    return metadata | {"tokenizer.ggml.scores": scores, "tokenizer.ggml.add_bos_token": False}


@pytest.mark.parametrize(
    ("name", "kind", "pre"), [("llama2", "llama", None), ("llama3", "gpt2", "llama-bpe"), ("qwen3", "gpt2", "qwen2")]
)
def test_other_tokenizers_equal_their_tokenizer_json(npm_tokenizer, name, kind, pre):
    from tokenizers import Tokenizer

    directory = npm_tokenizer(name)
    reference = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = build_tokenizer("a.gguf", as_metadata(directory, kind, pre))
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False).ids
        ids = tokenizer(text).input_ids
        assert ids == expected, text
        assert tokenizer.decode(ids) == reference.decode(expected, skip_special_tokens=False)


def small_metadata(**changes):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "▁ab", "ab", "[PAD9]"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0, 0, 0, -9, -9, -9, -2, -3, -1, 0], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 1, 1, 1, 1, 1, 1, 5]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_bos_and_eos_as_the_file_says(tmp_path):
    assert build_tokenizer("a.gguf", small_metadata()).encode("ab") == [1, 7]
    tokenizer = build_tokenizer("a.gguf", small_metadata(add_bos_token=False, add_eos_token=True))
    assert tokenizer.encode("ab") == [7, 2]
    tokenizer = build_tokenizer("a.gguf", small_metadata(add_eos_token=True))
    assert tokenizer.encode("ab", "a") == [1, 7, 2, 1, 6, 2]
    assert len(tokenizer) == 9  # without the padding of the vocabulary
    tokenizer.save_pretrained(tmp_path)


def test_unknown_tokenizers_are_named():
    with pytest.raises(UserError, match=r"a\.gguf: its tokenizer is 'rwkv'.*known: gpt2, llama"):
        build_tokenizer("a.gguf", small_metadata(model="rwkv"))
    with pytest.raises(UserError, match=r"a\.gguf: its pre-tokenizer 'new-bpe'.*smollm"):
        build_tokenizer("a.gguf", small_metadata(model="gpt2", pre="new-bpe", merges=[]))
