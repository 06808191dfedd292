"""What of a run could not be read: the first of each source for the message, and all of it in a file."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from tpu_tune.checkpoints import json_text
from tpu_tune.data.sources import BadRow
from tpu_tune.data.streams import aside
from tpu_tune.errors import UserError, counted

SHOWN = 50  # sources whose first problem is printed

logger = logging.getLogger(__name__)


@dataclass
class Problems:
    """Problems of sources, one JSON object a line in `file`.

    Attributes:
      file: takes `where` and `reason` of each, and `option`: whether another option would mend it.
      bad, wants: how many there are, of what cannot be read and of what another option would mend.
      first: source -> its first problem, as a line; of `SHOWN` sources.
      sources: source -> how many it has.
    """

    file: IO[bytes]
    bad: int = 0
    wants: int = 0
    first: dict[str, str] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, where: str, reason: str, option: bool = False) -> None:
        """Take one problem down."""
        record = {"where": where, "reason": reason, "option": option}
        self.file.write(json.dumps(record).encode() + b"\n")
        self.bad, self.wants = self.bad + (not option), self.wants + option
        self.sources[source] = self.sources.get(source, 0) + 1
        if len(self.first) < SHOWN and source not in self.first:
            self.first[source] = str(BadRow(where, reason))

    def bad_row(self, source: str, bad: BadRow) -> None:
        """Take down what cannot be read."""
        self.add(source, bad.where, bad.reason)

    def want(self, source: str, name: str, error: UserError) -> None:
        """Take down what another option would mend."""
        where, reason = name, str(error)
        if reason.startswith(name):  # and goes on with a table's name, or says what is wrong
            inside, _, reason = reason.removeprefix(name).partition(": ")
            where += inside
        self.add(source, where, reason, option=True)

    def copy(self, source: str, file: IO[bytes]) -> None:
        """Take down what another process wrote of a source."""
        for line in file:
            self.add(source, **json_text.loads(line))

    def refuse(self, total: int, listed: str, skip_bad: bool) -> None:
        """End the run where there is a problem that is not allowed.

        Args:
          total: of sources that were read.
          listed: the file in which all stand, or "".
          skip_bad: whether what cannot be read is allowed.

        Raises:
          UserError: with the first problem and the ways out; the first of each source is logged where there are more.
        """
        count = self.bad + self.wants
        if not self.wants and (skip_bad or not self.bad):
            return
        ways = []
        if self.wants:
            ways.append("--for PATTERN gives options to some files and --exclude PATTERN leaves some out")
        if self.bad and not skip_bad:
            ways.append("--skip-bad goes on without what cannot be read")
        first = next(iter(self.first.values()))
        if count == 1:
            way = ways[0] if self.wants else "fix it, or give --skip-bad to go on without it"
            raise UserError(first if self.wants and total == 1 else f"{first}; {way}")
        for source, line in self.first.items():
            more = self.sources[source] - 1
            logger.warning("%s%s", line, f" (and {more:,} more in this source)" if more else "")
        if len(self.sources) > SHOWN:
            logger.warning("and %s", counted(len(self.sources) - SHOWN, "more source"))
        where = f"all are in {listed}" if listed else "--bad FILE writes all of them"
        raise UserError(
            f"{counted(count, 'problem')} in {len(self.sources):,} of {counted(total, 'source')}: {'; '.join(ways)}; "
            f"{where}. "
            f"The first: {first}"
        )


@contextlib.contextmanager
def taken_down(path: str | os.PathLike | None) -> Iterator[Problems]:
    """Yield an empty list of problems; at the end, and where the run fails, it is written to `path`."""
    failure = None
    with tempfile.TemporaryFile() as file:
        try:
            yield Problems(file)
        except UserError as error:
            failure = error
        if path:
            file.seek(0)
            with aside(path) as temporary, open(temporary, "wb") as written:
                shutil.copyfileobj(file, written, 2**20)
    if failure:
        raise failure
