"""The words of a SQL dump of any size: strings, names, numbers and signs, without white space and comments.

sqlparse knows every dialect's words, and takes time that grows with the square of a statement; an INSERT of a dump may
have a hundred megabytes. So a dump's statements are read here, as a stream; `sql` gives sqlparse the short ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tpu_tune.data import streams
from tpu_tune.data.ingest.blobs import BadSource
from tpu_tune.data.ingest.encodings import too_long

DIALECTS = ("standard", "mysql", "postgres")
STRING, NAME, WORD, NUMBER, SIGN, END = "string", "name", "word", "number", "sign", "end"
PIECE_CHARACTERS = 2**20
MAX_KEPT = 2**16

_SINGLE = {"standard": r"'(?:[^']++|'')*+'", "mysql": r"'(?:[^'\\]++|''|\\.)*+'"}
_DOUBLE = {"standard": r'"(?:[^"]++|"")*+"', "mysql": r'"(?:[^"\\]++|""|\\.)*+"'}


def _pattern(dialect: str) -> re.Pattern:
    quotes = "mysql" if dialect == "mysql" else "standard"
    hash_comment = r"|\#[^\n]*+(?:\n|\Z)" if dialect == "mysql" else ""
    dollar = r"|(?P<dollar>\$(?P<tag>(?:[A-Za-z_]\w*)?)\$.*?\$(?P=tag)\$)" if dialect == "postgres" else ""
    bracket = "" if dialect == "postgres" else r"|\[[^\]\n]*+\]"
    escaped = r"[Ee](?P<escaped>'(?:[^'\\]++|''|\\.)*+')|" if dialect != "mysql" else ""
    return re.compile(
        rf"""(?P<space>\s++|--[^\n]*+(?:\n|\Z){hash_comment}|/\*.*?\*/)
        |{escaped}(?P<hex>[Xx]'[0-9A-Fa-f\s]*+')
        |[NnBb]?(?P<single>{_SINGLE[quotes]})
        |(?P<double>{_DOUBLE[quotes]})
        |(?P<name>`(?:[^`]++|``)*+`{bracket}){dollar}
        |(?P<number>(?:\d++(?:\.\d*+)?|\.\d++)(?:[eE][+-]?\d++)?(?![\w.]))
        |(?P<word>[\w@$]++)
        |(?P<sign>::|\|\||.)""",
        re.VERBOSE | re.DOTALL,
    )


_PATTERNS = {dialect: _pattern(dialect) for dialect in DIALECTS}
_DOLLAR = re.compile(r"\$(?:[A-Za-z_]\w*)?\$")
_MYSQL = {"0": "\0", "b": "\b", "n": "\n", "r": "\r", "t": "\t", "Z": "\x1a"}
_POSTGRES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
# In E'..' and in COPY; a byte that is written as a number is taken for a character.
_ESCAPED = re.compile(
    r"\\(?:x(?P<hex>[0-9A-Fa-f]{1,2})|u(?P<long>[0-9A-Fa-f]{4})|(?P<octal>[0-7]{1,3})|(?P<other>.))|''", re.DOTALL
)
_COPIED = re.compile(r"\\(?:x(?P<hex>[0-9A-Fa-f]{1,2})|(?P<octal>[0-7]{1,3})|(?P<other>.))", re.DOTALL)


def dialect_of(head: str) -> str:
    """Whose dump it is, by its first lines: decides whether a backslash escapes."""
    if re.search(r"PostgreSQL database dump|\bstandard_conforming_strings\b|^COPY .+ FROM stdin", head, re.M | re.I):
        return "postgres"
    if re.search(r"^PRAGMA foreign_keys|^BEGIN TRANSACTION;", head, re.M):  # sqlite3's .dump
        return "standard"
    if re.search(r"MySQL dump|MariaDB dump|phpMyAdmin|/\*!\d{5}|\bENGINE *=|^(?:INSERT|REPLACE) .*INTO `", head, re.M):
        return "mysql"
    return "standard"


