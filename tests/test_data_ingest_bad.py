"""Input that is broken, cut short or made to do harm: one line that says where, or a count with `--skip-bad`."""

import bz2
import gzip
import io
import lzma
import os
import random
import re
import sqlite3
import tarfile
import tracemalloc
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from test_data_ingest import add, tar_of, write_epub

from tpu_tune.data.ingest import IngestOptions, Tally, ingest, read_source
from tpu_tune.data.streams import Skipped
from tpu_tune.errors import UserError


def fails(path, message, expected=(), **options):
    """Reading ends with one line; with `skip_bad` it gives `expected`, and counts. Neither leaves anything behind."""
    folder = path.parent
    before = sorted(os.listdir(folder))
    with pytest.raises(UserError) as error:
        ingest([str(path)], str(folder / "out.jsonl"), IngestOptions(**options), workers=1)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert sorted(os.listdir(folder)) == before
    tally = Tally(Skipped(allowed=True))
    assert [row["text"] for row in read_source(str(path), IngestOptions(**options), tally)] == list(expected)
    assert tally.skipped.count and re.search(message, str(tally.skipped.examples[0]))
    return tally


# Bytes and rows


@pytest.mark.parametrize(
    ("name", "content", "message", "expected"),
    [
        (
            "a.txt",
            b"one\ntwo \xff three",
            r"a\.txt: not valid UTF-8 \(line 2, byte 5; --encoding names another, perhaps cp1252\)",
            [],
        ),
        ("a.txt", b"nul \0 inside", "holds NUL bytes", []),
        ("a.csv", b"text\none\nt\xffo\nthree\n", r"a\.csv:3: not valid in its encoding", ["one", "three"]),
        ("a.csv", b"t\xffxt\none\n", r"a\.csv: line 1 is not valid in its encoding", []),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "\xff"}\n{"text": "3"}\n',
            r"a\.jsonl:2: not valid UTF-8",
            ["one", "3"],
        ),
        (
            "a.json",
            b'[{"text": "one"},\n{"text": "\xff"}, {"text": "3"}]',
            r"a\.json, item 2: not valid in its encoding",
            ["one", "3"],
        ),
        (
            "a.sql",
            b"insert into t (text) values ('one'), ('\xff'), ('3');",
            r"a\.sql!t:2: holds text that is not valid",
            ["one", "3"],
        ),
        (
            "a.html",
            b"<meta charset=utf-8>\n<p>\xff",
            r"a\.html: not valid UTF-8 \(line 2, byte 4; .*, which it declares",
            [],
        ),
        (
            "a.csv",
            b"text,n\none,1\ntwo\nthree,3,4\nfour,4\n",
            r"a\.csv:3: 1 cell where the header names 2 columns",
            ["one", "four"],
        ),
        ("a.csv", b'text,n\none,1\n"two\nthree,3\n', r"a\.csv:3: a quote is opened here that nothing closes", ["one"]),
        ("a.csv", b"\n", "its first line is to name the columns", []),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n[1]\n{"text": 2}\n', r"a\.jsonl:2: not valid JSON", ["one", "2"]),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": ["x"]}\n',
            r"a\.jsonl:2: column 'text' holds a list, not text",
            ["one"],
        ),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a number of it is too long", []),
        ("a.json", b'[{"text": "one"}, {"text": "two"', r"a\.json: not valid JSON \(line 1: ", ["one"]),
        (
            "a.json",
            b'[{"text": "one"}\n {"text": "two"}]',
            r"a\.json: not valid JSON \(line 2: '\{' where ',' should be\)",
            ["one"],
        ),
        ("a.json", b'[{"text": "one"}, [1]]', r"a\.json, item 2: not a JSON object but a list", ["one"]),
        ("a.json", b"[" * 100_000, r"a\.json: not valid JSON \(line 1: nested too deeply\)", []),
        ("a.json", b"not json", "a.json: not valid JSON", []),
        ("a.json", b" \n", "a.json: is empty", []),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}", r"a\.json: not valid JSON \(line 1: a number is too long\)", []),
        (
            "a.json",
            b'[{"text": "one", "data": ' + b"[" * 200 + b"]" * 200 + b"}]",
            r"a\.json, item 1: column 'data' is nested too",
            [],
        ),
        (
            "a.sql",
            b"insert into t (text) values ('one'), (" + b"(" * 100_000,
            r"a\.sql: line 1: brackets in brackets",
            ["one"],
        ),
        ("a.parquet", b"PAR1 nothing", "a.parquet: cannot be read as Parquet", []),
        ("a.arrow", b"ARROW1\0\0 nothing", "a.arrow: cannot be read as Arrow", []),
        ("a.arrow", b"", "a.arrow: ", []),
        ("a.sqlite", b"no database" * 100, "a.sqlite: cannot be read as SQLite", []),
        ("a.epub", b"no book", "a.epub: is cut short, or no EPUB", []),
        ("a.zip", b"no archive", "a.zip: is cut short or damaged", []),
        ("a.zip", b"", "a.zip: is cut short or damaged", []),
        ("a.tar", b"no archive" * 200, "a.tar: is cut short or damaged", []),
        ("a.txt.gz", b"not gzip", "is cut short or damaged", []),
        ("a.dict", b"entry", r"a\.dict: there is no a\.index beside it", []),
    ],
)
def test_bad_bytes_and_rows(tmp_path, name, content, message, expected):
    (tmp_path / name).write_bytes(content)
    columns = {"columns": (("data", "data"),), "column": "text"} if b'"data"' in content else {}
    fails(
        tmp_path / name,
        message,
        expected,
        **({"column": "text"} if name in ("a.csv", "a.sql", "a.sqlite") else columns),
    )


