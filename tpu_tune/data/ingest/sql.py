"""Rows of SQL dumps: INSERT and COPY, as mysqldump, pg_dump and sqlite3's `.dump` write them; nothing is executed.

A dump is read once, as a stream. Columns are named by the INSERT or COPY itself, or by the CREATE TABLE before it,
which sqlparse reads. Values are literals; of functions, those that sqlite3 writes for line breaks are understood
(`replace`, `char`, `unistr`), and `CAST`; a row with any other is a bad row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlparse

from tpu_tune.data.formats import RowError
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, row_of
from tpu_tune.data.ingest.encodings import decoded, misfit
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.picking import Pick, note_columns, picker
from tpu_tune.data.ingest.sql_tokens import END, SIGN, WORD, Tokens, copied
from tpu_tune.data.ingest.sql_values import read_name, read_row
from tpu_tune.data.ingest.sqlite import choose
from tpu_tune.errors import UserError, counted

# What begins a constraint and no column; the second set are names of columns too, where no name or bracket follows.
_RESERVED = frozenset("CONSTRAINT PRIMARY UNIQUE CHECK FOREIGN LIKE".split())
_INDEX = frozenset("KEY INDEX FULLTEXT SPATIAL EXCLUDE".split())


def split(text: str) -> list[str]:
    """Split SQL into statements, each with its semicolon: `sqlparse.split`; for texts of a moderate size."""
    return sqlparse.split(text)


def columns_of(statement: str) -> tuple[str, list[str]]:
    """Return the table and the columns of a CREATE TABLE, ("", []) where there are none to read."""
    try:
        parsed = sqlparse.parse(statement)[0].flatten()
    except (IndexError, sqlparse.exceptions.SQLParseError):
        return "", []
    words = [t.value for t in parsed if not t.is_whitespace and t.ttype not in sqlparse.tokens.Comment]
    start = words.index("(") if "(" in words else 0
    if not start:
        return "", []
    depth, begins, columns = 1, True, []
    for word, after in zip(words[start + 1 :], [*words[start + 2 :], ""], strict=True):
        first = word.upper().partition(" ")[0]  # PRIMARY KEY is one word to sqlparse
        is_index = first in _INDEX and (after[:1] in ("`", '"', "[", "(") or after.upper() in ("KEY", "INDEX"))
        if begins and first not in _RESERVED and not is_index:
            columns.append(_plain_name(word))
        depth += (word == "(") - (word == ")")
        begins = depth == 1 and word == ","
        if not depth:
            break
    return _plain_name(words[start - 1]), columns


def _plain_name(name: str) -> str:
    if name[:1] == "[":
        return name[1:-1]
    return name[1:-1].replace(name[0] * 2, name[0]) if name[:1] in ('"', "`") else name


def read(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the rows of one table of a dump; `source` is `file!table:row`, rows numbered as they come.

    Raises:
      UserError: the table or a column is missing, or several tables have rows and none is named; lists what is there.
    """
    with blob.open() as file:
        dump = _Dump(blob.name, Tokens(decoded(file, options.encoding)), options, tally)
        yield from dump.rows()
        if not dump.chosen:
            if options.table:
                choose(blob.name, dump.tables, dump.wanted)
            elif not dump.tables:
                raise BadSource("holds no table and no row: is it a SQL dump?")


