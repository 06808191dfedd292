"""`data ingest`: every kind of file to rows, against the libraries that wrote them, and the command from end to end."""

import bz2
import collections
import datetime
import gzip
import io
import json
import lzma
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pandas
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_tune.cli import main
from tpu_tune.data.ingest import IngestOptions, Tally, find_sources, ingest, read_source
from tpu_tune.data.streams import Skipped
from tpu_tune.errors import UserError

NASTY = [
    "plain",
    'two\nlines\r\nand a "quote", a comma',
    "🐍 emoji 日本語 é",
    "NaN",
    "007",
    "",
    " spaced ",
    "x" * 3000,
    "\t\\N\\",
]


def rows_of(path, skip_bad=False, **options):
    return list(read_source(str(path), IngestOptions(skip_bad=skip_bad, **options)))


def texts(path, **options):
    return [row["text"] for row in rows_of(path, **options)]


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


# Tables


def test_csv_cells_come_back_whole(tmp_path):
    path = tmp_path / "nasty.csv"
    table = pandas.DataFrame({"id": [str(number) for number in range(len(NASTY))], "body": NASTY})
    table.to_csv(path, index=False, lineterminator="\n")
    assert texts(path, column="body") == NASTY
    read = pandas.read_csv(path, dtype=str, keep_default_na=False)
    assert texts(path, column="body") == list(read["body"])
    rows = rows_of(path, column="body", columns=(("id", "id"),))
    assert rows[2] == {"text": NASTY[2], "id": "2", "source": f"{path}:6"}  # the row before has three lines
    assert rows[1]["source"] == f"{path}:3"
    # What the guide's `Series.to_string` makes of them: cut after 50 characters, padded, line breaks written out.
    assert table["body"].to_string(index=False).split("\n")[1] != NASTY[1]