def test_sqlite_with_rows_that_are_no_text(tmp_path):
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE t (text)")
        database.executemany("INSERT INTO t VALUES (CAST(? AS TEXT))", [(b"one",), (b"\xff",), (b"three",)])
        database.execute("INSERT INTO t VALUES (?)", (b"\xff\x00",))
    tally = fails(path, r"a\.db!t:2: holds text that is not valid UTF-8", ["one", "three"])
    assert str(tally.skipped.examples[1]).endswith("a.db!t:4: column 'text' holds bytes that are not text")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails(path, "a.db: cannot be read as SQLite")


def test_a_dictionary_that_is_cut_short(tmp_path):
    (tmp_path / "d.index").write_text("one\tA\tM\nbad line\ntwo\tM\tBA\n")
    (tmp_path / "d.dict").write_text("one\n  first\n" + "x")
    tally = Tally(Skipped(allowed=True))
    assert [(row["input"], row["output"]) for row in read_source(str(tmp_path / "d.dict"), IngestOptions(), tally)] == [
        ("one", "first")
    ]
    assert [bad.reason.partition(",")[0] for bad in tally.skipped.examples] == [
        "not an entry of an index: a word",
        "the entry lies past the end of the dictionary",
    ]


# A line that has no end


@pytest.mark.parametrize(
    ("name", "start", "end", "message", "expected"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "',
            b'"}\n{"text": "3"}\n',
            r"a\.jsonl:2: the line is longer than 1 MiB",
            ["one", "3"],
        ),
        ("a.csv", b"text,n\none,1\n", b",2\nthree,3\n", r"a\.csv:3: the line is longer than 1 MiB", ["one", "three"]),
        ("a.txt", b"", b"\nrest\n", r"a\.txt:1: the line is longer than 1 MiB", ["rest\n"]),
        ("a.json", b'[{"text": "one"}, {"text": "', b'"}]', r"a\.json: a value is longer than 1 MiB", ["one"]),
        (
            "a.sql",
            b"insert into t (text) values ('one'), ('",
            b"');",
            r"a\.sql: line 1: a string or a comment is longer",
            ["one"],
        ),
        ("a.html", b"<p>", b"", r"a\.html: is larger than 1 MiB, too much for one row", []),
        ("a.sql", b"COPY t (text) FROM stdin;\none\n", b"\n\\.\n", r"a\.sql: line 3: it is longer than 1 MiB", ["one"]),
    ],
)
def test_a_line_without_an_end_is_not_held(tmp_path, monkeypatch, name, start, end, message, expected):
    """Of 60 MB in one line, no more than a few times the limit of a row is in memory."""
    monkeypatch.setattr("tpu_tune.data.streams.MAX_ROW_BYTES", 2**20)
    with open(tmp_path / name, "wb") as file:
        file.write(start)
        for _ in range(60):
            file.write(b"x" * 1_000_000)
        file.write(end)
    column = {"column": "text"} if name in ("a.csv", "a.sql") else {}
    list(read_source(str(tmp_path / name), IngestOptions(skip_bad=True, **column)))  # imports are no memory of its own
    tracemalloc.start()
    try:
        fails(tmp_path / name, message, expected, **column)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


# Archives


def zip_of(files):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return whole.getvalue()


