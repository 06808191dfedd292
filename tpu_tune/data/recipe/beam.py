"""Apache Beam as the engine of ingest, clean and tokenize: past one machine, or on this one for trying it out.

Beam runs plain functions over tasks (a source, a block of lines, a batch of rows) and finds equal rows by grouping
their hashes. Everything a task makes goes to a file in a folder that all workers must share; this process joins the
files in the order of the tasks, so that the output is what one machine would have written, byte for byte. Which engine
runs it is Beam's own option, e.g. `--runner=FlinkRunner`; without one its local runner does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.data.processes import Engine
from tpu_tune.errors import UserError

BLOCK_BYTES = 32 * 2**20  # of lines that one task cleans


def run_in_order(
    function: Callable[[Any], Any], tasks: Iterable[Any], folder: str, options: Sequence[str]
) -> Iterator[Any]:
    """Yield function(task) of every task, in order, computed by Beam.

    Args:
      function: one that pickles; so must tasks and results, which pass through files.
      folder: that all workers share.
      options: Beam's own.

    Raises:
      UserError: the function raised one (the first in order), or Apache Beam is missing.
    """
    beam = _library()
    own = tempfile.mkdtemp(dir=folder)
    paths = []
    for number, task in enumerate(tasks):
        paths.append(os.path.join(own, str(number)))
        _save(paths[-1], task)
    with beam.Pipeline(options=_options(options)) as pipeline:
        _ = pipeline | beam.Create(paths) | beam.Reshuffle() | beam.Map(_one, function)
    for path in paths:
        result = _load(f"{path}.result")
        os.unlink(f"{path}.result")
        if isinstance(result, UserError):
            raise result
        yield result


def _one(path: str, function: Callable[[Any], Any]) -> None:
    try:
        result = function(_load(path))
    except UserError as error:  # Beam would wrap it in a page of its own
        result = UserError(str(error))
    _save(f"{path}.result", result)


def _save(path: str, value: Any) -> None:
    """Write aside and rename: an engine may run a task twice, also at the same time."""
    with storage.whole_file(path) as aside, open(aside, "wb") as file:
        pickle.dump(value, file)


def _load(path: str) -> Any:
    with open(path, "rb") as file:
        return pickle.load(file)


def _read_all(path: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        while file.peek(1):
            yield pickle.load(file)


def _library() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        how = "pip install 'tpu_tune[beam]'"
        raise UserError(f"the runner beam needs Apache Beam, which cannot be imported ({error}): {how}") from error
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    return apache_beam


def _options(options: Sequence[str]) -> Any:
    from apache_beam.options.pipeline_options import PipelineOptions

    # The local runner by default: Beam's Prism would have to be fetched.
    arguments = list(options)
    if not any(word.startswith("--runner") for word in arguments):
        arguments.append("--runner=DirectRunner")
    return PipelineOptions(arguments)


@contextlib.contextmanager
def engine(folder: str | os.PathLike, options: Sequence[str]) -> Iterator[Engine]:
    """Yield Beam as an `Engine`; its files lie in a folder beside the step's own and are removed at the end."""
    _library()
    with tempfile.TemporaryDirectory(prefix=".beam-", dir=Path(folder).absolute()) as own:
        yield lambda function, tasks: run_in_order(function, tasks, own, options)


def clean(
    inputs: Sequence[str], output: str, options: Any, skip_bad: bool, beam_options: Sequence[str]
) -> dict[str, Any]:
    """Do what `tpu_tune.data.clean.clean` does: Beam applies the rules to blocks of lines and groups equal rows; near
    duplicates are found in this process.

    Returns:
      The same report.

    Raises:
      UserError: as there, or Apache Beam is missing.
    """
    from tpu_tune.data.clean import CleanReport, Duplicates, Hit
    from tpu_tune.data.clean.cleaning import repeated_in
    from tpu_tune.data.clean.duplicates import near_text
    from tpu_tune.data.clean.rules import snippet
    from tpu_tune.data.formats import check_renamed
    from tpu_tune.data.streams import Skipped, writing

    report, skipped, renamed = CleanReport(), Skipped(skip_bad), 0
    near = Duplicates(dataclasses.replace(options, exact_duplicates=False), Path(output).parent)
    with (
        tempfile.TemporaryDirectory(prefix=".beam-", dir=Path(output).absolute().parent) as folder,
        contextlib.closing(near),
        writing(output) as writer,
    ):
        tasks = [block for path in inputs for block in blocks(os.fspath(path))]
        repeated = repeated_in(inputs, options)
        work = functools.partial(_clean_block, options=options, skip_bad=skip_bad, repeated=repeated)
        paths = [os.path.join(folder, f"rows-{number}") for number in range(len(tasks))]
        for part, found in run_in_order(work, list(zip(tasks, paths, strict=True)), folder, beam_options):
            renamed += found
            skipped.count += part.count
            skipped.examples = (skipped.examples + part.examples)[:5]
        if options.exact_duplicates:
            _find_equal(paths, beam_options)
        for path in paths:
            equal = _load(f"{path}.equal") if os.path.exists(f"{path}.equal") else set()
            for index, (where, line, hits, _) in enumerate(_read_all(path)):
                hit = None
                if index in equal:
                    hit = Hit("exact duplicate", "dropped", snippet(near_text(json.loads(line), options)))
                elif line is not None and options.near_duplicates is not None:
                    hit = near.check(json.loads(line), where)
                kept = line is not None and hit is None
                report.add(where, kept, [*hits, hit] if hit else hits)
                if kept:
                    writer.copy(io.BytesIO(line), 1)
    figures = report.figures(skipped)
    if not figures["rows_in"]:
        raise UserError(f"{', '.join(map(str, inputs))}: no rows")
    check_renamed(", ".join(map(str, inputs)), options.columns, renamed, figures["rows_in"])
    return figures