class _Dump:
    """One dump being read."""

    def __init__(self, name: str, tokens: Tokens, options: IngestOptions, tally: Tally):
        self.name, self.tokens, self.options, self.tally = name, tokens, options, tally
        self.tables: dict[str, list[str]] = {}  # all that were named so far, with their columns
        self.wanted = options.table.rpartition(".")[2]
        self.chosen = ""
        self.count = 0
        self.delimiter = ";"
        self._pick: Pick | None = None
        self._all_columns: list[str] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table that is asked for."""
        while (token := self.tokens.next())[0] != END:
            word = token[1].upper() if token[0] == WORD else ""
            if word == "DELIMITER":
                self.delimiter = self.tokens.rest_of_line().strip() or ";"
            elif self.delimiter != ";":
                self._skip_to_delimiter()
            elif word in ("INSERT", "REPLACE"):
                yield from self._insert()
            elif word == "COPY":
                yield from self._copy()
            elif word == "CREATE":
                self._create()
            elif token != (SIGN, ";") and word != "GO":
                self._skip()

    # Statements that hold no rows

    def _skip(self) -> None:
        while (token := self.tokens.next())[0] != END and token != (SIGN, ";") and not self._begins(token):
            pass

    def _begins(self, token: tuple[str, Any]) -> bool:
        """Whether this word begins another statement; it is then put back. SQL Server writes no semicolons."""
        begins = self.tokens.batches and token[0] == WORD and token[1].upper() in ("GO", "INSERT")
        if begins:
            self.tokens.give_back(token)
        return begins

    def _skip_to_delimiter(self) -> None:
        """Pass over statements that end in another mark (bodies of triggers), until the next DELIMITER."""
        self.tokens.rest_of_line()
        for line in self.tokens.raw_lines():
            if line.upper().startswith("DELIMITER "):
                self.delimiter = line.split(None, 1)[1].strip()
                if self.delimiter == ";":
                    return

    def _create(self) -> None:
        self.tokens.keep_text("CREATE ")
        kind, depth = "", 0
        while (token := self.tokens.next())[0] != END:
            word = token[1].upper() if token[0] == WORD else ""
            kind = kind or (word if word in ("TABLE", "TRIGGER", "FUNCTION", "PROCEDURE", "EVENT") else "")
            if kind and kind != "TABLE":  # their bodies hold statements
                depth += (word in ("BEGIN", "CASE")) - (word == "END")
            if (token == (SIGN, ";") and depth <= 0) or self._begins(token):
                break
        written, self.tokens.text = "".join(self.tokens.text), None
        table, columns = columns_of(written) if kind == "TABLE" else ("", [])
        if table:
            self.tables[table] = columns

    # Rows

    def _column_names(self) -> list[str]:
        """Read `(a, b)` where it stands, else []."""
        names: list[str] = []
        if self.tokens.peek() != (SIGN, "("):
            return names
        self.tokens.next()
        while (token := self.tokens.next())[0] != END and token != (SIGN, ")"):
            if token != (SIGN, ","):
                names.append(str(token[1]))
        return names

    def _take(self, table: str, columns: list[str]) -> list[str] | None:
        """The columns of the current statement, None where its rows are not of the table asked for."""
        known = self.tables.setdefault(table, columns)
        if not known:
            self.tables[table] = known = columns
        if self.wanted and table != self.wanted:
            return None
        if self.chosen and table != self.chosen:
            self._read_on()
            choose(self.name, self.tables, self.wanted)
        self.chosen = table
        self.tally.met.add(f"table {self.options.table}")
        columns = columns or known
        # An INSERT may name fewer columns than the table has; the others are NULL to us.
        all_columns = known if set(columns) <= set(known) else columns
        if columns and (self._pick is None or all_columns != self._all_columns):
            self._all_columns = all_columns
            self._pick = self._picker(all_columns)
        return columns

    def _picker(self, columns: list[str]) -> Pick:
        note_columns(columns, self.options, self.tally)
        try:
            return picker(columns, self.options, f"{self.name}!{self.chosen}")
        except UserError:
            if not self.wanted:  # of several tables, it may be another that is meant
                self._read_on()
                choose(self.name, self.tables, "")
            raise

    def _read_on(self) -> None:
        """Look for the other tables that the dump has, to list them."""
        self._skip()
        while (token := self.tokens.next())[0] != END:
            if token == (WORD, "CREATE"):
                self._create()
            elif token not in ((SIGN, ";"), (WORD, "GO")):
                self._skip()

    def _row(self, columns: list[str], values: list[Any], reason: str) -> Iterator[dict[str, Any]]:
        self.count += 1
        where = f"{self.name}!{self.chosen}:{self.count}"
        if not columns:  # no CREATE TABLE names them
            columns = [f"column{number}" for number in range(1, len(values) + 1)]
            self._pick = self._pick or self._picker(columns)
        if reason or len(values) != len(columns):
            reason = reason or f"{counted(len(values), 'value')} for {counted(len(columns), 'column')}"
        elif any(isinstance(value, str) and misfit(value) for value in values):
            reason = "holds text that is not valid in its encoding (UTF-8, unless --encoding names another)"
        else:
            try:
                found = self._pick({**dict.fromkeys(self._all_columns), **dict(zip(columns, values, strict=True))})
            except RowError as error:
                reason = str(error)
            else:
                if found is None:
                    self.tally.empty += 1
                else:
                    yield row_of(where, **found)
                return
        self.tally.skipped.add(where, reason)

    def _insert(self) -> Iterator[dict[str, Any]]:
        """INSERT [words] [INTO] table [(columns)] [words] VALUES (..), (..) [words];"""
        token = self.tokens.next()
        while token[0] == WORD and token[1].upper() in (
            "LOW_PRIORITY",
            "DELAYED",
            "HIGH_PRIORITY",
            "IGNORE",
            "OR",
            "REPLACE",
            "ROLLBACK",
            "ABORT",
            "FAIL",
        ):
            token = self.tokens.next()
        if not (token[0] == WORD and token[1].upper() == "INTO"):
            self.tokens.give_back(token)
        table = read_name(self.tokens)
        columns = self._column_names()
        while (token := self.tokens.peek())[0] != END and token != (SIGN, ";"):
            word = token[1].upper() if token[0] == WORD else ""
            if word in ("VALUES", "VALUE"):
                break
            if word in ("SELECT", "WITH", "DEFAULT", "SET"):
                self._skip()
                return
            self.tokens.next()
        else:
            self._skip()
            return
        self.tokens.next()
        columns = self._take(table, columns)
        while self.tokens.peek() == (SIGN, "("):
            values, reason = read_row(self.tokens)
            if columns is not None:
                yield from self._row(columns, values, reason)
            if self.tokens.peek() == (SIGN, ","):
                self.tokens.next()
        token = self.tokens.peek()
        if token[0] == END:
            self.tally.skipped.add(
                f"{self.name}:{self.tokens.line()}", "the dump ends inside an INSERT; is it cut short?"
            )
        elif not self._begins(self.tokens.next()):
            self.tokens.give_back(token)
            self._skip()

    def _copy(self) -> Iterator[dict[str, Any]]:
        r"""COPY table (columns) FROM stdin; then a line a row, tabs between, \N for NULL, to the line `\.`."""
        table = read_name(self.tokens)
        columns = self._column_names()
        words = []
        while (token := self.tokens.next())[0] != END and token != (SIGN, ";"):
            words.append(str(token[1]).upper())
        if "STDIN" not in words:
            return
        as_csv = "CSV" in words or "BINARY" in words
        self.tokens.rest_of_line()
        taken = self._take(table, columns)
        for line in self.tokens.raw_lines():
            if line == "\\.":
                return
            if taken is None:
                continue
            reason = "COPY in CSV or binary format is not read; dump it without" if as_csv else ""
            values = [copied(value) for value in line.split("\t")]
            yield from self._row(taken, values, reason)
        self.tally.skipped.add(f"{self.name}:{self.tokens.line()}", "the dump ends inside COPY data; is it cut short?")