def noise(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefghijklmnop \n", k=count)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", zip_of({"one.txt": noise(40_000), "two.txt": noise(40_000, 1)})),
        ("a.tar", tar_of({"one.txt": noise(40_000), "two.txt": noise(40_000, 1)})),
        ("a.tar.gz", gzip.compress(tar_of({"one.txt": noise(40_000), "two.txt": noise(40_000, 1)}))),
        ("a.tar.xz", lzma.compress(tar_of({"one.txt": noise(40_000), "two.txt": noise(40_000, 1)}))),
        ("a.tgz", gzip.compress(tar_of({"one.txt": noise(40_000), "two.txt": noise(40_000, 1)}))),
        ("a.txt.gz", gzip.compress(noise(40_000))),
        ("a.txt.xz", lzma.compress(noise(40_000))),
        ("a.txt.bz2", bz2.compress(noise(40_000))),
        ("a.txt.zst", pyarrow.compress(noise(40_000), codec="zstd", asbytes=True)),
    ],
)
def test_archives_that_are_cut_short(tmp_path, name, content):
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(UserError, match=rf"{name}.*: is cut short or damaged \("):
        ingest([str(tmp_path / name)], str(tmp_path / "out.jsonl"), workers=1)
    tally = Tally(Skipped(allowed=True))
    rows = list(read_source(str(tmp_path / name), IngestOptions(), tally))
    assert tally.skipped.count and all(row["text"].encode() == noise(40_000) for row in rows)
    assert len(rows) == (1 if ".t" in name and "txt" not in name else 0)  # what came before the cut is whole
    assert sorted(os.listdir(tmp_path)) == [name]


def test_a_tar_that_is_cut_between_two_files(tmp_path):
    content = tar_of({"one.txt": b"1" * 512, "two.txt": b"2"})
    (tmp_path / "a.tar").write_bytes(content[:1024])
    fails(tmp_path / "a.tar", "a.tar: is cut short or damaged", ["1" * 512])


def test_one_damaged_member_does_not_end_the_others(tmp_path):
    content = bytearray(zip_of({"one.txt": noise(5000), "two.txt": b"second", "in.zip": b"no archive"}))
    content[200] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    tally = fails(tmp_path / "a.zip", r"a\.zip!one\.txt: is cut short or damaged", ["second"])
    assert [bad.where.partition("!")[2] for bad in tally.skipped.examples] == ["one.txt", "in.zip"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../climbs.txt", "its path climbs out of the archive"),
        ("a/../../climbs.txt", "its path climbs out of the archive"),
        ("/tmp/absolute.txt", "its path is absolute"),
        ("C:\\absolute.txt", "its path is absolute"),
        ("a\\..\\climbs.txt", "its path climbs out of the archive"),
    ],
)
def test_paths_that_lead_out_of_an_archive(tmp_path, name, reason):
    (tmp_path / "a.zip").write_bytes(zip_of({"ok.txt": "fine", name: "evil", "b/ok.txt": "fine too"}))
    (tmp_path / "a.tar").write_bytes(tar_of({"ok.txt": b"fine", name: b"evil", "b/ok.txt": b"fine too"}))
    for archive in ("a.zip", "a.tar"):
        fails(tmp_path / archive, re.escape(f"!{name}: {reason}"), ["fine", "fine too"])


def test_links_and_devices_in_archives(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        add(archive, "link.txt", b"", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "hard.txt", b"", type=tarfile.LNKTYPE, linkname=str(secret))
        add(archive, "device.txt", b"", type=tarfile.CHRTYPE)
        add(archive, "pipe.txt", b"", type=tarfile.FIFOTYPE)
        add(archive, "ok.txt", b"fine")
    (tmp_path / "a.tar").write_bytes(whole.getvalue())
    tally = fails(tmp_path / "a.tar", r"a\.tar!link\.txt: is a link to .*secret\.txt, not a file", ["fine"])
    assert tally.skipped.count == 4
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        entry = zipfile.ZipInfo("link.txt")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, str(secret))
        archive.writestr("ok.txt", "fine")
    fails(tmp_path / "a.zip", r"a\.zip!link\.txt: is a link or a device, not a file", ["fine"])