CELLS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=8))
def test_any_csv_that_pandas_writes_comes_back(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "any.csv"
    pandas.DataFrame(cells, columns=["a", "b"]).to_csv(
        path, index=False, lineterminator="\n", quoting=1, encoding="utf-8"
    )
    found = [[row["input"], row["output"]] for row in rows_of(path, input_column="a", output_column="b")]
    assert found == cells


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", "x\ty\n1\ta,b\n", "a,b"),
        ("a.csv", "x;y\n1;a,b\n", "a,b"),
        ("a.csv", "\ufeffx,y\r\n1,é\r\n", "é"),
        ("a.csv", "x,x,y,\n1,2,z,\n", "z"),
        ("old.csv", "x,y\r1,z\r", "z"),
    ],
)
def test_kinds_of_csv(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    assert texts(tmp_path / name, column="y") == [expected]
    (tmp_path / name).write_bytes(content.removeprefix("\ufeff").encode("utf-16"))
    assert texts(tmp_path / name, column="y") == [expected]


def test_columns_that_are_picked(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("q,a,topic\nwhat?,that,x\n", encoding="utf-8")
    where = f"{path}:2"
    assert rows_of(path, input_column="q", output_column="a") == [{"input": "what?", "output": "that", "source": where}]
    renamed = rows_of(path, columns=(("q", "input"), ("a", "output"), ("topic", "topic")))
    assert renamed == [{"input": "what?", "output": "that", "topic": "x", "source": where}]
    with pytest.raises(UserError, match=r"t\.csv: there is no column 'body'; there is: q, a, topic$"):
        rows_of(path, column="body")
    with pytest.raises(UserError, match=r"which column holds the text\? .* there is: q, a, topic$"):
        rows_of(path)
    with pytest.raises(UserError, match="belong together"):
        rows_of(path, input_column="q")
    path.write_text("only\none\n", encoding="utf-8")
    assert texts(path) == ["one"]
    path.write_text("id,text\n1,one\n", encoding="utf-8")
    assert rows_of(path) == [{"text": "one", "source": where}]


def arrow_table():
    return pyarrow.table(
        {
            "body": pyarrow.array([*NASTY, None], pyarrow.string()),
            "n": pyarrow.array(range(len(NASTY) + 1)),
            "day": pyarrow.array([datetime.date(2024, 2, 29)] * (len(NASTY) + 1)),
            "f": pyarrow.array([float("nan")] * 10),
        }
    )


def write_ipc(path, opener):
    table = arrow_table()
    with opener(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.parquet", lambda path: pyarrow.parquet.write_table(arrow_table(), path, row_group_size=4)),
        ("t.arrow", lambda path: write_ipc(path, pyarrow.ipc.new_file)),
        ("stream.arrow", lambda path: write_ipc(path, pyarrow.ipc.new_stream)),
        ("t.feather", lambda path: pyarrow.feather.write_feather(arrow_table(), str(path))),
    ],
)
def test_arrow_and_parquet(tmp_path, name, write):
    write(tmp_path / name)
    tally = Tally()
    columns = (("n", "n"), ("day", "day"), ("f", "f"))
    rows = list(read_source(str(tmp_path / name), IngestOptions(column="body", columns=columns), tally))
    assert [row["text"] for row in rows] == NASTY and tally.empty == 1  # NULL is no text
    assert rows[3] == {"text": "NaN", "n": 3, "day": "2024-02-29", "f": None, "source": f"{tmp_path / name}:4"}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.write(tmp_path / name, f"in/{name}")
    assert texts(tmp_path / "z.zip", column="body") == NASTY
    with pytest.raises(UserError, match="there is: body, n, day, f"):
        rows_of(tmp_path / name, column="text")


def test_sqlite_comes_back_exactly(tmp_path):
    path = tmp_path / "forum.sqlite"
    with sqlite3.connect(path) as database:
        database.execute('CREATE TABLE "po""sts" (id INTEGER PRIMARY KEY, body TEXT, score REAL)')
        database.executemany(
            'INSERT INTO "po""sts" VALUES (?, ?, ?)', [(i, text, i / 4) for i, text in enumerate(NASTY)]
        )
        database.execute("CREATE TABLE users (name TEXT)")
        database.execute("CREATE VIEW v AS SELECT * FROM users")
    before = path.read_bytes(), sorted(tmp_path.iterdir())
    rows = rows_of(path, table='po"sts', column="body", columns=(("id", "id"), ("score", "score")))
    assert rows == [
        {"text": text, "id": i, "score": i / 4, "source": f'{path}!po"sts:{i + 1}'} for i, text in enumerate(NASTY)
    ]
    with pytest.raises(UserError, match=r'which table\? .* there is: po"sts \(id, body, score\); users \(name\)$'):
        rows_of(path, column="body")
    with pytest.raises(UserError, match=r"there is no table 'posts'; there is: po\"sts"):
        rows_of(path, column="body", table="posts")
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == before  # nothing is changed, nothing made beside it
    with tarfile.open(tmp_path / "f.tar.gz", "w:gz") as archive:
        archive.add(path, "dump/forum.db")
    assert texts(tmp_path / "f.tar.gz", table='po"sts', column="body") == NASTY


def test_sqlite_that_is_written_to_while_it_is_read(tmp_path):
    path = tmp_path / "wal.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("CREATE TABLE t (body TEXT)")
    database.execute("INSERT INTO t VALUES ('in the log')")
    database.commit()
    assert texts(path) == ["in the log"]
    database.close()


# JSON


@pytest.mark.parametrize("layout", ["array", "data", "one after the other", "lines"])
def test_json_of_any_layout(tmp_path, layout):
    rows = [{"text": text, "n": number, "deep": {"a": [1.5, None]}} for number, text in enumerate(NASTY)]
    written = {
        "array": json.dumps(rows, indent=1),
        "data": json.dumps({"version": [1, 2], "data": rows, "more": 1}, ensure_ascii=False),
        "one after the other": "\n".join(json.dumps(row, indent=2) for row in rows),
        "lines": "".join(json.dumps(row) + "\n" for row in rows),
    }[layout]
    path = tmp_path / ("r.jsonl" if layout == "lines" else "r.json")
    path.write_text(written, encoding="utf-8")
    assert texts(path) == NASTY
    kept = rows_of(path, column="text", columns=(("deep", "deep"), ("n", "n")))
    assert [row["deep"] for row in kept] == [row["deep"] for row in rows]
    assert kept[4]["source"] == f"{path}{':' if layout == 'lines' else ', item '}5"
    with pytest.raises(UserError, match=r"there is no column 'body'; there is: text, n, deep"):
        ingest([str(path)], str(tmp_path / "out.jsonl"), IngestOptions(column="body"))


def test_json_larger_than_a_piece(tmp_path):
    rows = [{"text": f"é{number} " * 5000} for number in range(40)]
    assert texts(write_json(tmp_path / "big.json", rows)) == [row["text"] for row in rows]
    assert texts(write_json(tmp_path / "numbers.json", [{"text": 12345678}] * 20000)) == ["12345678"] * 20000


def test_formats_the_trainer_knows_stay_as_they_are(tmp_path):
    alpaca = {"instruction": "do", "input": "", "output": "done", "id": 7}
    completion = {"prompt": "a", "completion": "b", "id": 8}
    path = write_json(tmp_path / "a.json", [alpaca])
    assert rows_of(path) == [{"instruction": "do", "output": "done", "input": "", "source": f"{path}, item 1"}]
    path = write_json(tmp_path / "b.json", [completion])
    assert rows_of(path, columns=(("id", "id"),)) == [
        {"prompt": "a", "completion": "b", "id": 8, "source": f"{path}, item 1"}
    ]


def test_sharegpt(tmp_path):
    turns = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi 🐍"},
        {"from": "gpt", "value": "hello\n"},
    ]
    path = write_json(tmp_path / "s.json", [{"id": "x", "conversations": turns}])
    assert rows_of(path)[0]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi 🐍"},
        {"role": "assistant", "content": "hello\n"},
    ]
    assert rows_of(path, keep_conversations=True) == [{"conversations": turns, "source": f"{path}, item 1"}]
    path = write_json(tmp_path / "bad.json", [{"conversations": [{"from": "nobody", "value": "x"}]}])
    with pytest.raises(UserError, match=r"bad\.json, item 1: 'conversations' message 1 is from 'nobody'"):
        rows_of(path)


