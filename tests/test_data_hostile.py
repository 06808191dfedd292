"""Data files that are damaged, or made to take the machine with them: one line, or right."""

from __future__ import annotations

import encodings.aliases
import io
import json
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile

import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_tune import UserError
from tpu_tune.checkpoints import json_text
from tpu_tune.data import columnar, sources, streams
from tpu_tune.data.ingest import IngestOptions, Tally, ingest, read_source
from tpu_tune.data.ingest.encodings import is_text_encoding
from tpu_tune.data.streams import Skipped

DEEP = "[" * 50_000 + "]" * 50_000
DIGITS = "9" * 5_000


def rows_of(path, **options) -> tuple[list[dict], Tally]:
    """What is read of a source where bad things are skipped; anything but a UserError fails the test."""
    tally = Tally(Skipped(allowed=True))
    return list(read_source(str(path), IngestOptions(skip_bad=True, **options), tally)), tally


# JSON


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        (DIGITS, "a number of it is too long"),
        (f'{{"a": [-{DIGITS}]}}', "a number of it is too long"),
        ("{", "Expecting property name"),
    ],
)
def test_json_fails_in_one_way(text, reason):
    for value in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError) as error:
            json_text.loads(value)
        assert reason in error.value.msg and "\n" not in str(error.value)


def test_json_that_is_deep_enough():
    for text in ("[" * 100 + "]" * 100, '{"a":' * 99 + "[]" + "}" * 99, json.dumps([["x" * 3] * 3] * 300), "1e999"):
        assert json_text.loads(text) == json.loads(text)
    with pytest.raises(UnicodeDecodeError):
        json_text.loads(b'"\xff"')


@given(st.text(alphabet='[]{}",:0123456789eE-+.truefalsn\\ud83 ', max_size=60))
@settings(max_examples=300, deadline=None)
def test_json_is_read_as_python_reads_it(text):
    try:
        expected = json.loads(text)
    except json.JSONDecodeError:
        with pytest.raises(json.JSONDecodeError):
            json_text.loads(text)
    else:
        assert repr(json_text.loads(text)) == repr(expected)


@pytest.mark.parametrize("content", [DEEP, f'[{{"text": "a", "n": {DIGITS}}}]', f'{{"text": "a", "n": {DIGITS}}}'])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_command_reads_rows_by_one_reader(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content + "\n")
    for read in (
        lambda: sources.read_rows(str(file)),
        lambda: list(streams.read_any(str(file), Skipped())),
        lambda: ingest([str(file)], str(tmp_path / "out.jsonl"), workers=1),
    ):
        with pytest.raises(UserError, match="nested too deeply|too long|not a JSON object but a list") as error:
            read()
        assert str(file) in str(error.value) and "\n" not in str(error.value)


# Parquet and Arrow

_DAMAGE = """
import io, random, sys
import pyarrow as pa, pyarrow.feather, pyarrow.parquet
from tpu_tune.data import columnar
chats = [[{"role": "user", "content": "hi"}, {"role": "a", "content": None}]] * 50
table = pa.table({"text": ["hello world"] * 40 + ["\\u00e4" * 20] * 10, "chats": chats,
                  "kind": pa.array(["x", "y"] * 25).dictionary_encode(), "on": [True, None] * 25})
kind, file = sys.argv[1], io.BytesIO()
if kind == "parquet":
    pyarrow.parquet.write_table(table, file, compression="zstd")
elif kind == "feather":
    pyarrow.feather.write_feather(table, file, compression="zstd")
else:
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(file, table.schema) as writer:
        writer.write_table(table, 20)
whole = file.getvalue()
def read(content):
    file = io.BytesIO(content)
    if kind == "parquet":
        batches = columnar.parquet_batches(columnar.open_parquet(file, len(content)))
    else:
        batches = (batch for batch, _ in columnar.open_arrow(file)[1])
    return list(columnar.rows_of(batches, kind))
assert read(whole) == table.to_pylist()
good = bad = 0
for seed in range(250):
    draw, damaged = random.Random(seed), bytearray(whole)
    for _ in range(draw.choice([1, 1, 3, 20])):
        damaged[draw.randrange(len(damaged))] = draw.choice([0, 255, draw.randrange(256)])
    try:
        read(bytes(damaged[: draw.choice([len(damaged), draw.randrange(len(damaged))])]))
        good += 1
    except columnar.BadTable as error:
        assert str(error) and "\\n" not in str(error)
        bad += 1
print(good, bad)
"""


