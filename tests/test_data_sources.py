"""Reading rows: every kind of file, directories, and every complaint."""

import json
import re

import pytest

from tpu_tune.data import sources
from tpu_tune.data.formats import (
    STANFORD_ALPACA_WITH_INPUT,
    STANFORD_ALPACA_WITHOUT_INPUT,
    Chat,
    Pair,
    RowError,
    Text,
    convert,
    detect,
)
from tpu_tune.data.sources import read_rows, resolve
from tpu_tune.errors import UserError

ROWS = [{"text": "one"}, {"text": "zwei, drei\nvier ü"}]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines.replace("\n\n", "\r\n").encode()),
        write(tmp_path / "list.json", json.dumps(ROWS, indent=2)),
        write(tmp_path / "data.json", json.dumps({"data": ROWS})),
        write(tmp_path / "lines.json", lines),
        str(tmp_path / "a.parquet"),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[-1])
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        files.append(str(tmp_path / name))
        with open(files[-1], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    for file in files:
        assert read_rows(file, skip_bad_rows=False) == (ROWS, []), file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON \(.+\); fix it or set data.skip"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl:2: not a JSON object but a list"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}\n', r"a\.jsonl:3: not valid UTF-8"),
        ("a.jsonl", " \n", r"a\.jsonl: the file is empty"),
        ("a.json", '[{"text": "a"},\n 3', r"a\.json:2: not valid JSON"),
        ("a.json", "3", r"a\.json: must hold a list of objects"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, row 2: not a JSON object but a number"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.csv", "text,more\na,b\nc\n", r"a\.csv:3: 1 fields where the header has 2"),
        (
            "a.csv",
            b"text\na\n\xff\n",
            r"a\.csv:3: not valid UTF-8; save the file as UTF-8 \(perhaps it is cp1252: tpu-tune data ingest",
        ),
        ("a.parquet", "no", r"a\.parquet: cannot be read as Parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        read_rows(write(tmp_path / name, content), skip_bad_rows=False)
    assert "\n" not in str(error.value)


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n{\n7\n{"text": "b"}\n')
    rows, bad = read_rows(file, skip_bad_rows=True)
    assert rows == [{"text": "a"}, {"text": "b"}]
    assert [row.where for row in bad] == [f"{file}:2", f"{file}:3"]
    with pytest.raises(UserError, match="no rows that can be read"):
        read_rows(write(tmp_path / "b.jsonl", "{\n"), skip_bad_rows=True)


def test_missing_file():
    with pytest.raises(UserError, match="nowhere.jsonl: cannot be read"):
        read_rows("nowhere.jsonl", skip_bad_rows=False)


def names(found):
    return None if found is None else [re.split(r"[\\/]", path)[-1] for path in found]


@pytest.mark.parametrize(
    ("files", "train", "held_out"),
    [
        (["train.jsonl", "val.jsonl", "README.md"], ["train.jsonl"], ["val.jsonl"]),
        (["train.jsonl", "validation.jsonl", "test.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
        (["train.jsonl", "test.jsonl", "other.jsonl"], ["train.jsonl"], ["test.jsonl"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], None, None),
        (["a.jsonl", "b.csv", "eval.jsonl"], ["a.jsonl", "b.csv"], ["eval.jsonl"]),
        (["a.jsonl"], ["a.jsonl"], None),
    ],
)
def test_directories(tmp_path, files, train, held_out):
    for name in files:
        write(tmp_path / name, "x")
    found = resolve(str(tmp_path))
    assert names(found[0]) == (train or files)
    assert names(found[1]) == held_out


def test_hub_layout_in_a_subdirectory(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-0.parquet", "x")
    assert names(resolve(str(tmp_path))[0]) == ["train-0.parquet"]


def test_resolve_complaints(tmp_path):
    with pytest.raises(UserError, match="no data given"):
        resolve("")
    with pytest.raises(UserError, match="no such file or directory"):
        resolve("missing/rows.jsonl")
    with pytest.raises(UserError, match="no data files in this directory"):
        resolve(str(tmp_path))
    write(tmp_path / "test.jsonl", "x")
    with pytest.raises(UserError, match=r"only evaluation files here \(test.jsonl\)"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match="unknown kind of data file '.doc'"):
        resolve(write(tmp_path / "a.doc", "x"))


def test_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["test", "train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"text": f"{name} {split}"}])
    train, held_out = resolve("someone/something")
    assert read_rows(train[0], skip_bad_rows=False)[0] == [{"text": "someone/something train"}]
    assert read_rows(held_out[0], skip_bad_rows=False)[0] == [{"text": "someone/something test"}]
    assert sources.is_hub(train[0])

    def unreachable(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    with pytest.raises(UserError, match=r"could not be had \(ConnectionError: no route\)"):
        resolve("someone/something")


# --- formats


@pytest.mark.parametrize(
    ("row", "format", "sample"),
    [
        ({"text": "a"}, "text", Text("a")),
        ({"input": "a", "output": "b"}, "input-output", Pair("a", "b")),
        ({"prompt": "a", "generation": "b"}, "prompt-generation", Pair("a", "b")),
        ({"prompt": "a", "completion": "b"}, "prompt-completion", Pair("a", "b")),
        (
            {"instruction": "a", "input": "b", "output": "c", "text": "all of it"},
            "alpaca",
            Pair(STANFORD_ALPACA_WITH_INPUT.format(instruction="a", input="b"), "c"),
        ),
        (
            {"instruction": "a {x}", "input": "", "output": 3},
            "alpaca",
            Pair(STANFORD_ALPACA_WITHOUT_INPUT.format(instruction="a {x}"), "3"),
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            "sharegpt",
            Chat(
                (
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                )
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "f()"},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ],
                "tools": '[{"name": "f"}]',
            },
            "sharegpt",
            Chat(
                (
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "f()"},
                    {"role": "tool", "content": "1"},
                    {"role": "assistant", "content": "b"},
                ),
                tools=({"name": "f"},),
            ),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}]},
                    {"role": "gpt", "content": "b"},
                ]
            },
            "messages",
            Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})),
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "prompt-completion",
            Chat(({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), first_target=1),
        ),
    ],
)
def test_formats_are_detected_and_converted(row, format, sample):
    assert detect(row) == format
    assert convert(row, format) == sample


