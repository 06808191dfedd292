"""`data clean --repeated-text`: what stands on most pages of a site goes, and nothing else does."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest

from tpu_tune.cli import main
from tpu_tune.data.clean import CleanOptions, clean
from tpu_tune.data.clean.repeated import find_repeated, site_of
from tpu_tune.data.ingest import IngestOptions, ingest

OPTIONS = CleanOptions(repeated_text=0.5)
FOOTER = "\n\n© 2001-{}, Somebody's Foundation.\nAll rights are reserved.\nNote\nPowered by a generator of sites."


def without(rows: list[dict[str, Any]], options: CleanOptions = OPTIONS) -> list[str]:
    repeated = find_repeated(rows, options)
    return [repeated.without(row["text"], site_of(row))[0] for row in rows]


def site(name: str, texts: list[str], end: str) -> list[dict[str, Any]]:
    return [{"text": text + end, "source": f"{name}/{number}/index.html"} for number, text in enumerate(texts)]


BODIES = [f"Page {name}\n\nThe text of {name}, of {name} alone.\n}}" for name in "abcdefgh"]


def test_footers_of_each_site_go() -> None:
    one = site("crawl/one", BODIES, FOOTER.format(2024))
    two = site("crawl/two", BODIES[:5], "\n\nTwo's own last line of text\nIndex |\nThe home of two, since 1999")
    lone = site("crawl/three", BODIES[:2], FOOTER.format(7))
    made = without([*one, *two, *lone])
    assert made[:8] == BODIES and made[8:13] == BODIES[:5]
    assert made[13:] == BODIES[:2]  # too few pages for a site, but most of the crawl's have this footer
    assert without(lone) == [row["text"] for row in lone]


def test_a_pages_own_lines_stay() -> None:
    dates = [f"Last seen on {day}, by {day}'s editor" for day in "Mon Tue Wed Thu Fri Sat Sun Mo".split()]
    rows = [
        {
            "text": f"Site of a name | Home\n{body}\n\nThe rights are reserved by all.\n{date}\nMade with care by us.",
            "source": "p/x",
        }
        for body, date in zip(BODIES, dates, strict=True)
    ]
    assert without(rows) == [f"{body}\n\n{date}" for body, date in zip(BODIES, dates, strict=True)]
    # The same sentence in the middle of a page is text of that page.
    middle = "Start of it\n" + "own line\n" * 0 + "\n".join(f"own {n}" for n in range(40)) + "\nMade with care by us.\n"
    middle += "\n".join(f"more {n}" for n in range(40))
    assert without([*rows, {"text": middle, "source": "p/y"}])[-1] == middle


def test_numbers_do_not_hide_a_repetition_and_short_lines_are_no_footer() -> None:
    rows = [
        {"text": f"{body}\nPage {n} of 8 pages, read {n * 7} times", "source": "p/x"} for n, body in enumerate(BODIES)
    ]
    assert without(rows) == BODIES
    code = [{"text": f"def f{n}():\n    x = '{'ab' * n}'\n}}", "source": "p/x"} for n in range(9)]
    assert without(code) == [row["text"] for row in code]


def test_the_share_is_what_is_asked_for() -> None:
    texts = [body + "\nThis line is on some of the pages" * (n < 3) for n, body in enumerate(BODIES + ["i i", "j j"])]
    rows = [{"text": text, "source": "p/x"} for text in texts]
    assert without(rows, CleanOptions(repeated_text=0.31)) == texts
    assert without(rows, CleanOptions(repeated_text=0.3)) == [*BODIES, "i i", "j j"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"source": "a/b/c.html"}, "a/b"),
        ({"source": "/a/b.zip!c/d.html"}, "a/b.zip/c"),
        ({"source": "a/posts.csv:17"}, "a/posts.csv"),
        ({"source": "a/x.json, item 3"}, "a/x.json"),
        ({"source": "dump.sql!posts:3"}, "dump.sql/posts"),
        ({"source": "a/x.csv:3", "url": "https://e.org/docs/page.html?x=1/2"}, "e.org/docs"),
        ({"source": None}, ""),
        ({}, ""),
    ],
)
def test_sites(row: dict[str, Any], expected: str) -> None:
    assert site_of(row) == expected


def test_the_command_reports_it(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    rows = [*site("s", [*BODIES, ""], FOOTER.format(1)), {"input": "a", "output": FOOTER.format(1), "source": "s/x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "clean", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "o.jsonl")]
    assert main([*words, "--repeated-text", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "10 rows in = 9 out + 1 dropped\nof the rows out: 8 with text repaired, masked or taken out\n" in out
    assert "text repeated on a site's pages" in out and "Somebody's Foundation" in out
    made = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["text"] for row in made[:-1]] == BODIES and made[-1] == rows[-1]
    assert main([*words, "--dry-run"]) == 0 and "of the rows out" not in capsys.readouterr().out
    os.mkfifo(tmp_path / "pipe")
    assert main(["data", "clean", str(tmp_path / "pipe"), "--dry-run", "--repeated-text", "0.5"]) == 1
    assert "is read twice" in capsys.readouterr().err


def test_sphinx_pages(python_docs_dir: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Of Python's documentation the seven lines of the footer go from every page, and not a line else."""
    raw, made = tmp_path / "raw.jsonl", tmp_path / "made.jsonl"
    ingest([str(python_docs_dir / "tutorial"), str(python_docs_dir / "c-api")], str(raw), IngestOptions(), workers=1)
    report = clean([raw], made, CleanOptions(lists=(), exact_duplicates=False, repeated_text=0.5))
    before, after = ([json.loads(line)["text"] for line in path.read_text().splitlines()] for path in (raw, made))
    assert len(before) == len(after) == report["rows_changed"] > 70
    for old, new in zip(before, after, strict=True):
        assert old.startswith(new + "\n")
        footer = old[len(new) :].strip().split("\n")
        assert len(footer) == 7 and footer[0].startswith("©") and footer[-1].startswith("Created using Sphinx")
