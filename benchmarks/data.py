"""The data chapter's speed, a section each; without a name, all sections that are there.

    python benchmarks/data.py                  # all
    python benchmarks/data.py html kmeans      # these

A section is a script of its own, `data_NAME.py`, that says what it compares and how, and takes its own options if
it is run by itself. Each runs in a process of its own, one after the other. Exit status 1 where one of them fails its
bar.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
from collections.abc import Sequence

HERE = pathlib.Path(__file__).resolve().parent
SECTIONS = ("html", "dedup", "kmeans", "tokenize")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; return the exit status."""
    there = [name for name in SECTIONS if (HERE / f"data_{name}.py").is_file()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(there))
    names = parser.parse_args(arguments).sections or there
    unknown = [name for name in names if name not in there]
    if unknown:
        parser.error(f"there is no section {unknown[0]}; there is: {', '.join(there)}")
    status = 0
    for name in names:
        print(f"== {name}", flush=True)
        status |= subprocess.run([sys.executable, str(HERE / f"data_{name}.py")], check=False).returncode != 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