def discord(*messages, name="general"):
    people = {"ann": "1", "bob": "2", "cat": "3", "bot": "9"}
    return {
        "guild": {"id": "0", "name": "G"},
        "channel": {"id": "5", "type": "GuildTextChat", "name": name},
        "dateRange": {"after": None, "before": None},
        "messages": [
            {
                "id": str(number),
                "type": kind,
                "timestamp": f"2024-01-01T{time}:00.5+00:00",
                "content": text,
                "author": {"id": people[who], "name": who, "nickname": who.title(), "isBot": who == "bot"},
                "attachments": [],
            }
            for number, (time, who, text, kind) in enumerate(messages)
        ],
        "messageCount": len(messages),
    }


def say(time, who, text, kind="Default"):
    return time, who, text, kind


def test_discord(tmp_path):
    path = write_json(
        tmp_path / "general.json",
        discord(
            say("09:00", "bob", "(left over)"),
            say("09:01", "ann", "hi"),
            say("09:02", "ann", "anyone?"),
            say("09:03", "ann", "", "Default"),
            say("09:04", "cat", "Joined", "GuildMemberJoin"),
            say("09:05", "bob", "yes", "Reply"),
            say("09:06", "bob", "me 🐍"),
            say("09:50", "ann", "thanks"),
            say("12:00", "ann", "again?"),
            say("12:01", "bob", "sure"),
            say("12:02", "cat", "me too"),
            say("12:03", "bob", "fine"),
            say("15:00", "ann", "nobody answers"),
        ),
    )
    assert rows_of(path, assistant="Bob") == [
        {
            "messages": [
                {"role": "user", "content": "hi\nanyone?"},
                {"role": "assistant", "content": "yes\nme 🐍"},
            ],
            "source": f"{path}!general:1",
        },
        {
            "messages": [
                {"role": "user", "content": "Ann: again?"},
                {"role": "assistant", "content": "sure"},
                {"role": "user", "content": "Cat: me too"},
                {"role": "assistant", "content": "fine"},
            ],
            "source": f"{path}!general:2",
        },
    ]
    assert len(rows_of(path, assistant="2", gap_minutes=600)) == 1  # by id, and all of it one conversation
    with pytest.raises(
        UserError, match=r"general.json!general: who is the assistant\? .* Bob \(5\), Ann \(5\), Cat \(1\)$"
    ):
        rows_of(path)
    assert rows_of(path, assistant="nobody") == []


def test_discord_without_a_name(tmp_path):
    two = write_json(
        tmp_path / "two.json", discord(say("09:00", "cat", "q"), say("09:01", "ann", "a"), say("09:02", "cat", "ok"))
    )
    assert [m["content"] for m in rows_of(two)[0]["messages"]] == ["q", "a"]
    bot = discord(
        say("09:00", "bot", "welcome"), say("09:01", "cat", "q"), say("09:02", "ann", "r"), say("09:03", "bot", "a")
    )
    assert rows_of(write_json(tmp_path / "bot.json", bot))[0]["messages"] == [
        {"role": "user", "content": "Cat: q\nAnn: r"},
        {"role": "assistant", "content": "a"},
    ]


# Documents and dictionaries


