"""`tpu-tune data chunk`: every line fits when it is tokenized again, and together they are the text."""

import functools
import json

import pytest
from helpers_training import write_tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from nasty_texts import TEXTS
from test_data_tokens import make_tokenizer

from tpu_tune.checkpoints.tokenizers import open_tokenizer
from tpu_tune.cli import main
from tpu_tune.data import chunk
from tpu_tune.data.chunk import chunk_file, cut_text
from tpu_tune.errors import UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@functools.cache
def bytes_tokenizer():
    return make_tokenizer(adds_bos=True)


def lines(path):
    with open(path, encoding="utf-8", newline="") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_real_tokenizers(npm_tokenizer, text_dir, name, tmp_path, monkeypatch):
    """Also Llama 2's, which puts a blank before every piece, so that cut text takes more tokens than before."""
    tokenizer = open_tokenizer(str(npm_tokenizer(name)))
    text = (text_dir / "t8.shakespeare.txt").read_text(encoding="utf-8")[60_000:90_000]
    text += "".join(TEXTS) + "a\r\nb"
    (tmp_path / "in.txt").write_bytes(text.encode())
    monkeypatch.setattr(chunk, "_BLOCK", 10_000)
    found = chunk_file(tmp_path / "in.txt", tmp_path / "out.jsonl", tokenizer, 128)
    pieces = [row["text"] for row in lines(tmp_path / "out.jsonl")]
    assert "".join(pieces) == text and found["pieces"] == len(pieces)
    sizes = [len(tokenizer(piece)["input_ids"]) for piece in pieces]
    assert max(sizes) <= 128
    assert sorted(sizes)[len(sizes) // 10] > 115  # and nearly all are full


def test_by_default_2048_tokens_with_begin_and_end(tiny, tmp_path, capsys):
    text = "abc\n" * 2000
    (tmp_path / "in.txt").write_text(text)
    assert (
        main(["data", "chunk", str(tmp_path / "in.txt"), "--output", str(tmp_path / "o.jsonl"), "-t", str(tiny)]) == 0
    )
    assert "o.jsonl: 4 rows of at most 2,048 tokens, of 1 text" in capsys.readouterr().out
    pieces = [row["text"] for row in lines(tmp_path / "o.jsonl")]
    assert "".join(pieces) == text and [len(piece) for piece in pieces] == [2047, 2047, 2047, 8000 - 3 * 2047]
    # Tokenized, each is one block: there is room for the end of text.
    command = ["data", "tokenize", "--json", "-i", str(tmp_path / "o.jsonl"), "-o", str(tmp_path / "o.arrow")]
    assert main([*command, "-t", str(tiny), "--max-length", "2048"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["split"]) == (4, 0)


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), tokens=st.integers(6, 20))
def test_any_text_fits_and_comes_back(text, tokens):
    tokenizer = bytes_tokenizer()
    pieces = cut_text(text, tokenizer, tokens)
    assert "".join(pieces) == text
    assert all(len(tokenizer(piece)["input_ids"]) + 1 <= tokens for piece in pieces)


def test_rows_keep_their_other_keys(tiny, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    rows = [{"body": "abcdefgh", "source": "x"}, {"title": 1}, {"body": "ij\n\U0001f600", "source": "y"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "chunk", str(source), "-o", str(tmp_path / "o.jsonl"), "-t", str(tiny), "--text-key", "body"]
    assert main([*words, "--tokens", "6"]) == 1
    assert "in.jsonl:2: no text in 'body'; its keys: title; fix it, or give --skip-bad" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()
    assert main([*words, "--tokens", "6", "--skip-bad", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bad_rows"] == 1
    assert lines(tmp_path / "o.jsonl") == [
        {"body": "abcde", "source": "x"},
        {"body": "fgh", "source": "x"},
        {"body": "ij\n", "source": "y"},
        {"body": "\U0001f600", "source": "y"},
    ]


def test_complaints(tiny, tmp_path):
    tokenizer = open_tokenizer(str(tiny))
    with pytest.raises(UserError, match="'\U0001f600' alone takes more than 4 tokens; allow more"):
        cut_text("ab\U0001f600", tokenizer, 4)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"bad.txt: not valid UTF-8"):
        chunk_file(tmp_path / "bad.txt", tmp_path / "o.jsonl", tokenizer)
    (tmp_path / "bad.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad.txt: no text to cut"):
        chunk_file(tmp_path / "bad.txt", tmp_path / "o.jsonl", tokenizer)
    with pytest.raises(UserError, match=r"nowhere.txt: cannot be read"):
        chunk_file(tmp_path / "nowhere.txt", tmp_path / "o.jsonl", tokenizer)
    assert not (tmp_path / "o.jsonl").exists()