@pytest.mark.parametrize("kind", ["file", "stream", "feather", "parquet"])
def test_damaged_bytes_are_one_line_or_right(kind):
    """In a process of its own: what pyarrow does not check ends the process."""
    done = subprocess.run([sys.executable, "-c", _DAMAGE, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    good, bad = map(int, done.stdout.split())
    assert good + bad == 250 and bad > 50


def test_feather_of_version_1(tmp_path):
    """Its reader checks nothing, so that it reads in a process of its own."""
    file = tmp_path / "a.feather"
    pyarrow.feather.write_feather(pa.table({"text": ["one", "two"] * 50}), str(file), version=1)
    assert [row["text"] for row in rows_of(file)[0]] == ["one", "two"] * 50
    whole = file.read_bytes()
    for seed in range(4):
        draw, damaged = random.Random(seed), bytearray(whole)
        for _ in range(20):
            damaged[draw.randrange(6, len(damaged))] = draw.choice([0, 127, 255])
        file.write_bytes(damaged)
        rows, tally = rows_of(file)
        assert rows or tally.skipped.count


def test_text_that_is_none(tmp_path):
    """Bytes of a string column that are no UTF-8, in a file that is whole otherwise."""
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(struct.pack("<3i", 0, 1, 3)), pa.py_buffer(b"a\xff\xfe"))
    table = pa.table({"text": bad})
    pyarrow.feather.write_feather(table, str(tmp_path / "a.arrow"), compression="uncompressed")
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(UserError, match=f"{name}: cannot be read as") as error:
            sources.read_rows(str(tmp_path / name))
        assert "\n" not in str(error.value)
        assert rows_of(tmp_path / name)[1].skipped.count == 1


def test_a_cell_larger_than_a_row_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 1000)
    texts = pa.array(["short", "a" * 5000, "also short"] * 100)
    for name, column in (("plain", texts), ("coded", texts.dictionary_encode())):
        pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet", compression="zstd")
        pyarrow.feather.write_feather(pa.table({"text": column}), str(tmp_path / f"{name}.arrow"))
        for suffix in ("parquet", "arrow"):
            rows, tally = rows_of(tmp_path / f"{name}.{suffix}")
            assert [row["text"] for row in rows] == ["short", "also short"] * 100 and tally.skipped.count == 100
            assert str(tally.skipped.examples[0]).endswith(f"{name}.{suffix}:2: the row is larger than 1000 bytes")


def test_a_parquet_file_that_is_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(columnar, "RATIO_FREE_BYTES", 2**20)
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a" * 2**23]}), file, compression="zstd")
    with pytest.raises(UserError, match="more than 300 times its size, as a bomb does"):
        sources.read_rows(str(file))
    assert "as a bomb does" in str(rows_of(file)[1].skipped.examples[0])
    assert len(rows_of(file, max_ratio=1e6)[0]) == 1


# Tables and dumps


def test_3000_equal_names(tmp_path):
    header = ["a"] * 3000 + ["a.7", "", "b", "b", ""]
    (tmp_path / "a.csv").write_text(",".join(header) + "\n" + ",".join("x" * len(header)) + "\n")
    start = time.monotonic()
    names = columnar.unique_names(header)
    assert time.monotonic() - start < 1 and len(set(names)) == len(header)
    assert names[:3] == ["a", "a.1", "a.2"] and names[-4:] == ["Unnamed: 3001", "b", "b.1", "Unnamed: 3004"]
    assert len(sources.read_rows(str(tmp_path / "a.csv"))[0][0]) == len(header)  # none of them is lost
    assert len(rows_of(tmp_path / "a.csv", column="b.1")[0]) == 1


@pytest.mark.parametrize("header", ["a,a,b,a", "a,,a,", "x,y,x.1,z", "a,b,a.1,b"])
def test_names_are_those_of_pandas(header):
    expected = pandas.read_csv(io.StringIO(header + "\n" + ",".join("1" * len(header.split(","))))).columns
    assert columnar.unique_names(header.split(",")) == list(expected)


def test_functions_inside_one_another(tmp_path):
    value = "'aaaaaaaaaa'"
    for _ in range(12):
        value = f"replace({value}, 'a', 'aaaaaaaaaa')"
    for grown in (value, "concat(" + ",".join(["replace('" + "a" * 9 + "', 'a', '" + "b" * 2**22 + "')"] * 3) + ")"):
        (tmp_path / "a.sql").write_text(f"CREATE TABLE t (text text);\nINSERT INTO t VALUES ({grown});\n")
        rows, tally = rows_of(tmp_path / "a.sql")
        assert not rows and "a value of its functions is longer than 64 MiB" in str(tally.skipped.examples[0])
    (tmp_path / "a.sql").write_text(
        "CREATE TABLE t (text text);\nINSERT INTO t VALUES (replace(replace('a\\nb', '\\n', char(10)), 'b', 'cc'));\n"
    )
    assert [row["text"] for row in rows_of(tmp_path / "a.sql")[0]] == ["a\ncc"]