def test_text_and_markdown(tmp_path):
    (tmp_path / "a.md").write_bytes("# Title\r\n\r\n- é\r\n".encode())
    (tmp_path / "b.txt").write_bytes("näive".encode("utf-16"))
    (tmp_path / "c.txt").write_bytes(b" \n")
    (tmp_path / "d.txt").write_bytes("näive".encode("cp1252"))
    assert texts(tmp_path / "a.md") == ["# Title\n\n- é\n"]
    assert texts(tmp_path / "b.txt") == ["näive"]
    assert texts(tmp_path / "c.txt") == []
    assert texts(tmp_path / "d.txt", encoding="cp1252") == ["näive"]


def test_a_text_too_long_for_a_row_is_cut_at_empty_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("tpu_tune.data.streams.MAX_ROW_BYTES", 10_000)
    monkeypatch.setattr("tpu_tune.data.ingest.documents.PIECE_CHARACTERS", 1000)
    text = "".join(f"line {number} é\n" + "\n" * (number % 9 == 0) for number in range(2000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    rows = rows_of(tmp_path / "long.txt")
    assert "".join(row["text"] for row in rows) == text
    assert all(1000 <= len(row["text"]) <= 2000 and row["text"].endswith("\n\n") for row in rows[:-1])
    line = text[: len(rows[0]["text"])].count("\n") + 1
    assert rows[1]["source"] == f"{tmp_path / 'long.txt'}:{line}"


def write_epub(path, chapters, extra=()):
    items = "".join(
        f'<item id="c{i}" href="text/{name}" media-type="application/xhtml+xml"/>' for i, name in enumerate(chapters)
    )
    spine = "".join(f'<itemref idref="c{i}"/>' for i in reversed(range(len(chapters))))
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container">'
            '<rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>',
        )
        book.writestr(
            "OEBPS/book.opf",
            '<!DOCTYPE p [<!ENTITY x SYSTEM "file:///etc/passwd">]><package xmlns="http://www.idpf.org/2007/opf">'
            f'<manifest>{items}<item id="nav" href="nav.xhtml" properties="nav" media-type="application/xhtml+xml"/>'
            f'</manifest><spine><itemref idref="nav"/>{spine}</spine></package>',
        )
        book.writestr("OEBPS/nav.xhtml", "<html><body>contents</body></html>")
        for name, content in [*((f"OEBPS/text/{name}", text) for name, text in chapters.items()), *extra]:
            book.writestr(name, content)


def test_epub_in_reading_order(tmp_path):
    page = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head><body><p>{}</p></body></html>'
    write_epub(tmp_path / "b.epub", {"two.xhtml": page.format("second&nbsp;é"), "one.xhtml": page.format("first")})
    assert rows_of(tmp_path / "b.epub") == [
        {"text": "first", "source": f"{tmp_path / 'b.epub'}!OEBPS/text/one.xhtml"},
        {"text": "second\xa0é", "source": f"{tmp_path / 'b.epub'}!OEBPS/text/two.xhtml"},
    ]
    with zipfile.ZipFile(tmp_path / "books.zip", "w") as archive:
        archive.write(tmp_path / "b.epub", "b.epub")
    assert texts(tmp_path / "books.zip") == ["first", "second\xa0é"]
    reference = '<CipherReference URI="OEBPS/text/one.xhtml"/>'
    locked = f"<encryption><EncryptedData><CipherData>{reference}</CipherData></EncryptedData></encryption>"
    write_epub(tmp_path / "drm.epub", {"one.xhtml": "x"}, [("META-INF/encryption.xml", locked)])
    with pytest.raises(UserError, match=r"drm\.epub!OEBPS/text/one\.xhtml: is encrypted"):
        rows_of(tmp_path / "drm.epub")


def test_foldoc_gives_terms_and_definitions(foldoc_dir):
    rows = rows_of(foldoc_dir / "foldoc.dict.dz")
    with gzip.open(foldoc_dir / "foldoc.dict.dz", "rt", encoding="utf-8") as file:
        whole = file.read()
    assert len(rows) == 15_254 - 7  # seven entries are about the dictionary
    found = {row["input"]: row["output"] for row in rows}
    assert found["neural network"].startswith(
        '<artificial intelligence> (ANN, commonly just "neural network"\nor "neural net")'
    )
    assert found["ABEND"].startswith("<jargon> /o'bend/")  # as the entry writes it; the index has small letters
    # Every definition stands in the dictionary, but for its margins, and nothing else does.
    squeezed = "".join(whole.split())
    for row in rows[::50]:
        assert "".join(row["output"].split()) in squeezed
    assert all(row["input"].strip() and row["output"].strip() for row in rows)


# Where sources are found, and the command


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)),
    ],
)
def test_compressed_files(tmp_path, suffix, pack):
    content = b"text\n" + "".join(f'"row {number} 🐍"\n' for number in range(5000)).encode()
    path = tmp_path / f"rows.csv{suffix}"
    path.write_bytes(pack(content))
    assert texts(path) == [f"row {number} 🐍" for number in range(5000)]
    assert rows_of(path)[1]["source"] == f"{path}:3"
    (tmp_path / f"rows.jsonl{suffix}").write_bytes(pack(b'{"text": "a"}\n' * 3))
    assert texts(tmp_path / f"rows.jsonl{suffix}") == ["a"] * 3
    path.write_bytes(pack(content[:100]) + pack(content[100:]))  # two streams, one after the other
    assert len(texts(path)) == 5000
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        add(archive, "a/one.txt", b"one")
        add(archive, "a/two.txt.gz", gzip.compress(b"two"))
    for name in (f"t.tar{suffix}", {".gz": "t.tgz", ".bz2": "t.tbz2", ".xz": "t.txz", ".zst": "t.tzst"}[suffix]):
        (tmp_path / name).write_bytes(pack(whole.getvalue()))
        assert rows_of(tmp_path / name) == [
            {"text": "one", "source": f"{tmp_path / name}!a/one.txt"},
            {"text": "two", "source": f"{tmp_path / name}!a/two.txt.gz"},
        ]


