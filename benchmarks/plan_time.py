"""How near `tpu-tune plan` comes to the full method: a step's time without its kernels' bundles, and with all of them.

    python benchmarks/plan_time.py                          # ten jobs: some minutes each on two cores
    python benchmarks/plan_time.py --only 7b smollm2        # some
    python benchmarks/plan_time.py --keep DIR               # programs and bundles stay there, and are not made twice

Each job is compiled once, in a process of its own, for a TPU that is not there, with every kernel's bundles dumped;
both estimates read that one program. Nothing is measured on a device. Needs pip install -e ".[tpu]".
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
from typing import Any

from tpu_steps import JOBS, figures, kinds

NAMES = [name for name in JOBS if name not in ("7b-v3-kernel", "smollm2-full-dots", "7b-lora-v5e-8", "70b-v5e-16")]


def row(found: dict[str, Any]) -> str:
    """Return a row of the table in RESULTS.md."""
    plain, full = found["plan"]["seconds"], found["full"]["seconds"]
    numbers = f"{1e3 * plain:,.0f} | {1e3 * full:,.0f} | {plain / full - 1:+.1%}"
    return f"| {found['name']} | {found['device']} | {numbers} | {kinds(found['full'])} |"


def main() -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=NAMES)
    parser.add_argument("--keep", type=pathlib.Path, help="a directory")
    options = parser.parse_args()
    print("| job | device | plan, ms | with all bundles, ms | difference | where the time goes, ms |")
    print("|---|---|---|---|---|---|")
    for name in options.only:
        with tempfile.TemporaryDirectory(prefix="plan-time-") as directory:
            print(row(figures(name, options.keep or pathlib.Path(directory))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
