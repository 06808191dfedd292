"""SQL dumps: the guide's snippets with sqlparse, rows against SQLite itself, and what MySQL and PostgreSQL write."""

import contextlib
import sqlite3

import pytest
import sqlparse
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_tune.data.ingest import IngestOptions, Tally, read_source, sql, sql_tokens
from tpu_tune.data.streams import Skipped
from tpu_tune.errors import UserError

NASTY = [
    "it's",
    "a;b",
    "'; DROP TABLE x; --",
    "two\nlines\r\n",
    "🐍 é",
    "",
    "back\\slash \\' \\n",
    '"double"',
    "(a, b), (c)",
    "-- no comment",
    "/* nor this */",
    "$$ $tag$",
    "NULL",
    "`tick`",
    "[x]",
    "tab\t",
    "x" * 5000,
    "E'x'",
    "ends in \\",
]


def dump(tmp_path, text, **options):
    path = tmp_path / "dump.sql"
    path.write_bytes(text.encode("utf-8"))
    tally = Tally(Skipped(options.pop("skip_bad", False)))
    return list(read_source(str(path), IngestOptions(**options), tally)), tally


def texts(tmp_path, text, **options):
    return [row["text"] for row in dump(tmp_path, text, **options)[0]]


# The guide's snippets


def test_the_guides_snippets():
    raw = "select * from foo; select * from bar;"
    statements = sql.split(raw)
    assert statements == ["select * from foo;", "select * from bar;"]
    assert sqlparse.format(statements[0], reindent=True, keyword_case="upper") == "SELECT *\nFROM foo;"
    assert sql.split("insert into a values ('x; y'); select 1;") == ["insert into a values ('x; y');", "select 1;"]
    assert [str(token) for token in sqlparse.parse("select * from foo")[0].tokens] == [
        "select",
        " ",
        "*",
        " ",
        "from",
        " ",
        "foo",
    ]


def test_rows_of_the_simplest_dump(tmp_path):
    rows, _ = dump(
        tmp_path,
        "create table foo (id int, body text);\ninsert into foo values (1, 'a; b'), (2, 'it''s');",
        column="body",
    )
    where = f"{tmp_path / 'dump.sql'}!foo"
    assert rows == [{"text": "a; b", "source": f"{where}:1"}, {"text": "it's", "source": f"{where}:2"}]


# SQLite, which can read its own dumps


def sqlite_dump(rows):
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute(
            'CREATE TABLE "po""sts" (id INTEGER PRIMARY KEY, "the body" TEXT, score REAL, CHECK (id > -1))'
        )
        database.executemany('INSERT INTO "po""sts" VALUES (?, ?, ?)', rows)
        database.execute('CREATE INDEX i ON "po""sts" (score)')
        database.execute('CREATE TRIGGER t AFTER INSERT ON "po""sts" BEGIN INSERT INTO log VALUES (\'no\'); END')
        return "\n".join(database.iterdump())


@pytest.mark.parametrize("piece", [2**20, 7])
def test_sqlite_dumps_come_back(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sql_tokens, "PIECE_CHARACTERS", piece)  # pieces end anywhere
    given = [(number, text, -number / 4) for number, text in enumerate(NASTY)]
    columns = (("id", "id"), ("score", "score"))
    rows, _ = dump(tmp_path, sqlite_dump(given), column="the body", columns=columns)
    assert [(row["id"], row["text"], row["score"]) for row in rows] == given


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20), min_size=1, max_size=5
    )
)
def test_any_text_of_a_sqlite_dump_comes_back(tmp_path_factory, cells):
    text = sqlite_dump([(number, cell, 1.0) for number, cell in enumerate(cells)])
    assert texts(tmp_path_factory.mktemp("sql"), text, column="the body") == cells


def test_what_the_sqlite_shell_writes_for_line_breaks(tmp_path):
    text = (
        "PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\nCREATE TABLE t(key TEXT, value BLOB);\n"
        "INSERT INTO t VALUES(replace(replace('a\\r\\nb','\\r',char(13)),'\\n',char(10)),NULL);\n"
        "INSERT INTO t VALUES('x'||char(9,10)||'y',X'68c3a9');\n"
        "INSERT INTO t(value,key) VALUES(1.5,CAST('c' AS TEXT));\nCOMMIT;\n"
    )
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(text)
        expected = [key for (key,) in database.execute("SELECT key FROM t")]
    rows, _ = dump(tmp_path, text, column="key", columns=(("value", "value"),))
    assert [row["text"] for row in rows] == expected == ["a\r\nb", "x\t\ny", "c"]
    assert [row["value"] for row in rows] == [None, "hé", 1.5]