def add(archive, name, content, **fields):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    for key, value in fields.items():
        setattr(entry, key, value)
    archive.addfile(entry, io.BytesIO(content))


def make_folder(folder):
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, content in {
        "z.txt": "z",
        "a.html": "<p>a",
        "b/c.md": "c",
        "b/deep/d.jsonl": '{"text": "d"}\n',
        ".git/x.txt": "no",
        "b/image.png": "\x89",
        "b/.hidden.txt": "no",
        "LICENSE": "license",
    }.items():
        (folder / name).write_text(content, encoding="utf-8")
    with zipfile.ZipFile(folder / "y.zip", "w") as archive:
        archive.writestr("in/one.txt", "one")
        archive.writestr("in/two.jpg", "no")
        archive.writestr("three.tar.gz", gzip.compress(tar_of({"four.txt": b"four"})))


def tar_of(files):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, content in files.items():
            add(archive, name, content)
    return whole.getvalue()


def test_a_folder_of_everything(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    make_folder(folder)
    output = folder / "out.jsonl"
    output.write_text('{"text": "of the last run"}\n')
    report = ingest([str(folder), str(folder / "z.txt")], str(output))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["text"], row["source"].removeprefix(f"{folder}/")) for row in rows] == [
        ("a", "a.html"),
        ("one", "y.zip!in/one.txt"),
        ("four", "y.zip!three.tar.gz!four.txt"),
        ("z", "z.txt"),
        ("c", "b/c.md"),
        ("d", "b/deep/d.jsonl:1"),
    ]
    assert report.passed_over == collections.Counter({".png": 1, ".jpg": 1, "without suffix": 1})
    assert (report.rows, report.sources, report.formats) == (6, 5, {"text": 6})
    assert find_sources([str(folder / "**" / "*.md")]).sources == [str(folder / "b" / "c.md")]
    assert find_sources([str(folder)], IngestOptions(format="text")).sources == [
        str(folder / name) for name in ("LICENSE", "y.zip", "z.txt")
    ]
    monkeypatch.chdir(folder)
    assert find_sources(["b", "LICENSE", "tfds:x", "owner/name"]).sources == [
        "b/c.md",
        "b/deep/d.jsonl",
        "LICENSE",
        "tfds:x",
        "datasets:owner/name",
    ]


def test_the_output_does_not_depend_on_the_workers(tmp_path, python_docs_dir):
    files = sorted(str(path) for path in (python_docs_dir / "library").glob("a*.html"))
    make_folder(tmp_path / "in")
    (tmp_path / "in" / "bad.jsonl").write_text("{\n")
    alone = ingest([*files, str(tmp_path / "in")], str(tmp_path / "one.jsonl"), IngestOptions(skip_bad=True), workers=1)
    several = ingest(
        [*files, str(tmp_path / "in")], str(tmp_path / "two.jsonl"), IngestOptions(skip_bad=True), workers=2
    )
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert alone.as_dict() == several.as_dict() and alone.skipped.count == 1
    (tmp_path / "two.jsonl").unlink()
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not valid JSON"):
        ingest([*files, str(tmp_path / "in")], str(tmp_path / "two.jsonl"), workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "one.jsonl"]


