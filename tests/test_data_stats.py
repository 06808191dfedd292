"""`tpu-tune data stats` against counts made by hand, NumPy's percentiles and the tokenizer itself."""

import json
from collections import Counter

import numpy as np
import pytest
from helpers_training import write_tiny_llama
from test_data_tokens import make_tokenizer

from tpu_tune.cli import main
from tpu_tune.data import stats
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.errors import UserError

ROWS = [{"input": f"Question {i}? ", "output": "yes " * (i % 9), "id": i} for i in range(50)]
ROWS += [{**row, "id": 99, "more": 1} for row in ROWS[:5]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def describe(capsys, *words):
    assert main(["data", "stats", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_and_lengths(tiny, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", ROWS)
    found = describe(capsys, file, "--tokenizer", tiny, "--max-length", 40)
    characters = sum(len(row["input"] + row["output"]) for row in ROWS)
    empty = sum(not row["output"] for row in ROWS)
    assert (found["rows"], found["format"], found["bad_rows"]) == (55, "input-output", 0)
    assert found["keys"] == {"input": 55, "output": 55, "id": 55, "more": 5}
    assert found["characters"] == found["bytes"] == characters
    assert (found["duplicates"], found["empty_answers"]) == (5, empty) and empty > 5
    # One token a byte, then EOS; a row with nothing to learn makes no example.
    kept = [row for row in ROWS if row["output"]]
    lengths = np.asarray([len(row["input"] + row["output"]) + 1 for row in kept])
    assert found["tokens"]["total"] == lengths.sum() and found["tokens"]["dropped"] == {"empty answer": empty}
    assert found["tokens"]["targets"] == sum(len(row["output"]) + 1 for row in kept)
    assert found["lengths"]["max"] == lengths.max() and found["lengths"]["mean"] == round(lengths.mean(), 1)
    for p in (50, 90, 95, 99):
        assert found["lengths"][f"p{p}"] == np.percentile(lengths, p, method="inverted_cdf")
    assert found["lengths"]["over_max_length"] == (lengths > 40).sum() > 5
    assert found["lengths"]["histogram"] == [
        [low, high, int(((lengths >= low) & (lengths <= high)).sum())] for low, high in [(17, 32), (33, 64)]
    ]
    assert [text.split()[0] for text in found["warnings"]] == ["0.0", "5", str(empty), str((lengths > 40).sum())]


def test_without_a_tokenizer_and_of_a_directory(tmp_path, capsys):
    write(tmp_path / "train.jsonl", [{"text": "ä" * 5}, {"text": "b" * 8}])
    write(tmp_path / "val.jsonl", [{"text": "ä" * 5}])
    found = describe(capsys, tmp_path)
    assert (found["rows"], found["characters"], found["bytes"], found["duplicates"]) == (3, 18, 28, 1)
    assert found["lengths"]["unit"] == "characters" and found["lengths"]["histogram"] == [[5, 8, 3]]
    assert "tokens" not in found and len(found["files"]) == 2


def test_the_rule_of_100_mib(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "rows.jsonl", [{"text": "a" * 2**18}] * 4)
    said = describe(capsys, file)["warnings"]
    assert said[0].startswith("1.0 MiB of text: for a full fine-tune have at least 100 MiB")
    assert not any("100 MiB" in text for text in describe(capsys, file, "--method", "lora")["warnings"])
    assert main(["data", "stats", str(file)]) == 0
    assert "warning: 1.0 MiB of text: for a full fine-tune have at least 100 MiB" in capsys.readouterr().out
    assert stats.LEAST_BYTES == 100 * 1024 * 1024
    monkeypatch.setattr(stats, "LEAST_BYTES", 2**20)
    assert not any("MiB" in text for text in describe(capsys, file)["warnings"])


def test_words_and_characters_that_the_tokenizer_breaks(tmp_path):
    """A tokenizer of bytes with a few merges: `hell` is one token, " w" another."""
    tokenizer = make_tokenizer()
    rows = [{"text": "hell hell, world! \U0001f600 zażółć"}, {"text": "(hell) an 漢 \U0001f600 can"}]
    file = write(tmp_path / "rows.jsonl", rows)
    found = stats.describe(file, tokenizer, TokenizeOptions(format="auto", max_length=64))["tokens"]
    words = Counter({"hell": 3, "world": 1, "zażółć": 1, "an": 1, "漢": 1, "can": 1})
    # A blank goes with the word after it, as everywhere in a text: "Ġw" is a token, otherwise the blank is one more.
    tokens = {"hell": 2, "world": 5, "zażółć": 11, "an": 2, "漢": 4, "can": 3}
    for word, count in tokens.items():
        assert len(tokenizer(" " + word)["input_ids"]) == count
    broken = {word: count - (word != "world") for word, count in tokens.items()}  # without that blank
    assert found["words"] == words.total()
    assert found["tokens_per_word"] == round(sum(broken[word] * words[word] for word in words) / words.total(), 3)
    assert [(item["text"], item["count"], len(item["tokens"])) for item in found["broken_words"]] == [
        ("漢", 1, 3),
        ("zażółć", 1, 10),
        ("world", 1, 5),
        ("can", 1, 2),
    ]
    assert found["broken_words"][2]["tokens"] == ["w", "o", "r", "l", "d"]
    smile = found["broken_characters"][0]
    assert (smile["text"], smile["count"], len(smile["tokens"])) == ("\U0001f600", 2, 4)
    # Pieces of a character: four of each smile, three of 漢, two of each of ż ó ł ć.
    assert (found["byte_tokens"], found["unknown_tokens"]) == (2 * 4 + 3 + 4 * 2, 0)


def test_unknown_tokens(tmp_path, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "</s>": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="</s>")
    file = write(tmp_path / "rows.jsonl", [{"text": "hello strange hello world"}])
    found = stats.describe(file, tokenizer, TokenizeOptions(format="auto", max_length=64), method="lora")
    assert found["tokens"]["unknown_tokens"] == 2
    assert found["warnings"] == ["2 tokens are unknown to the tokenizer: their text is lost"]


def test_chats_and_empty_answers(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    silent = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]
    call = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]}]
    found = stats.describe(write(tmp_path / "rows.jsonl", [{"messages": m} for m in (chat, silent, call)]))
    assert (found["format"], found["characters"], found["empty_answers"]) == ("messages", 12, 1)


def test_rows_of_no_known_format(tmp_path, caplog):
    file = write(tmp_path / "rows.jsonl", [{"title": "ab", "body": ["c", {"d": "ef"}], "n": 1}])
    found = stats.describe(file)
    assert (found["format"], found["characters"]) == ("unknown", 5)
    assert "the format of the data is not known from its keys: title, body, n; counting all its strings" in caplog.text


def test_complaints(tiny, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": 1.5}\n{"text": null}\n{\n')
    with pytest.raises(UserError, match=r"rows.jsonl:3: 'text' must be a string, not null; fix it, or give --skip-bad"):
        stats.describe(file)
    found = describe(capsys, file, "--skip-bad", "--tokenizer", tiny)
    assert (found["rows"], found["bad_rows"]) == (2, 2) and found["tokens"]["total"] == 2 + 4
    file.write_text("\n")
    with pytest.raises(UserError, match="rows.jsonl: no rows"):
        stats.describe(file)
    with pytest.raises(UserError, match="data.format is 'messages' but the first row has no 'messages'"):
        stats.describe(write(file, ROWS), options=TokenizeOptions(format="messages", max_length=9))
    assert main(["data", "tokenize", "-i", str(file), "-o", str(tmp_path / "a.arrow"), "-t", str(tiny)]) == 0
    with pytest.raises(UserError, match="a.arrow: is tokenized already; give the rows"):
        stats.describe(tmp_path / "a.arrow")