# MySQL and MariaDB

MYSQL = r'''-- MySQL dump 10.13  Distrib 8.0.36
/*!40101 SET NAMES utf8mb4 */;
DROP TABLE IF EXISTS `posts`;
CREATE TABLE `posts` (
  `id` int NOT NULL AUTO_INCREMENT,
  `title` varchar(20) CHARACTER SET latin1 DEFAULT 'a,b (c)' COMMENT 'it''s; x',
  `body` text,
  `price` decimal(5,2) DEFAULT NULL,
  PRIMARY KEY (`id`),
  KEY `title` (`title`), FULLTEXT KEY `f` (`body`)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4;
LOCK TABLES `posts` WRITE;
/*!40000 ALTER TABLE `posts` DISABLE KEYS */;
INSERT INTO `posts` VALUES (1,'a','it\'s \"q\" \\ end\\',1.50),(2,_utf8mb4'b','line\nbreak\ttab\0 \% \Z;',-2),
(3,NULL,'doubled '' here 🐍; -- no','3'),(4,"d","say \"x\" it's ""y""",NULL);
INSERT IGNORE INTO `posts` (`body`,`id`) VALUES (_binary 'bin',0x41) ON DUPLICATE KEY UPDATE `id`=VALUES(`id`);
# a comment with 'one quote
REPLACE INTO `posts` SELECT * FROM other;
DELIMITER ;;
/*!50003 CREATE*/ /*!50003 TRIGGER `t` BEFORE INSERT ON `posts`
FOR EACH ROW BEGIN INSERT INTO `log` VALUES ('no'); END */;;
CREATE PROCEDURE p() BEGIN INSERT INTO posts VALUES (9,'no','no',9); SELECT 'it''s'; END ;;
DELIMITER ;
INSERT INTO `posts` VALUES (5,'e','last',0);
'''