@pytest.mark.slow
def test_all_of_the_documentation(tmp_path, python_docs_dir):
    report = ingest([str(python_docs_dir)], str(tmp_path / "docs.jsonl"), workers=2)
    assert (report.rows, report.sources, report.empty) == (530, 530, 0)


def test_the_command(tmp_path, capsys):
    make_folder(tmp_path / "in")
    output = tmp_path / "out.jsonl.gz"
    assert main(["data", "ingest", str(tmp_path / "in"), "--output", str(output), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["rows"], figures["bad"], figures["passed_over"][".png"]) == (6, 0, 1)
    with gzip.open(output, "rt") as file:
        assert len(file.readlines()) == 6
    (tmp_path / "t.csv").write_text("a,b\n1,2\n1\n")
    words = [
        "data",
        "ingest",
        str(tmp_path / "t.csv"),
        "--output",
        str(tmp_path / "t.jsonl"),
        "--columns",
        "a=input,b=output",
    ]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "t.csv:3: 1 cell where the header names 2 columns" in error
    assert not (tmp_path / "t.jsonl").exists()
    assert main([*words, "--skip-bad"]) == 0
    assert "1 bad one skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "t.jsonl").read_text()) == {
        "input": "1",
        "output": "2",
        "source": f"{tmp_path / 't.csv'}:2",
    }
    with pytest.raises(SystemExit):
        main(["data", "ingest", "--help"])
    example = capsys.readouterr().out.rstrip().rsplit("\n", 1)[-1].split()
    assert example[:3] == ["tpu-tune", "data", "ingest"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: there is no such file or folder"),
        (["*.nothing"], "no files are there"),
        (["gs://b/x.csv"], "only local files are read"),
        (["x.csv", "--encoding", "klingon"], "--encoding klingon is unknown"),
        (["empty.csv"], "names the columns|name the columns"),
        (["thing.xyz"], "of no known kind; name it with --format"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "thing.xyz").write_text("x")
    assert main(["data", "ingest", *words, "--output", "out.jsonl"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    import re

    assert re.search(message, error), error
    assert not (tmp_path / "out.jsonl").exists()


def test_jax_is_not_imported():
    code = (
        "import sys, tpu_tune.data.ingest.reading as r; [r.reader_of(k) for k in r.KINDS]; "
        "print('jax' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


# Named datasets


def test_a_directory_of_the_datasets_library(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "d" / "test.jsonl").write_text('{"text": "three"}\n')
    source = f"datasets:{tmp_path / 'd'}"
    assert rows_of(source) == [
        {"text": "one", "source": f"{source}:train:1"},
        {"text": "two", "source": f"{source}:train:2"},
    ]
    assert texts(source, split="test") == ["three"]
    with pytest.raises(UserError, match="there is no split 'dev'; there is: train, test$"):
        rows_of(source, split="dev")
    with pytest.raises(UserError, match="the dataset cannot be had"):
        rows_of("datasets:nobody/nothing-of-this-name")


def test_a_directory_of_tensorflow_datasets_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": [(number, {"text": f"row {number} é", "n": number}) for number in range(5)]}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Toy(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    path = builder.data_path
    assert "tensorflow" not in sys.modules
    rows = rows_of(f"tfds:{path}", column="text", columns=(("n", "n"),))
    assert sorted(row["text"] for row in rows) == [f"row {number} é" for number in range(5)]
    assert all(row["text"] == f"row {row['n']} é" for row in rows)
    with pytest.raises(UserError, match="there is no split 'test'; there is: train"):
        rows_of(f"tfds:{path}", split="test")
    with pytest.raises(UserError, match="there is no column 'body'; there is: "):
        rows_of(f"tfds:{path}", column="body")


def test_skipped_is_counted_by_the_one_who_reads(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n[]\n{"no": 1}\n{"text": "b"}\n{"text": null}\n')
    tally = Tally(Skipped(allowed=True))
    assert [row["text"] for row in read_source(str(tmp_path / "r.jsonl"), IngestOptions(), tally)] == ["a", "b"]
    assert [str(bad).removeprefix(str(tmp_path)) for bad in tally.skipped.examples] == [
        "/r.jsonl:2: not a JSON object but a list",
        "/r.jsonl:3: no 'text'; its keys: no",
    ]
    assert tally.empty == 1