class Tokens:
    """Reads a dump word by word.

    Attributes:
      dialect: one of `DIALECTS`.
      batches: whether it is SQL Server's, whose statements end where the next begins.
      text: what was read since `keep_text`, as it was written, up to about `MAX_KEPT` characters; None before.
    """

    def __init__(self, file: Any):
        """Take the text of `encodings.decoded`."""
        self._file = file
        self._text, self._at, self._ended, self._lines = "", 0, False, 1
        self._more()
        self.dialect = dialect_of(self._text[: 2**16])
        self.batches = re.search(r"^GO\s*$|\[dbo\]", self._text[: 2**16], re.M) is not None
        self._match = _PATTERNS[self.dialect].match
        self.text: list[str] | None = None
        self._kept = 0
        self._waiting: tuple[str, Any] | None = None

    def line(self) -> int:
        """The line reached, from 1."""
        return self._lines + self._text.count("\n", 0, self._at)

    def peek(self) -> tuple[str, Any]:
        """The next word, without reading over it."""
        if self._waiting is None:
            self._waiting = self.next()
        return self._waiting

    def next(self) -> tuple[str, Any]:
        """The next word as (kind, value); the value of a string is what it means, of a word what is written.

        Raises:
          BadSource: a string or a comment has no end, or is longer than a row may be.
        """
        if self._waiting is not None:
            found, self._waiting = self._waiting, None
            return found
        while True:
            match = self._match(self._text, self._at)
            kind = match.lastgroup if match else ""
            if self._may_go_on(match, kind):
                if len(self._text) - self._at > streams.MAX_ROW_BYTES:
                    raise BadSource(f"line {self.line()}: a string or a comment is longer than {too_long()}")
                if not self._ended and self._more():
                    continue
                if match is None:
                    return END, ""
                if kind == "sign" and match[0] in "'\"`":
                    raise BadSource(f"line {self.line()}: a quote is opened that nothing closes; is it cut short?")
            if self.text is not None and self._kept < MAX_KEPT:
                self.text.append(match[0])
                self._kept += len(match[0])
            self._at = match.end()
            if kind != "space":
                return self._meaning(kind, match)

    def give_back(self, token: tuple[str, Any]) -> None:
        """Put a word back, to be returned by `next`."""
        self._waiting = token

    def keep_text(self, start: str) -> None:
        """Keep what is read from here on, in `text`."""
        self.text, self._kept = [start], 0

    def _may_go_on(self, match: re.Match | None, kind: str) -> bool:
        """Whether what was found might be longer, or something else, with more of the file at hand."""
        if match is None or match.end() == len(self._text):
            return True
        if kind == "sign":
            sign = match[0]
            if sign in "'\"`":
                return True
            if sign in "-/":
                return self._text.startswith("/*", self._at)
            return sign == "$" and self.dialect == "postgres" and _DOLLAR.match(self._text, self._at) is not None
        return kind == "word" and self._text[match.end()] == "'" and match[0] in ("E", "e", "X", "x")

    def _meaning(self, kind: str, match: re.Match) -> tuple[str, Any]:
        if kind == "single":
            return STRING, self._unquoted(match["single"], "'")
        if kind == "escaped":
            return STRING, _ESCAPED.sub(_escape, match["escaped"][1:-1])
        if kind == "hex":
            digits = re.sub(r"\s", "", match[0][2:-1])
            return STRING, bytes.fromhex(digits) if len(digits) % 2 == 0 else digits
        if kind == "double":
            return NAME, self._unquoted(match["double"], '"')
        if kind == "name":
            quoted = match["name"]
            return NAME, quoted[1:-1] if quoted[0] == "[" else quoted[1:-1].replace("``", "`")
        if kind == "dollar":
            mark = len(match["tag"]) + 2
            return STRING, match["dollar"][mark:-mark]
        return kind, match[0]

    def _unquoted(self, quoted: str, mark: str) -> str:
        text = quoted[1:-1]
        if self.dialect == "mysql" and "\\" in text:
            return re.sub(
                rf"\\(.)|{mark}{mark}", lambda m: _MYSQL.get(m[1], m[1]) if m[1] else mark, text, flags=re.DOTALL
            )
        return text.replace(mark * 2, mark) if mark in text else text

    def rest_of_line(self) -> str:
        """Read to the end of the current line."""
        return next(self.raw_lines(), "")

    def raw_lines(self) -> Iterator[str]:
        """Yield lines as they stand, without their ends.

        Raises:
          BadSource: one is longer than a row may be.
        """
        while True:
            end = self._text.find("\n", self._at)
            if end < 0:
                if len(self._text) - self._at > streams.MAX_ROW_BYTES:
                    raise BadSource(f"line {self.line()}: it is longer than {too_long()}")
                if self._more():
                    continue
                if self._at == len(self._text):
                    return
                end = len(self._text)
            line = self._text[self._at : end]
            self._at = min(end + 1, len(self._text))
            yield line.removesuffix("\r")

    def _more(self) -> bool:
        piece = self._file.read(max(PIECE_CHARACTERS, len(self._text) - self._at))
        if not piece:
            self._ended = True
            return False
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + piece
        self._at = 0
        return True


def copied(value: str) -> str | None:
    r"""A value of COPY's text format: `\N` is NULL, and a backslash begins an escape."""
    if "\\" not in value:
        return value
    return None if value == "\\N" else _COPIED.sub(_escape, value)


def _escape(match: re.Match) -> str:
    """What an escape of PostgreSQL's means."""
    groups = match.groupdict()
    code = groups.get("hex") or groups.get("long")
    if code or groups.get("octal"):
        value = int(code, 16) if code else int(groups["octal"], 8)
        return chr(value) if value < 0x110000 else "\ufffd"
    return _POSTGRES.get(match["other"], match["other"]) if match["other"] else "'"
