"""From what the user names to sources: files, folders, patterns, and names of datasets."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tpu_tune.data import saved_sets
from tpu_tune.data.ingest import catalog, dictd, patterns
from tpu_tune.data.ingest.blobs import suffix_of
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.data.ingest.reading import is_readable, kind_of
from tpu_tune.errors import UserError


@dataclass
class Found:
    """The sources of a run.

    Attributes:
      sources: paths and names in the order in which they are read, each once.
      passed_over: files in folders that are of no known kind, by suffix.
      excluded: files that are not to be read.
      met: patterns of `IngestOptions.for_files` that mean one.
    """

    sources: list[str] = field(default_factory=list)
    passed_over: Counter = field(default_factory=Counter)
    excluded: int = 0
    met: set[str] = field(default_factory=set)


def find_sources(
    inputs: Sequence[str],
    options: IngestOptions = IngestOptions(),  # noqa: B008
    made: Sequence[str] = (),
) -> Found:
    """Find what to read.

    A folder is searched recursively, in the order of names; hidden files are left out, and so are files of no known
    kind, or not of the kind that `options.format` is. A file that is named outright, or by a pattern together with a
    format, is read whatever its name.

    Args:
      inputs: files, folders, patterns with `*`, `?`, `[`, and names: `tfds:NAME`, `datasets:NAME`, OWNER/NAME of the
        hub.
      options: what kind files are of, which are not read, and the split of folders that `datasets` saved in splits.
      made: paths that are not read: the outputs.

    Raises:
      UserError: nothing is there, or no such split.
    """
    found, known = Found(), {os.path.abspath(path) for path in made}
    for word in inputs:
        before = len(found.sources) + sum(found.passed_over.values()) + found.excluded
        if catalog.is_named(word):
            paths, named = iter([word]), True
        else:
            paths, named = _paths(word, options)
        for path in paths:
            key = path if catalog.is_named(path) else os.path.abspath(path)
            if key in known:
                before -= 1  # it is there, only not again
                continue
            known.add(key)
            if _is_index(path):
                continue
            found.met |= {patterns.pattern_of(options, path)} - {""}
            if patterns.is_excluded(options, path):
                found.excluded += 1
            elif named or patterns.has_format(options, path) or is_readable(path, options.format):
                found.sources.append(path)
            else:
                found.passed_over[suffix_of(path) or "without suffix"] += 1
        if len(found.sources) + sum(found.passed_over.values()) + found.excluded == before:
            raise UserError(f"{word}: no files are there")
    if not found.sources:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in found.passed_over.most_common(10))
        raise UserError(
            f"{' '.join(inputs)}: nothing of a known kind is there ({kinds or 'all of it is excluded'}); "
            "--format says how to read all of it"
        )
    return found


def _paths(word: str, options: IngestOptions) -> tuple[Iterator[str], bool]:
    """The files behind one input, and whether it names a file outright."""
    path = os.path.expanduser(word)
    if re.match(r"[a-z][a-z0-9+.-]*://", word):
        raise UserError(f"{word}: only local files are read; copy it here first, e.g. with gcloud storage cp -r")
    if os.path.isdir(path):
        return _walk(path, options), False
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise UserError(f"{word}: is neither a file nor a folder")
        if _is_index(path):  # the index stands for its dictionary
            stem = path.removesuffix(".index")
            path = next(stem + end for end in (".dict.dz", ".dict") if os.path.isfile(stem + end))
        return iter([path]), True
    if glob.has_magic(path):
        return _matches(path), options.format != "auto"
    if catalog.is_hub_id(word) and not kind_of(word):
        return iter([f"datasets:{word}"]), True
    raise UserError(f"{word}: there is no such file or folder")


def _walk(folder: str, options: IngestOptions) -> Iterator[str]:
    def complain(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for directory, folders, files in os.walk(folder, onerror=complain):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if splits := saved_sets.splits_of(directory):
            folders.clear()  # its index names all that it holds
            yield from _of_split(directory, splits, patterns.for_file(options, directory).split)
            continue
        is_clone = "dataset_infos.json" in files
        for name in sorted(files):
            path = os.path.join(directory, name)
            if name in saved_sets.NOTES or (is_clone and name == "README.md"):
                continue  # what `datasets` says about the rows
            if not name.startswith(".") and os.path.isfile(path):
                yield path


def _of_split(directory: str, splits: dict[str, list[str]], split: str) -> list[str]:
    if list(splits) == [""]:
        return splits[""]
    if split not in splits:
        there = ", ".join(splits)
        raise UserError(f"{directory}: there is no split '{split}'; --split names one that is there: {there}")
    return splits[split]


def _matches(pattern: str) -> Iterator[str]:
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isfile(path):
            yield path


def _is_index(path: str) -> bool:
    """Whether a file is the index of a dictionary beside it."""
    stem = path.removesuffix(".index")
    return path != stem and any(
        os.path.isfile(stem + end) and dictd.index_of(stem + end) == path for end in (".dict.dz", ".dict")
    )
