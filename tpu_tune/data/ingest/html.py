"""HTML to text: what a reader of the page sees, block by block.

lxml's parser, the one behind Beautiful Soup's `features="lxml"`, is read as a stream of events: the same text, several
times as fast as building a tree. Beautiful Soup's detector finds the encoding that a page declares. Scripts, styles,
templates, navigation and all of the head but the title are dropped. Paragraphs and headings are set apart by an empty
line, list items and table rows have a line each (cells are joined by ` | `), `pre` is kept as it is.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from html import unescape
from typing import Any

from bs4.dammit import EncodingDetector
from charset_normalizer import from_bytes
from lxml import etree

from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, row_of
from tpu_tune.data.ingest.encodings import byte_order_mark, decode, does_not_fit, is_text_encoding, read_document
from tpu_tune.data.ingest.ingest_options import IngestOptions

_DROPPED = frozenset(
    "script style template nav noscript iframe object embed applet svg canvas audio video select datalist "
    "textarea".split()
)
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
# Line breaks around a block element: 2 leave an empty line. Elements in neither list run on in their line.
_APART = (
    "title p pre blockquote ul ol dl menu dir table figure hr form section article aside header footer main body "
    "fieldset address details center listing xmp"
)
_OWN_LINE = (
    "div li dt dd caption figcaption legend summary br tr td th thead tbody tfoot option html head dialog hgroup "
    "frameset noframes"
)
_BREAKS = {**dict.fromkeys((*_APART.split(), *_HEADINGS), 2), **dict.fromkeys(_OWN_LINE.split(), 1)}
_LISTS = frozenset(("ul", "ol", "menu", "dir"))
_VERBATIM = frozenset(("pre", "listing", "xmp"))
_STRUCTURE = frozenset(("table", *_HEADINGS, *_VERBATIM, "blockquote"))  # in a cell: the table arranges a page
_SPACES = re.compile(r"[ \t\n\f\r]{2,}|[\t\n\f\r]")
_PROLOGUE = re.compile(r"\A\s*(?:<\?xml[^>]*\?>)?(?:\s|<!--.*?-->)*(?:<!DOCTYPE[^\[>]*(?:\[.*?\]\s*)?>)?", re.DOTALL)
_INLINE = (
    "a abbr acronym area b base bdi bdo big body button cite code col colgroup data del dfn em font html i img input "
    "ins kbd label link map mark meta nobr param picture q rp rt ruby s samp small source span strike strong sub sup "
    "time track tt u var video wbr"
)
_NAMES = "|".join(sorted({*_BREAKS, *_DROPPED, *_INLINE.split()}))
_TAG = re.compile(rf"<(?:/?(?:{_NAMES})(?=[\s/>])|!--|!doctype\b)", re.IGNORECASE)
_NO_TAG = re.compile(rf"<(?!(?:/?(?:{_NAMES})(?=[\s/>])|!--|!doctype\b))", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_BLANK_ENDS = " \t\n\f\r"


class _Row:
    """An unfinished table row: the blocks before it, and its finished cells, each a list of blocks."""

    __slots__ = ("before", "breaks", "cells", "in_cell", "plain")

    def __init__(self, before: list[tuple[int, str]], breaks: int):
        self.before, self.breaks = before, breaks
        self.cells: list[list[tuple[int, str]]] = []
        self.in_cell = False
        self.plain = True


class _Page:
    """A parser target (lxml's word): takes the events of a page, and `close` returns its text."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, str]] = []  # (line breaks before it, text)
        self.words: list[str] = []  # of the current block
        self.breaks = 0  # line breaks owed to the next block
        self.dropped = 0  # how deep inside something that is dropped
        self.verbatim = 0  # how deep inside `pre`
        self.marker = ""  # of a list item that has no text yet
        self.leads = False  # the next block is the first of an item, and stands where the item does
        self.lists: list[int | None] = []  # the number of the last item in each open list; None: not numbered
        self.items: list[int] = []  # items so far in each open list
        self.rows: list[_Row] = []

    def start(self, tag: str, attributes: Any) -> None:
        if tag.startswith("{"):  # XHTML's namespace
            tag = tag.rpartition("}")[2]
        if self.dropped or tag in _DROPPED or (attributes and _is_navigation(tag, attributes)):
            self.dropped += 1
            return
        breaks = _BREAKS.get(tag)
        if breaks is None:
            return
        if self.verbatim:
            self.verbatim += tag in _VERBATIM
            if tag in ("br", "div", "p", "li", "tr") and self.words and not self.words[-1].endswith("\n"):
                self.words.append("\n")
            return
        if tag == "br":
            self._flush(2 if self.breaks == 1 and not self.words and self.blocks else 1)
            return
        self._flush(0 if self.leads and not self._has_words() else breaks)
        if self.rows and tag in _STRUCTURE:
            self.rows[-1].plain = False
        if tag in _VERBATIM:
            self.verbatim = 1
        elif tag in _LISTS:
            start = attributes.get("start", "1") if tag == "ol" else ""
            self.lists.append(int(start) - 1 if re.fullmatch(r"-?\d{1,9}", start) else 0 if tag == "ol" else None)
            self.items.append(0)
        elif tag == "li":
            self._item()
        elif tag in ("dt", "dd"):
            self.breaks, self.leads = 1 if tag == "dd" else self.breaks, True
        elif tag == "tr":
            self.rows.append(_Row(self.blocks, self.breaks))
            self.blocks, self.breaks = [], 0
        elif tag in ("td", "th") and self.rows:
            self._end_cell()
            self.rows[-1].in_cell = True

    def end(self, tag: str) -> None:
        if self.dropped:
            self.dropped -= 1
            return
        if tag.startswith("{"):
            tag = tag.rpartition("}")[2]
        breaks = _BREAKS.get(tag)
        if breaks is None or tag == "br":
            return
        if self.verbatim:
            self.verbatim -= tag in _VERBATIM
            if not self.verbatim:
                self._flush_verbatim()
            return
        self._flush(breaks)
        if tag in _LISTS and self.lists:
            self.lists.pop()
            self.items.pop()
            self.marker, self.leads = "", False
        elif tag in ("li", "dt", "dd"):
            self.marker, self.leads = "", False
        elif tag in ("td", "th") and self.rows:
            self._end_cell()
        elif tag == "tr" and self.rows:
            self._end_row()

    def data(self, text: str) -> None:
        if not self.dropped:
            self.words.append(text)

    def close(self) -> str:
        self._flush_verbatim() if self.verbatim else self._flush(0)
        while self.rows:
            self._end_row()
        return "".join("\n" * (breaks if number else 0) + text for number, (breaks, text) in enumerate(self.blocks))

    def _has_words(self) -> bool:
        return any(word.strip(_BLANK_ENDS) for word in self.words)

    def _flush(self, breaks: int) -> None:
        """End the current block; `breaks` line breaks are owed after it, also where it is empty."""
        if self.words:
            self._add(_SPACES.sub(" ", "".join(self.words)).strip(" "))
            self.words = []
        if breaks > self.breaks:
            self.breaks = breaks

    def _flush_verbatim(self) -> None:
        text = "".join(self.words).replace("\r\n", "\n")
        self._add(text.removeprefix("\n").rstrip(_BLANK_ENDS))  # HTML leaves out a break right after the tag
        self.words, self.verbatim, self.breaks = [], 0, 2

    def _add(self, text: str) -> None:
        if text:
            self.blocks.append((self.breaks, self.marker + text))
            self.marker, self.breaks, self.leads = "", 0, False

    def _item(self) -> None:
        """Mark the item of a list; items stand in lines of their own without empty ones between."""
        self.leads = True
        if not self.lists:
            self.marker = "- "
            return
        if self.items[-1] or len(self.items) > 1:
            self.breaks = min(self.breaks, 1)
        self.items[-1] += 1
        if self.lists[-1] is not None:
            self.lists[-1] += 1
        self.marker = "  " * (len(self.lists) - 1) + ("- " if self.lists[-1] is None else f"{self.lists[-1]}. ")

    def _end_cell(self) -> None:
        row = self.rows[-1]
        if row.in_cell or self.blocks:
            row.cells.append(self.blocks)
        self.blocks, row.in_cell = [], False

    def _end_row(self) -> None:
        self._flush(0)
        self._end_cell()
        row = self.rows.pop()
        self.blocks = row.before
        if row.plain:
            cells = [" ".join(text for _, text in cell) for cell in row.cells]
            blocks = [(1, " | ".join(cells).rstrip())] if any(cells) else []
        else:
            blocks = [(max(breaks, 1), text) for cell in row.cells for breaks, text in cell]
        for breaks, text in blocks:
            self.blocks.append((max(breaks, row.breaks), text))
            row.breaks = 0
        self.breaks = max(row.breaks, 1)


def _is_navigation(tag: str, attributes: Any) -> bool:
    """Whether an element leads through a site: by its role, or the mark that Sphinx and MkDocs set beside headings."""
    return attributes.get("role") == "navigation" or (tag == "a" and attributes.get("class") == "headerlink")


def _decode_markup(content: bytes, encoding: str = "") -> str:
    """Decode a page: by its byte order mark, `encoding`, what it declares, UTF-8, or what charset-normalizer finds.

    Raises:
      BadSource: it does not fit what it declares, or nothing is found.
    """
    if encoding or byte_order_mark(content)[0]:
        return decode(content, encoding)
    declared = EncodingDetector.find_declared_encoding(content, is_html=True)
    if declared:
        name = codecs.lookup(declared).name if is_text_encoding(declared) else ""
        if name in ("iso8859-1", "ascii"):  # as every browser reads them; HTML's standard says so
            name = "cp1252"
        if name and not name.startswith(("utf-16", "utf-32")):  # else the declaration could not have been read
            try:
                return content.decode(name)
            except UnicodeDecodeError as error:
                raise BadSource(f"{does_not_fit(content, error, name)}, which it declares") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        found = from_bytes(content).best()
        if found is None:
            raise BadSource(f"{does_not_fit(content, error, 'utf-8')}, and no other encoding fits") from error
        return str(found)


def html_text(content: bytes, encoding: str = "") -> str:
    """Return the text of a page, broken or not.

    Args:
      encoding: of a page without a byte order mark, which says it; "" takes the one it declares, UTF-8, or what
        charset-normalizer finds.

    Raises:
      BadSource: the bytes are not text in any of these.
    """
    markup = _decode_markup(content, encoding).encode("utf-8", "surrogatepass")
    return _parse(_html_parser(), markup)


def stripped(text: str) -> str:
    """Return what a cell of a table says whose text is HTML.

    Only elements of HTML are markup, so that `a < b`, `vector<int>` and `<think>` stay; in a text without any of them
    entities are written out, and its lines stay as they are.
    """
    if not _TAG.search(text):
        return _ENTITY.sub(lambda match: unescape(match[0]), text)
    return _parse(_html_parser(), _NO_TAG.sub("&lt;", text).encode("utf-8", "surrogatepass"))


def _html_parser() -> Any:
    return etree.HTMLParser(target=_Page(), encoding="utf-8", recover=True, huge_tree=True, no_network=True)


def xhtml_text(content: bytes) -> str:
    """Return the text of a page of XHTML; one that is not well-formed is read as HTML.

    Entities that the page itself declares are left out, so that none can grow without bound.
    """
    text = _decode_markup(content)
    named = re.sub(r"&(?!(?:amp|lt|gt|quot|apos);)[A-Za-z][A-Za-z0-9]*;", _entity, text)
    markup = _PROLOGUE.sub("", named, count=1).encode("utf-8", "surrogatepass")
    parser = etree.XMLParser(
        target=_Page(), encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    try:
        return _parse(parser, markup)
    except (etree.XMLSyntaxError, BadSource):
        return _parse(_html_parser(), markup)


def _entity(match: re.Match) -> str:
    character = unescape(match[0])
    return match[0] if character == match[0] else character


def _parse(parser: Any, markup: bytes) -> str:
    if not markup.strip():
        return ""
    try:
        parser.feed(markup)
        return parser.close()
    except etree.ParserError as error:  # a page that holds nothing
        if "empty" in str(error).lower():
            return ""
        raise BadSource(f"cannot be read as HTML ({error})") from error


def read(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield the page as one row with `text`."""
    text = html_text(read_document(blob), options.encoding)
    if text:
        yield row_of(blob.name, text=text)
    else:
        tally.empty += 1