def test_an_encrypted_member(tmp_path):
    content = bytearray(zip_of({"a.txt": "x"}))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    fails(tmp_path / "a.zip", r"a\.zip!a\.txt: is encrypted; unpack it first")


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.zip", lambda bomb: zip_of({"ok.txt": "fine", "bomb.txt": bomb, "after.txt": "never read"})),
        ("a.txt.gz", gzip.compress),
        ("a.tar.xz", lambda bomb: lzma.compress(tar_of({"ok.txt": b"fine", "bomb.txt": bomb}))),
        ("a.txt.bz2", bz2.compress),
        ("a.txt.zst", lambda bomb: pyarrow.compress(bomb, codec="zstd", asbytes=True)),
        ("b.zip", lambda bomb: zip_of({"ok.txt": "fine", "in.zip": zip_of({"bomb.txt": bomb})})),
        (
            "c.zip",
            lambda bomb: zip_of(
                {"ok.txt": "fine", "in.dat.xz": b"", "in.tar.gz": gzip.compress(tar_of({"b.png": bomb}))}
            ),
        ),
    ],
)
def test_bombs(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr("tpu_tune.data.ingest.archives.RATIO_FREE_BYTES", 2**20)
    path = tmp_path / name
    path.write_bytes(pack(b"0" * 4_000_000))
    expected = [] if ".txt." in name else ["fine"]
    fails(path, rf"{name}: unpacks to more than 300 times its size, as a zip bomb does; --max-ratio", expected)
    fails(
        path,
        r"unpacks to more than 3,000,000 bytes; --max-unpacked-gb",
        expected,
        max_unpacked_bytes=3_000_000,
        max_ratio=1e9,
    )
    whole = [len(row["text"]) for row in read_source(str(path), IngestOptions(max_ratio=1e9))]
    assert whole == {
        "a.zip": [4, 4_000_000, 10],
        "a.tar.xz": [4, 4_000_000],
        "b.zip": [4, 4_000_000],
        "c.zip": [4],
    }.get(name, [4_000_000])


def test_a_tar_header_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tpu_tune.data.ingest.archives.HEADER_BYTES", 2**20)
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as archive:
        add(archive, "ok.txt", b"fine" + b" " * 2**21)  # long files are no headers
        add(archive, "bad.txt", b"x", pax_headers={"comment": "x" * 2**21})
    (tmp_path / "a.tar").write_bytes(whole.getvalue())
    fails(tmp_path / "a.tar", r"a\.tar: holds a header of more than 1 MiB", ["fine" + " " * 2**21])


def test_archives_in_archives_have_an_end(tmp_path):
    content = zip_of({"deep.txt": "x"})
    for level in range(3):
        content = zip_of({f"level{level}.zip": content})
    (tmp_path / "a.zip").write_bytes(content)
    fails(tmp_path / "a.zip", r"level0\.zip: is an archive inside 3 others; --max-depth allows more")
    rows = list(read_source(str(tmp_path / "a.zip"), IngestOptions(max_depth=4)))
    assert [row["source"].partition("!")[2] for row in rows] == ["level2.zip!level1.zip!level0.zip!deep.txt"]


def test_a_book_that_names_what_it_does_not_hold(tmp_path):
    write_epub(tmp_path / "b.epub", {"one.xhtml": "<p>one</p>", "../../../two.xhtml": "<p>two</p>"})
    with zipfile.ZipFile(tmp_path / "c.epub", "w") as book, zipfile.ZipFile(tmp_path / "b.epub") as source:
        for name in source.namelist():
            if not name.endswith("one.xhtml"):
                book.writestr(name, source.read(name))
    fails(tmp_path / "c.epub", r"c\.epub!\.\./two\.xhtml: its path climbs out of the archive")
    tally = fails(tmp_path / "c.epub", r"climbs out")
    assert str(tally.skipped.examples[1]).endswith("!OEBPS/text/one.xhtml: the book names it and does not hold it")


def test_nothing_half_written_is_left(tmp_path):
    """A run that fails at its last file leaves the output of the run before."""
    (tmp_path / "in").mkdir()
    for number in range(5):
        (tmp_path / "in" / f"{number}.txt").write_text(f"text {number}")
    output = tmp_path / "out.jsonl"
    ingest([str(tmp_path / "in")], str(output), workers=1)
    before = output.read_bytes()
    (tmp_path / "in" / "z.txt").write_bytes(b"\xff")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"z\.txt: not valid UTF-8"):
            ingest([str(tmp_path / "in")], str(output), workers=workers)
    assert output.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["in", "out.jsonl"]
    assert ingest([str(tmp_path / "in")], str(output), IngestOptions(skip_bad=True), workers=1).skipped.count == 1
    assert output.read_bytes() == before


def test_only_bad_rows_is_an_error_too(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"there is no row in it \(1 bad, first .*a\.txt: not valid UTF-8"):
        ingest([str(tmp_path / "a.txt")], str(tmp_path / "out.jsonl"), IngestOptions(skip_bad=True))
    assert not (tmp_path / "out.jsonl").exists()
