"""A folder of everything in one `data ingest`: options for some files, all problems at once, encodings, HTML."""

from __future__ import annotations

import argparse
import codecs
import json
import pathlib
import sqlite3
import zipfile
from typing import Any

import pytest

from tpu_tune.cli import main
from tpu_tune.cli.common import Commands
from tpu_tune.data import recipe as recipes
from tpu_tune.data.ingest import IngestOptions, ingest, patterns, read_source
from tpu_tune.data.ingest.html import stripped
from tpu_tune.data.recipe import settings
from tpu_tune.errors import UserError

SQL = """CREATE TABLE users (id int, name text);
CREATE TABLE posts (id int, body text);
INSERT INTO users VALUES (1, 'ann');
INSERT INTO posts VALUES (1, 'from the <b>dump</b> &amp; back');
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Questions, posts, chats, pages, a dump of two tables and an archive, none of which read alike."""
    folder = tmp_path / "messy"
    (folder / "old").mkdir(parents=True)
    (folder / "faq.csv").write_text("q,a,id\nwhat?,that,7\n")
    (folder / "old" / "posts.csv").write_bytes("body\nr\xe9sum\xe9\n".encode("cp1252"))
    (folder / "chats.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
        '{"text": "of another format"}\n'
        '{"input": "and", "output": "a third"}\n'
    )
    (folder / "dump.sql").write_text(SQL)
    (folder / "page.html").write_text("<title>page</title><p>text</p>")
    (folder / "app.log").write_text("a log\n")
    (folder / "package.json").write_text('{"name": "x", "version": "1"}')
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.writestr("in/faq.csv", "q,a\nin the archive?,yes\n")
        archive.writestr("in/secret.csv", "name\nnobody\n")
    return folder


WORDS = (
    "--exclude package.json --exclude secret.csv --for faq.csv --input-column q --output-column a --for old "
    "--column body --encoding cp1252 --for *.sql --table posts --column body --strip-html --for *.log --format text"
)


