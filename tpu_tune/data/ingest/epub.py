"""The chapters of an EPUB, a row each."""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from lxml import etree

from tpu_tune.data.ingest.archives import Budget, checked_member, read_member, readable, seekable
from tpu_tune.data.ingest.blobs import BadSource, Blob, Tally, row_of
from tpu_tune.data.ingest.html import xhtml_text
from tpu_tune.data.ingest.ingest_options import IngestOptions


def read(blob: Blob, options: IngestOptions, tally: Tally) -> Iterator[dict[str, Any]]:
    """Yield a book's chapters in reading order (its spine), a row each; its tables of contents are left out."""
    with blob.open() as file, seekable(file) as book:
        try:
            with readable():
                archive = zipfile.ZipFile(book)
            with archive:
                yield from _chapters(blob, archive, Budget.of(blob, options), tally)
        except (zipfile.BadZipFile, etree.XMLSyntaxError, KeyError) as error:
            raise BadSource(f"is cut short, or no EPUB ({error})") from error


def _chapters(blob: Blob, archive: zipfile.ZipFile, budget: Budget, tally: Tally) -> Iterator[dict[str, Any]]:
    locked = {unquote(name) for name in _values(archive, budget, "META-INF/encryption.xml", "CipherReference", "URI")}
    package = next(iter(_values(archive, budget, "META-INF/container.xml", "rootfile", "full-path")), None)
    if package is None:
        raise BadSource("is no EPUB: META-INF/container.xml names no book")
    tree = _xml(read_member(archive, package, budget))
    items = {item.get("id"): item for item in _elements(tree, "item")}
    for reference in _elements(tree, "itemref"):
        item = items.get(reference.get("idref"))
        if item is None or "nav" in (item.get("properties") or "").split():
            continue
        if item.get("media-type") not in ("application/xhtml+xml", "text/html"):
            continue
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(item.get("href") or "")))
        where = f"{blob.name}!{name}"
        try:
            if name in locked:
                raise BadSource("is encrypted")
            checked_member(name)
            text = xhtml_text(read_member(archive, name, budget))
        except KeyError:
            tally.skipped.add(where, "the book names it and does not hold it")
        except BadSource as error:
            tally.skipped.add(where, str(error))
        else:
            if text:
                yield row_of(where, text=text)
            else:
                tally.empty += 1


def _xml(content: bytes) -> Any:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    return etree.fromstring(content, parser)


def _elements(tree: Any, name: str) -> Iterator[Any]:
    return (element for element in tree.iter("{*}" + name))


def _values(archive: zipfile.ZipFile, budget: Budget, member: str, element: str, attribute: str) -> list[str]:
    if member not in archive.namelist():
        return []
    tree = _xml(read_member(archive, member, budget))
    return [found.get(attribute) for found in _elements(tree, element) if found.get(attribute)]
