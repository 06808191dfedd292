"""Two programs that are timed in turn, each in a process of its own: what `cpu_vs_peft.py` and `gpu.py` share.

The parent writes a number to a side's standard input (tokens, or steps) and reads one JSON object a line from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from typing import Any


class Side:
    """A side, seen by the parent; `first` is the record that it gives without being asked."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]):
        """Start it and wait for its first record."""
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.first = self._read()

    def ask(self, number: int) -> dict[str, Any]:
        """Have it do so much, and return its record of that."""
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(60)

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"a side ended with {self.process.returncode}:\n{self.errors.read()[-3000:]}")
        return json.loads(line)


def serve(records: Generator[dict[str, Any], int, None]) -> None:
    """Serve the parent: a first record, then one for each number read from standard input.

    Whatever else writes to standard output goes to standard error.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(next(records)), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(records.send(int(line))), file=out, flush=True)