def said(capsys: pytest.CaptureFixture, *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, capsys.readouterr().err


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_command_reads_it_all(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "rows.jsonl"
    assert main(["data", "ingest", str(folder), "--output", str(output), *WORDS.split()]) == 0
    rows = {row.pop("source").removeprefix(f"{folder}/"): row for row in rows_of(output)}
    assert rows == {
        "app.log": {"text": "a log\n"},
        "chats.jsonl:1": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        "chats.jsonl:2": {"text": "of another format"},
        "chats.jsonl:3": {"input": "and", "output": "a third"},
        "dump.sql!posts:1": {"text": "from the dump & back"},
        "faq.csv:2": {"input": "what?", "output": "that"},
        "more.zip!in/faq.csv:2": {"input": "in the archive?", "output": "yes"},
        "old/posts.csv:2": {"text": "r\xe9sum\xe9"},
        "page.html": {"text": "page\n\ntext"},
    }


def test_a_recipe_has_the_same_options(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parser = argparse.ArgumentParser()
    from tpu_tune.cli.data import ingest as command

    command.add(Commands(parser.add_subparsers()))
    given = parser.parse_args(["ingest", str(folder), "--output", "x", *WORDS.split()])
    recipe = settings.from_dict(
        {
            "inputs": [str(folder)],
            "output_dir": str(tmp_path / "done"),
            "steps": ["ingest"],
            "ingest": {"for_files": given.for_files, "exclude": given.exclude},
        }
    )
    recipe = settings.from_dict(json.loads(json.dumps(recipe.to_dict())))  # as a report has it
    [done] = recipes.run_recipe(recipe)
    assert done.report["rows_out"] == 9 and done.report["excluded"] == 2
    assert not (tmp_path / "done" / "bad.jsonl").exists()
    recipe.ingest.for_files = {}
    with pytest.raises(UserError, match="problems in"):
        recipes.run_recipe(recipe)
    assert len(rows_of(tmp_path / "done" / "bad.jsonl")) == 4


def test_all_problems_are_told_in_one_pass(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "short.csv").write_text("text,n\na,1\nb\nc\nd,4\n")
    (folder / "list.json").write_text('[{"text": "a"}, 5, {"text": "c"}]')
    bad, output = tmp_path / "bad.jsonl", tmp_path / "rows.jsonl"
    status, err = said(capsys, "data", "ingest", folder, "--output", output, "--bad", bad)
    lines = [line.replace(f"{folder}/", "") for line in caplog.messages]
    assert status == 1 and not output.exists()
    assert [line.partition(": ")[0] for line in lines] == [
        "dump.sql",
        "faq.csv",
        "list.json, item 2",
        "more.zip!in/faq.csv",
        "package.json",
        "short.csv:3",
        "old/posts.csv:2",
    ]
    assert "which table? give --table NAME; there is: users (id, name); posts (id, body)" in lines[0]
    assert "which column holds the text?" in lines[1] and "there is: q, a, id" in lines[1]
    assert "not a JSON object but a int" in lines[2] and "(and 1 more in this source)" in lines[5]
    assert "8 problems in 7 of 9 sources: --for PATTERN" in err and f"The first: {folder}/dump.sql: which table?" in err
    assert "--exclude PATTERN" in err and "--skip-bad" in err and f"all are in {bad}" in err
    told = rows_of(bad)
    assert len(told) == 8 and [one["where"] for one in told if one["where"].startswith(str(folder / "short.csv"))] == [
        f"{folder}/short.csv:3",
        f"{folder}/short.csv:4",
    ]
    # What is only bad can be skipped; what needs an option is not, and is still told whole.
    caplog.clear()
    status, err = said(capsys, "data", "ingest", folder, "--output", output, "--skip-bad")
    assert status == 1 and "--skip-bad" not in err and len(caplog.messages) == 7
    for name in ("dump.sql", "faq.csv", "package.json", "more.zip"):
        assert said(capsys, "data", "ingest", folder / name, "--output", output, "--skip-bad")[0] == 1
    ways = ["--exclude", "*.sql", "--exclude", "*faq.csv", "--exclude", "package.json", "--exclude", "more.zip"]
    assert said(capsys, "data", "ingest", folder, "--output", output, "--skip-bad", "--bad", bad, *ways)[0] == 0
    assert len(rows_of(bad)) == 4 and {one["option"] for one in rows_of(bad)} == {False}


def test_worker_processes_tell_the_same(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    found = []
    for workers in (1, 2):
        with pytest.raises(UserError) as error:
            ingest([str(folder)], str(tmp_path / "o"), IngestOptions(), workers, bad=str(tmp_path / f"bad-{workers}"))
        found.append((str(error.value).replace(f"bad-{workers}", "bad"), (tmp_path / f"bad-{workers}").read_bytes()))
    assert found[0] == found[1] and sorted(path.name for path in tmp_path.iterdir()) == ["bad-1", "bad-2", "messy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--for *.cvs --column body", "no file matches '*.cvs', for which there are options"),
        ("--for faq.csv --column nope", "faq.csv: there is no column 'nope'; there is: q, a, id"),
        ("--for faq.csv --input-column q", "for 'faq.csv': --input-column and --output-column belong together"),
        ("--for faq.csv --encoding rot13", "for 'faq.csv': --encoding rot13 is unknown"),
        ("--for faq.csv --column q --table posts", "no file that matches 'faq.csv' has a table 'posts'"),
        ("--for dump.sql --table post", "dump.sql: there is no table 'post'; there is: users (id, name); posts"),
        ("--for dump.sql --column body", "dump.sql: which table? give --table NAME; there is: users (id, name)"),
        ("--for chats.jsonl --column body", "chats.jsonl: there is no column 'body'; there is: messages"),
        ("--for more.zip --column q --exclude secret.csv --columns z", "more.zip!in/faq.csv: there is no column 'z'"),
    ],
)
def test_what_is_missing_is_said(folder: pathlib.Path, capsys: Any, words: str, message: str) -> None:
    name = words.split()[1] if "*" not in words else "page.html"
    status, err = said(capsys, "data", "ingest", folder / name, "--output", folder / "o.jsonl", *words.split())
    assert status == 1 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"*.csv": {"colunm": "x"}}, "for '*.csv': 'colunm' is no option for some files"),
        ({"*.csv": {"column": 7}}, "for '*.csv': column cannot be 7"),
        ({"*.csv": {"gap_minutes": float("nan")}}, "gap_minutes cannot be nan"),
        ({"*.csv": {"columns": [["a"]]}}, "columns cannot be [['a']]"),
        ({"*.csv": {"format": "exe"}}, "--format exe is unknown"),
        ({"*.csv": "x"}, "the options for '*.csv' must be names with values"),
    ],
)
def test_options_of_a_recipes_patterns_are_checked(folder: pathlib.Path, given: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        ingest([str(folder)], str(folder / "o"), IngestOptions(for_files=given))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "meant", "not_meant"),
    [
        ("*.csv", ["a.csv", "x/A.CSV", "x.zip!y/b.csv", "c.csv.gz"], ["a.csvx", "csv"]),
        ("old/*.csv", ["old/a.csv", "x/old/a.csv", "p.zip!old/a.csv"], ["older/a.csv", "a.csv"]),
        ("old", ["old/a.csv", "x/old/deep/b.html"], ["bold/a.csv", "old.csv"]),
        ("more.zip", ["x/more.zip", "x/more.zip!in/a.csv"], ["more.zip.txt"]),
        ("x/*", ["x/a", "x/y/z.csv"], ["y/a"]),
        ("datasets:*", ["datasets:me/rows"], ["rows"]),
    ],
)
def test_patterns(pattern: str, meant: list[str], not_meant: list[str]) -> None:
    assert all(patterns.matches(pattern, name) for name in meant)
    assert not any(patterns.matches(pattern, name) for name in not_meant)


