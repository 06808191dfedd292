"""Tokenizers from GGUF metadata: ids and texts as transformers' loader and the models' own tokenizer.json give them."""

import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece
from nasty_texts import TEXTS
from tokenizers import Tokenizer

from tpu_tune.checkpoints.gguf import open_gguf
from tpu_tune.checkpoints.gguf_tokenizer import build_tokenizer, pre_tokenizer_of
from tpu_tune.errors import UserError


def test_smollm2_tokenizer_equals_that_of_transformers(smollm2_gguf, tmp_path):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    tokenizer = open_gguf(smollm2_gguf).load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for candidate in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in TEXTS:
            ids = candidate(text).input_ids
            # transformers' loader leaves out that SmolLM2 cuts digits of every script
            if all(character.isascii() or not character.isnumeric() for character in text):
                assert ids == reference(text).input_ids, text
            assert candidate.decode(ids) == reference.decode(ids)
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
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
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


def assert_equal(tokenizer, reference):
    """The same ids and texts as those of a `tokenizers.Tokenizer`, on every text."""
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False).ids
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == expected, text
        assert tokenizer.decode(ids) == reference.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "kind", "pre"), [("llama2", "llama", None), ("llama3", "gpt2", "llama-bpe"), ("qwen3", "gpt2", "qwen2")]
)
def test_other_tokenizers_equal_their_tokenizer_json(npm_tokenizer, name, kind, pre):
    directory = npm_tokenizer(name)
    tokenizer = build_tokenizer("a.gguf", as_metadata(directory, kind, pre))
    assert_equal(tokenizer, Tokenizer.from_file(str(directory / "tokenizer.json")))


def test_gpt_neoxs_tokenizer_equals_its_tokenizer_json(text_dir, tmp_path):
    shutil.copy(text_dir / "20B_tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer = build_tokenizer("a.gguf", as_metadata(tmp_path, "gpt2", "olmo"))
    assert_equal(tokenizer, Tokenizer.from_file(str(tmp_path / "tokenizer.json")))


def test_gemma3s_tokenizer_equals_its_tokenizer_json(gemma3_gguf, npm_tokenizer):
    """From the real file, whose converter had SentencePiece's scores, with runs of blanks as tokens of their own."""
    reference = Tokenizer.from_file(str(npm_tokenizer("gemma3") / "tokenizer.json"))
    tokenizer = open_gguf(gemma3_gguf).load_tokenizer()
    assert_equal(tokenizer, reference)
    assert tokenizer("a b").input_ids == reference.encode("a b").ids  # with <bos>
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


def sentencepiece_metadata(processor, kind):
    """A SentencePiece model as llama.cpp's converter stores it."""

    def type_of(index):
        tests = ((processor.IsUnknown, 2), (processor.IsControl, 3), (processor.IsUnused, 5), (processor.IsByte, 6))
        return next((kind for test, kind in tests if test(index)), 1)

    indices = range(processor.vocab_size())
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [processor.IdToPiece(index) for index in indices],
        "tokenizer.ggml.scores": np.array([processor.GetScore(index) for index in indices], np.float32),
        "tokenizer.ggml.token_type": np.array([type_of(index) for index in indices]),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
    }


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"])
def test_mistrals_tokenizers_equal_sentencepiece(mistral_dir, name):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(mistral_dir / name))
    metadata = sentencepiece_metadata(processor, "llama") | {"tokenizer.ggml.bos_token_id": 1}
    tokenizer = build_tokenizer("a.gguf", metadata)
    special = [
        piece
        for piece, kind in zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
        if kind in (2, 3)
    ]
    plain = [text for text in TEXTS if not any(piece in text for piece in special)]  # SentencePiece takes these as text
    assert len(plain) > 60
    for text in plain:
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text), text
    assert tokenizer("a").input_ids == [1, *processor.encode("a")]


def test_t5s_tokenizer_equals_that_of_transformers(text_dir, tmp_path):
    """No published T5 vocabulary is to be had here; one of 400 pieces is made, normalized as T5's are."""
    from sentencepiece import sentencepiece_model_pb2
    from transformers import AutoTokenizer

    lines = (text_dir / "t8.shakespeare.txt").read_text().splitlines()[200:3200]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "model_max_length": 9999}')
    reference = AutoTokenizer.from_pretrained(tmp_path)
    content = sentencepiece_model_pb2.ModelProto()
    content.ParseFromString(model.getvalue())
    metadata = sentencepiece_metadata(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), "t5")
    rows = 512  # the embedding's; the converter fills up, so that the sentinels are padding
    metadata["tokenizer.ggml.tokens"] += [f"[PAD{index}]" for index in range(400, rows)]
    for key, value in (("scores", -10000.0), ("token_type", 5)):
        array = metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = np.append(array, np.full(rows - 400, value, array.dtype))
    metadata |= {
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.precompiled_charsmap": np.frombuffer(content.normalizer_spec.precompiled_charsmap, np.uint8),
        "tokenizer.ggml.add_space_prefix": content.normalizer_spec.add_dummy_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": content.normalizer_spec.remove_extra_whitespaces,
    }
    tokenizer = build_tokenizer("a.gguf", metadata)
    assert len(tokenizer) == len(reference) == 500
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == reference(text).input_ids, text
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer("<extra_id_0>").input_ids == [499, 1]


def test_phi3s_special_tokens_swallow_blanks_behind_them():
    metadata = small_metadata() | {"general.architecture": "phi3", "tokenizer.ggml.add_bos_token": False}
    tokenizer = build_tokenizer("a.gguf", metadata)
    assert tokenizer("</s> \n ab").input_ids == tokenizer("</s>ab").input_ids == [2, 7]
    assert tokenizer("<s> ab").input_ids != tokenizer("<s>ab").input_ids


def test_gpt4os_words_keep_their_contractions():
    normalizer, pre_tokenizer = pre_tokenizer_of("gpt-4o")
    pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str("I'VE HELLOworld can't 12345 x/\n/y")]
    assert normalizer is None
    assert pieces == ["I'VE", "ĠHELLOworld", "Ġcan't", "Ġ", "123", "45", "Ġx", "/Ċ/", "y"]


def test_llama3_puts_bos_first_where_the_file_does_not_say(npm_tokenizer):
    metadata = as_metadata(npm_tokenizer("llama3"), "gpt2", "llama-bpe") | {"tokenizer.ggml.bos_token_id": 128000}
    assert build_tokenizer("a.gguf", metadata)("a").input_ids[0] == 128000
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert build_tokenizer("a.gguf", metadata)("a").input_ids[0] != 128000


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
    with pytest.raises(UserError, match=r"a\.gguf: its tokenizer is 'rwkv'.*known: gpt2, llama, gemma4, t5"):
        build_tokenizer("a.gguf", small_metadata(model="rwkv"))
    with pytest.raises(UserError, match=r"a\.gguf: its pre-tokenizer 'new-bpe'.*smollm"):
        build_tokenizer("a.gguf", small_metadata(model="gpt2", pre="new-bpe", merges=[]))