def _clean_block(task: tuple[Block, str], options: Any, skip_bad: bool, repeated: Any) -> Any:
    """Clean the lines of a block into a file of (where, line or None, hits, hash or None).

    Returns:
      What was skipped, and how many rows have the columns that are renamed.
    """
    from tpu_tune.data.clean import row_cleaner
    from tpu_tune.data.clean.duplicates import identity
    from tpu_tune.data.formats import RowError, columns_of
    from tpu_tune.data.streams import Skipped, Writer, json_rows

    (block, path), cleaner = task, row_cleaner(options, repeated)
    skipped, renamed = Skipped(skip_bad), 0
    with open(path, "wb") as file:
        for number, row in json_rows(block.lines(), block.path, skipped):
            where = f"{block.path}:{number}"
            renamed += bool(columns_of(row, options.columns))
            try:
                cleaned, hits = cleaner(row)
                digest = identity(cleaned, options) if cleaned is not None and options.exact_duplicates else None
            except RowError as error:
                skipped.add(where, str(error))
                continue
            line = None
            if cleaned is not None:
                Writer(buffer := io.BytesIO()).write(cleaned)
                line = buffer.getvalue()
            pickle.dump((where, line, hits, digest), file)
    return skipped, renamed


def _find_equal(paths: Sequence[str], beam_options: Sequence[str]) -> None:
    """Write beside each file of cleaned rows which of them have an equal one before them."""
    beam = _library()
    with beam.Pipeline(options=_options(beam_options)) as pipeline:
        _ = (
            pipeline
            | "files" >> beam.Create(list(enumerate(paths)))
            | "shared" >> beam.Reshuffle()
            | "hashes" >> beam.FlatMap(_hashes)
            | "same hash" >> beam.GroupByKey()
            | "all but the first" >> beam.FlatMap(lambda group: sorted(group[1])[1:])
            | "by file" >> beam.GroupByKey()
            | "written" >> beam.Map(_write_equal, list(paths))
        )


def _hashes(numbered: tuple[int, str]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    number, path = numbered
    for index, (_, line, _, digest) in enumerate(_read_all(path)):
        if line is not None:
            yield digest, (number, index)


def _write_equal(group: tuple[int, Iterable[int]], paths: Sequence[str]) -> None:
    number, indices = group
    _save(f"{paths[number]}.equal", set(indices))


@dataclasses.dataclass(frozen=True)
class Block:
    """Lines of a file: bytes [start, end), which begin with line `first` (from 1); end -1 is the whole file."""

    path: str
    start: int
    end: int
    first: int

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """Yield (line number, line), as `streams.read_lines` does."""
        from tpu_tune.data.streams import cut_lines, read_lines

        if self.end < 0:
            yield from read_lines(self.path)
            return
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for number, line in enumerate(cut_lines(file), start=self.first):
                yield number, line
                if file.tell() >= self.end:
                    return


def blocks(path: str, size: int = BLOCK_BYTES) -> Iterator[Block]:
    """Cut a file between lines into blocks of at least `size` bytes; a gzipped one is a single block.

    Raises:
      UserError: the file cannot be read.
    """
    if path.endswith(".gz"):
        yield Block(path, 0, -1, 1)
        return
    try:
        with open(path, "rb") as file:
            start, first, lines = 0, 1, 0
            while piece := file.readline(2**20):
                lines += piece.endswith(b"\n")
                if piece.endswith(b"\n") and file.tell() - start >= size:
                    yield Block(path, start, file.tell(), first)
                    start, first, lines = file.tell(), first + lines, 0
            if file.tell() > start:
                yield Block(path, start, file.tell(), first)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