def test_alpaca_is_stanfords():
    assert STANFORD_ALPACA_WITH_INPUT.endswith("### Response:")
    assert STANFORD_ALPACA_WITHOUT_INPUT.endswith("### Response:")


def test_columns_and_format_override():
    row = {"question": "a", "answer": "b", "text": "c"}
    columns = {"question": "input", "answer": "output"}
    assert detect(row, columns=columns) == "input-output"
    assert convert(row, "input-output", columns) == Pair("a", "b")
    assert detect({"input": "a", "output": "b", "text": "c"}, "text") == "text"


def test_format_complaints():
    with pytest.raises(UserError, match=r"from its keys: foo, bar; known formats: messages \(messages\); .*text"):
        detect({"foo": 1, "bar": 2})
    with pytest.raises(UserError, match="data.format is 'text' but the first row has no 'text'; its keys: foo"):
        detect({"foo": 1}, "text")
    with pytest.raises(UserError, match="data.columns names 'q' but the row has only: foo"):
        detect({"foo": 1}, columns={"q": "text"})
    with pytest.raises(UserError, match="data.format 'poem' is unknown"):
        detect({"foo": 1}, "poem")


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"text": None}, "text", "'text' must be a string, not null"),
        ({"text": ["a"]}, "text", "'text' must be a string, not a list"),
        ({"input": "a"}, "input-output", "no 'output', which the format 'input-output' needs"),
        ({"messages": []}, "messages", "'messages' must be a non-empty list"),
        ({"messages": ["a"]}, "messages", "'messages' message 1 is not an object"),
        ({"messages": [{"content": "a"}]}, "messages", "'messages' message 1 has no 'role'"),
        ({"messages": [{"role": "user"}]}, "messages", "'messages' message 1 has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "parts other than text"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "sharegpt", "is from 'cat'; known: human"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": "["}, "messages", "'tools' is not valid JSON"),
    ],
)
def test_rows_that_cannot_be_used(row, format, message):
    with pytest.raises(RowError, match=message):
        convert(row, format)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("caf\u00e9 \u2013 \u201cna\u00efve\u201d".encode("cp1252"), "cp1252"),
        (b"caf\xe9 \x8d", "latin-1"),  # 8D is no character of Windows's
        ("Stra\u00dfe, gr\u00fc\u00dfen".encode("utf-16-le"), "utf-16-le"),
        ("Stra\u00dfe, gr\u00fc\u00dfen".encode("utf-16-be"), "utf-16-be"),
    ],
)
def test_an_encoding_is_suggested_that_reads_the_text(content, encoding):
    assert sources.likely_encoding(content) == encoding