def test_the_first_pattern_counts_and_columns_go_together() -> None:
    options = IngestOptions(
        column="body", encoding="cp1252", for_files={"a.csv": {"columns": "x,y=z"}, "*.csv": {"input_column": "q"}}
    )
    own = patterns.for_file(options, "in/a.csv")
    assert (own.column, own.input_column, own.columns, own.encoding) == ("", "", (("x", "x"), ("y", "z")), "cp1252")
    assert patterns.for_file(options, "b.csv").input_column == "q" and patterns.for_file(options, "b.txt") is options


# Encodings


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "shift_jis", ""])
def test_a_byte_order_mark_wins(tmp_path: pathlib.Path, mark: str, encoding: str) -> None:
    text = "caf\xe9 \u732b"
    for name, content in (
        ("a.txt", text),
        ("a.html", f"<p>{text}"),
        ("a.csv", f"text\n{text}\n"),
        ("a.json", json.dumps([{"text": text}], ensure_ascii=False)),
        ("a.jsonl", json.dumps({"text": text}, ensure_ascii=False) + "\n"),
        ("a.sql", f"INSERT INTO t (text) VALUES ('{text}');"),
    ):
        (tmp_path / name).write_bytes(content.encode(mark))
        found = [row["text"] for row in read_source(str(tmp_path / name), IngestOptions(encoding=encoding))]
        assert found == [text], name


def test_json_lines_have_an_encoding_too(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "caf\xe9"}\r\n\r\n{"text": "two"}\n'.encode("cp1252"))
    assert [row["text"] for row in read_source(str(path), IngestOptions(encoding="cp1252"))] == ["caf\xe9", "two"]
    path.write_bytes(b'{"text": "\x81"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not valid UTF-8"):
        list(read_source(str(path), IngestOptions(encoding="cp1252")))
    path.write_bytes(codecs.BOM_UTF16_LE + '{"text": "caf\xe9"}\n'.encode("utf-16-le") + b"\x00")
    with pytest.raises(UserError, match="a.jsonl"):
        list(read_source(str(path), IngestOptions()))


# HTML in cells


def test_html_in_cells_becomes_text(tmp_path: pathlib.Path) -> None:
    post = "<p>One &amp; <b>two</b></p><ul><li>a<li>b</ul><script>x()</script>"
    rows = [
        {"text": post},
        {"text": "plain, 1 < 2 and\ntwo lines"},
        {"text": "as it\nis"},
        {"text": "<img src=x>"},
        {"input": "<i>q</i>", "output": "<i>a</i>"},
        {"messages": [{"role": "user", "content": "<i>q</i>"}, {"role": "assistant", "content": "a<br>b"}]},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows))
    made = list(read_source(str(path), IngestOptions(strip_html=True)))
    for row in made:
        row.pop("source")
    assert made[0] == {"text": "One & two\n\n- a\n- b"}
    assert made[1] == rows[1] and made[2] == {"text": "as it\nis"}
    assert made[3:] == [
        {"input": "q", "output": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\nb"}]},
    ]
    assert [row["text"] for row in read_source(str(path)) if "text" in row][0] == post
    for text in ("a<b", "if (a<b) {}\n", "vector<int> v;", "<think>so</think>", "<3", "AT&T"):
        assert stripped(text) == text
    assert stripped("a &lt; b\nc &amp; d") == "a < b\nc & d" and stripped("?a=1&copy=2") == "?a=1&copy=2"
    assert stripped("vector<int> is <b>it</b>") == "vector<int> is it"
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE t (title TEXT, body TEXT)")
    connection.execute("INSERT INTO t VALUES ('<b>t</b>', ?)", [post])
    connection.commit()
    connection.close()
    options = IngestOptions(strip_html=True, columns=(("title", "title"), ("body", "body")))
    [row] = read_source(str(tmp_path / "a.db"), options)
    assert (row["title"], row["body"]) == ("t", made[0]["text"])