@pytest.mark.parametrize("piece", [2**20, 5])
def test_mysql(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sql_tokens, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(sql_tokens, "dialect_of", lambda head: "mysql")  # a head of five characters does not tell
    rows, _ = dump(tmp_path, MYSQL, column="body", columns=(("id", "id"), ("title", "title"), ("price", "price")))
    assert [row["text"] for row in rows] == [
        'it\'s "q" \\ end\\',
        "line\nbreak\ttab\0 % \x1a;",
        "doubled ' here 🐍; -- no",
        'say "x" it\'s "y"',
        "bin",
        "last",
    ]
    assert [row["id"] for row in rows] == [1, 2, 3, 4, "A", 5]
    assert [row["title"] for row in rows] == ["a", "b", None, "d", None, "e"]
    assert [row["price"] for row in rows] == [1.5, -2, "3", None, None, 0]


def test_whose_dump_it_is():
    assert sql_tokens.dialect_of(MYSQL) == "mysql"
    assert sql_tokens.dialect_of(POSTGRES) == "postgres"
    assert sql_tokens.dialect_of("PRAGMA foreign_keys=OFF;\nBEGIN TRANSACTION;\nCREATE TABLE `a` (b);") == "standard"
    assert sql_tokens.dialect_of("INSERT INTO `a` VALUES ('it\\'s');") == "mysql"
    assert sql_tokens.dialect_of("INSERT INTO a VALUES ('C:\\');") == "standard"


# PostgreSQL

POSTGRES = r"""--
-- PostgreSQL database dump
--
SET standard_conforming_strings = on;
CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS $_$ BEGIN INSERT INTO posts VALUES ('no'); END; $_$;
CREATE TABLE public.posts (
    id integer NOT NULL,
    body text DEFAULT 'x;'::text,
    tags text[],
    CONSTRAINT positive CHECK ((id > 0))
);
CREATE TABLE public.users (name character varying(20));
COPY public.users (name) FROM stdin;
ann
\.
COPY public.posts (id, body, tags) FROM stdin;
1	it's; a \\ slash\nline\ttab \x41\101	{a,b}
2	\N	\N
3	🐍	{}

\.
INSERT INTO public.posts (id, body) VALUES (4, E'it\'s\n\u00e9 \\ \x41''q'), (5, 'plain \n'::character varying(20));
INSERT INTO public.posts VALUES (6, $$dollar 'quoted'; $x$ text$$, ARRAY['a']);
SELECT pg_catalog.setval('public.posts_id_seq', 6, true);
"""


@pytest.mark.parametrize("piece", [2**20, 400, 11])
def test_postgres(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sql_tokens, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(sql_tokens, "dialect_of", lambda head: "postgres")
    rows, tally = dump(tmp_path, POSTGRES, table="public.posts", column="body", columns=(("id", "id"),), skip_bad=True)
    assert [(row["id"], row["text"]) for row in rows] == [
        ("1", "it's; a \\ slash\nline\ttab AA"),
        ("3", "🐍"),
        (4, "it's\né \\ A'q"),
        (5, "plain \\n"),
    ]
    assert tally.empty == 1
    assert [str(bad).partition("dump.sql")[2] for bad in tally.skipped.examples] == [
        "!posts:4: 1 value for 3 columns",
        "!posts:7: value 3 is no literal (ARRAY); only a database can tell it",
    ]
    assert texts(tmp_path, POSTGRES, table="users") == ["ann"]
    with pytest.raises(
        UserError, match=r"which table\? give --table NAME; there is: posts \(id, body, tags\); users \(name\)$"
    ):
        dump(tmp_path, POSTGRES)
    with pytest.raises(UserError, match=r"there is no table 'post'; there is: posts"):
        dump(tmp_path, POSTGRES, table="post")
    with pytest.raises(UserError, match=r"dump\.sql!posts: there is no column 'text'; there is: id, body, tags$"):
        dump(tmp_path, POSTGRES, table="posts", column="text")


# Columns, and what is wrong with a dump


@pytest.mark.parametrize(
    ("statement", "table", "columns"),
    [
        ("CREATE TABLE t (a int, b varchar(20), PRIMARY KEY (a, b))", "t", ["a", "b"]),
        (
            'CREATE TABLE IF NOT EXISTS s."T x" ("a b" int DEFAULT (1 + 2), [c] text, `d``e` text)',
            "T x",
            ["a b", "c", "d`e"],
        ),
        (
            "CREATE TABLE user (key TEXT, value TEXT, index int, order_ int UNIQUE (a))",
            "user",
            ["key", "value", "index", "order_"],
        ),
        (
            "CREATE TABLE t (a int, -- no, b\n b text /* c, d */, KEY `k` (`a`), "
            "CONSTRAINT c FOREIGN KEY (a) REFERENCES u (x))",
            "t",
            ["a", "b"],
        ),
        ("CREATE TABLE t AS SELECT 1", "", []),
        ("", "", []),
    ],
)
def test_columns_of_a_table(statement, table, columns):
    assert sql.columns_of(statement) == (table, columns)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("insert into t values (1, 'never closed);", "line 1: a quote is opened that nothing closes"),
        ("insert into t values (1, 'a'), (2", "it ends inside a row; is it cut short"),
        ("insert into t values (1, 'a'),", "ends inside an INSERT"),
        ("create table t (a int, b text);\ninsert into t values (1, 'a', 2);", "!t:1: 3 values for 2 columns"),
        (
            "insert into t (a, b) values (1, now()), (2, 'x');",
            r"!t:1: value 2 is no literal \(NOW\(...\)\); only a database can tell",
        ),
        ("just words, no SQL", "holds no table and no row"),
        ("-- PostgreSQL database dump\nCOPY t (a) FROM stdin;\none\n", "ends inside COPY data"),
    ],
)
def test_dumps_that_are_not_whole(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        dump(tmp_path, text, column="b" if "b)" in text or "b text" in text else "a" if "COPY" in text else "column2")


def test_only_the_bad_rows_of_an_insert_are_skipped(tmp_path):
    text = "insert into t (a, b) values (now(), 'a'), (rand(1, (2)) + 3, 'b'), (-4, 'c'), (1 +, 'd'), (), (5, 'e');"
    rows, tally = dump(tmp_path, text, column="b", columns=(("a", "a"),), skip_bad=True)
    assert [(row["a"], row["text"]) for row in rows] == [(-4, "c"), (5, "e")]
    assert tally.skipped.count == 4


def test_dumps_without_names_of_columns(tmp_path):
    assert texts(tmp_path, "insert into t values (1, 'a');", column="column2") == ["a"]
    with pytest.raises(UserError, match="there is no column 'body'; there is: column1, column2$"):
        dump(tmp_path, "insert into t values (1, 'a');", column="body")


def test_sql_server(tmp_path):
    text = (
        "CREATE TABLE [dbo].[T] ([id] [int] NOT NULL, [body] [nvarchar](50) NULL)\nGO\n"
        "INSERT [dbo].[T] ([id], [body]) VALUES (1, N'it''s é')\nINSERT [dbo].[T] ([id], [body]) VALUES (2, N'b')\nGO\n"
    )
    assert texts(tmp_path, text, column="body") == ["it's é", "b"]