# Archives


@pytest.mark.parametrize(("method", "version"), [(9, 20), (99, 20), (98, 20), (8, 255)])
@pytest.mark.parametrize("suffix", ["zip", "epub"])
def test_a_packing_that_python_does_not_know(tmp_path, method, version, suffix):
    file = tmp_path / f"a.{suffix}"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml" if suffix == "epub" else "a.txt", "hello world " * 50)
    content = bytearray(file.read_bytes())
    entry = content.find(b"PK\1\2")
    struct.pack_into("<H", content, 8, method)
    struct.pack_into("<H", content, entry + 10, method)
    struct.pack_into("<H", content, entry + 6, version)
    file.write_bytes(content)
    rows, tally = rows_of(file)
    assert not rows and "cannot be unpacked" in str(tally.skipped.examples[0])


def _archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(3):
                archive.writestr(f"{number}.txt", f"text {number} " * 20)
    else:
        format = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
        with tarfile.open(fileobj=file, mode="w", format=format) as archive:
            for number in range(3):
                content = f"text {number} ".encode() * 20
                entry = tarfile.TarInfo(f"{number}" * 120 + ".txt")
                entry.size = len(content)
                entry.pax_headers = {"comment": "ä", "GNU.sparse.size": "9"} if number == 2 else {}
                archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _with_checksum(block: bytearray) -> None:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)


@pytest.mark.parametrize("kind", ["zip", "gnu", "pax"])
def test_damaged_archives_are_one_line_or_right(tmp_path, kind):
    whole = _archive(kind)
    file = tmp_path / ("a.zip" if kind == "zip" else "a.tar")
    for seed in range(300):
        draw, damaged = random.Random(seed), bytearray(whole)
        if kind != "zip" and seed % 2:  # a field of a header, under a checksum that is right
            start = 512 * draw.choice(
                [at for at in range(len(whole) // 512) if whole[512 * at + 257 :][:5] == b"ustar"]
            )
            block = damaged[start : start + 512]
            at, size = draw.choice([(100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (329, 8), (0, 100), (345, 155)])
            block[at : at + size] = draw.randbytes(size) if draw.random() < 0.5 else b"\xff" * size
            _with_checksum(block)
            damaged[start : start + 512] = block
        else:
            for _ in range(draw.choice([1, 4, 30])):
                damaged[draw.randrange(len(damaged))] = draw.choice([0, 255, draw.randrange(256)])
        file.write_bytes(damaged)
        rows, tally = rows_of(file)
        if not (rows or tally.skipped.count or tally.passed_over or tally.empty):  # such as a directory of no entries
            with pytest.raises(UserError, match="there is no row in it"):
                ingest([str(file)], str(tmp_path / "out.jsonl"), workers=1)


# Encodings


def test_what_is_no_encoding():
    assert not any(
        map(
            is_text_encoding, ["rot13", "base64", "hex", "zlib", "undefined", "idna", "punycode", "nothing", "a\0b", ""]
        )
    )
    assert all(map(is_text_encoding, ["utf-8", "UTF8", "cp1252", "shift_jis", "utf-16", "utf-16-le", "koi8-r"]))


@pytest.mark.parametrize("name", sorted({*encodings.aliases.aliases.values(), "undefined", "idna", "punycode"}))
def test_every_name_that_python_knows(tmp_path, name):
    """As the encoding of a table or a text, and as what a page declares."""
    (tmp_path / "a.csv").write_bytes(b"text\n\x81\xfe1\n")
    (tmp_path / "a.html").write_bytes(f'<meta charset="{name}"><p>some words</p>'.encode())
    rows = rows_of(tmp_path / "a.html")[0]
    if not is_text_encoding(name):
        assert [row["text"] for row in rows] == ["some words"]  # as a browser, which takes no notice of such a name
    else:
        for file in ("a.csv", "a.html"):
            try:
                rows_of(tmp_path / file, encoding=name)
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["utf-16", "utf-32"])
def test_no_mark_of_the_order_of_bytes(tmp_path, name):
    for file in ("a.csv", "a.txt", "a.sql", "a.json"):
        (tmp_path / file).write_bytes("text\nx\n\n".encode(f"{name}-le"))
        rows, tally = rows_of(tmp_path / file, encoding=name)
        assert not rows and f"--encoding {name}-le or {name}-be reads it" in str(tally.skipped.examples[0])
    (tmp_path / "a.csv").write_bytes("text\nx\n".encode(name))
    assert [row["text"] for row in rows_of(tmp_path / "a.csv", encoding=name)[0]] == ["x"]
