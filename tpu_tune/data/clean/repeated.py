"""Text that is repeated on most pages of a site, such as headers and footers.

A page is a row of plain text. Its site is the folder, archive or table that its `source` names, or the host and folder
of its `url`; every folder above is a site as well. A first pass over the rows finds which lines stand among the first
or the last `LINES` of a site's pages, and on how many; numbers in them are taken for equal, so that a page's own does
not hide one. `Repeated.without` then takes them out of a text, from its ends inwards, and stops where a page has text
of its own: a line of the same words in the middle of a page stays.

A line of a word or two, such as `}` or `Note`, is taken out only together with a longer one further inside. Memory: 12
bytes a line at an end of a page, 60 lines a page at most.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpu_tune.data.clean.clean_options import CleanOptions
from tpu_tune.data.clean.texts import parts
from tpu_tune.data.formats import RowError, format_of

LINES = 30  # with text, at each end of a page
PAGES = 5  # a site has so many at least
GAP = 3  # lines of a page's own, such as a date, that may stand between repeated ones
_NUMBER = re.compile(r"\d+")
_PART = re.compile(r"(?::\d+|, item \d+)$")  # of a `source`: a row of a file with several


@dataclass(frozen=True)
class Repeated:
    """The lines that are repeated, by site. Pickles.

    Attributes:
      tops, bottoms: site -> hashes of the lines that are repeated at the top, or at the bottom, of its pages.
    """

    tops: Mapping[str, frozenset[int]]
    bottoms: Mapping[str, frozenset[int]]

    def without(self, text: str, site: str) -> tuple[str, str]:
        """Return a page's text without what is repeated on its site, and what was taken out."""
        lines = text.split("\n")
        lower = _run(lines, range(len(lines) - 1, -1, -1), self._of(self.bottoms, site))
        above = [number for number in range(len(lines)) if number not in lower]
        upper = _run(lines, above, self._of(self.tops, site))
        taken = upper | lower
        if not taken:
            return text, ""
        left = "\n".join(line for number, line in enumerate(lines) if number not in taken)
        left = re.sub(r"\A(?:[ \t]*\n)+", "", left) if upper else left
        return left.rstrip() if lower else left, "\n".join(lines[number] for number in sorted(taken))

    def _of(self, found: Mapping[str, frozenset[int]], site: str) -> frozenset[int]:
        above = ("/".join(site.split("/")[:depth]) for depth in range(site.count("/") + 2))
        return frozenset().union(*(found.get(one, ()) for one in above))


def site_of(row: Mapping[str, Any]) -> str:
    """The folder of a page, "" where nothing says where it is from."""
    url = row.get("url")
    if isinstance(url, str) and "://" in url:
        return re.split(r"[?#]", url.partition("://")[2])[0].rpartition("/")[0]
    source = row.get("source")
    if not isinstance(source, str):
        return ""
    path = source.replace("!", "/").strip("/")
    whole = _PART.sub("", path)
    return whole if whole != path else path.rpartition("/")[0]


def find_repeated(rows: Iterable[Mapping[str, Any]], options: CleanOptions) -> Repeated:
    """Read all rows, and return what stands at the same end of `options.repeated_text` of a site's pages or more."""
    tops, bottoms, numbers = _Ends(), _Ends(), {}
    pages: list[int] = []
    for row in rows:
        try:
            format = format_of(row, options.format, options.columns)
            text = parts(row, format, options.columns)[0].text if format == "text" else ""
        except RowError:
            continue
        if not text:
            continue
        number = numbers.setdefault(site_of(row), len(numbers))
        if number == len(pages):
            pages.append(0)
        pages[number] += 1
        lines = text.split("\n")
        tops.add(number, _ends(lines, range(len(lines))))
        bottoms.add(number, _ends(lines, range(len(lines) - 1, -1, -1)))
    share = options.repeated_text or 1.0
    return Repeated(tops.repeated(list(numbers), pages, share), bottoms.repeated(list(numbers), pages, share))


class _Ends:
    """The lines at one end of pages, by site."""

    def __init__(self) -> None:
        self._lines, self._sites = array("Q"), array("I")

    def add(self, site: int, lines: set[int]) -> None:
        self._lines.extend(lines)
        self._sites.extend([site] * len(lines))

    def repeated(self, sites: list[str], pages: list[int], share: float) -> dict[str, frozenset[int]]:
        """Count the lines of each site, those of the folders above included."""
        found: dict[str, frozenset[int]] = {}
        lines, site_of_line = np.frombuffer(self._lines, np.uint64), np.frombuffer(self._sites, np.uint32)
        paths = [site.split("/") if site else [] for site in sites]
        for depth in range(max(map(len, paths), default=-1) + 1):
            groups: dict[str, int] = {}
            group = np.array(
                [groups.setdefault("/".join(path[:depth]), len(groups)) if len(path) >= depth else -1 for path in paths]
            )
            size = np.bincount(group[group >= 0], np.array(pages)[group >= 0], minlength=len(groups))
            group_of_line = group[site_of_line]
            counted = (group_of_line >= 0) & (size[group_of_line] >= PAGES)
            pairs = np.stack([group_of_line[counted].astype(np.uint64), lines[counted]], axis=1)
            pairs, counts = np.unique(pairs, axis=0, return_counts=True)
            needed = np.ceil(share * size - 1e-9)  # 30 pages of 300 are a share of 0.1, whatever floats say
            often = pairs[counts >= np.maximum(needed[pairs[:, 0].astype(np.int64)], 2)]
            for name, number in groups.items():
                if len(hashes := often[often[:, 0] == number, 1]):
                    found[name] = frozenset(hashes.tolist())
        return found


def _words(line: str) -> str:
    return _NUMBER.sub("0", " ".join(line.split()))


def _hash(words: str) -> int:
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _ends(lines: list[str], order: Iterable[int]) -> set[int]:
    """The hashes of the first `LINES` lines with text."""
    found: list[int] = []
    for number in order:
        if words := _words(lines[number]):
            found.append(_hash(words))
            if len(found) == LINES:
                break
    return set(found)


def _run(lines: list[str], order: Iterable[int], known: frozenset[int]) -> set[int]:
    """The numbers of the lines to take out, from one end inwards."""
    taken: set[int] = set()
    waiting: list[int] = []  # short or empty ones, until a longer one comes
    seen = own = 0
    for number in order if known else ():
        words = _words(lines[number])
        if not words:
            waiting.append(number)
            continue
        seen += 1
        if _hash(words) in known:
            waiting.append(number)
            if len(words) >= 20 or words.count(" ") >= 2:
                taken.update(waiting)
                waiting, own = [], 0
        else:
            waiting, own = [], own + 1
        if seen == LINES or own > GAP:
            break
    return taken
