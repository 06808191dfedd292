"""HTML to text: our extraction beside a bare loop of Beautiful Soup, on the Python documentation's 530 pages.

    python benchmarks/data_html.py                    # three rounds
    python benchmarks/data_html.py --rounds 5 --json

One core: both turn the same bytes in memory into text, in turn, in one process; the bare loop is
`BeautifulSoup(content, "lxml").get_text()`. Seconds are processor time, so that a busy machine does not tilt them.
Cores: `tpu-tune data ingest` as it is used, from files to a .jsonl, with one process and with one a core, in turn; the
pages are there six times over (as links), so that the start of a process, which is included, is not most of it. Seconds
are wall time, for which nothing else should run; the processor time beside it is the sum of all processes.

Exit status 1 where ours is slower than 0.9 times the bare loop in any round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "launch")]
BAR = 0.9


def cpu_seconds(function: Callable[[bytes], str], pages: Sequence[bytes]) -> float:
    """Processor time of one pass over the pages."""
    gc.collect()
    start = time.process_time()
    for page in pages:
        function(page)
    return time.process_time() - start


def ingest_seconds(folder: pathlib.Path, workers: int) -> tuple[float, float]:
    """Wall time of one `data ingest`, and processor time of all its processes."""
    from tpu_tune.data.ingest import ingest

    def processor() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    with tempfile.TemporaryDirectory() as out:
        start, used = time.perf_counter(), processor()
        ingest([str(folder)], os.path.join(out, "rows.jsonl"), workers=workers)
        return time.perf_counter() - start, processor() - used


def link_copies(folder: pathlib.Path, into: pathlib.Path, copies: int) -> None:
    """Link every page of a folder so many times."""
    for copy in range(copies):
        for path in folder.rglob("*.html"):
            link = into / str(copy) / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)


def measure(folder: pathlib.Path, rounds: int, copies: int = 6) -> dict[str, Any]:
    """Return the seconds of every round; of `data ingest`, pairs of wall and processor time."""
    from bs4 import BeautifulSoup

    from tpu_tune.data.ingest.html import html_text

    pages = [path.read_bytes() for path in sorted(folder.rglob("*.html"))]
    ours, bare, alone, spread = [], [], [], []
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as links:
        link_copies(folder, pathlib.Path(links), copies)
        for _ in range(rounds):
            ours.append(cpu_seconds(html_text, pages))
            bare.append(cpu_seconds(lambda page: BeautifulSoup(page, "lxml").get_text(), pages))
            alone.append(ingest_seconds(pathlib.Path(links), 1))
            spread.append(ingest_seconds(pathlib.Path(links), cores))
    return {
        "pages": len(pages),
        "bytes": sum(map(len, pages)),
        "cores": cores,
        "load": os.getloadavg()[0],
        "ours": ours,
        "bare": bare,
        "one_process": alone,
        "all_cores": spread,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    import fetch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = measure(fetch.fetch("python-docs"), options.rounds)
    ratios = [bare / ours for ours, bare in zip(found["ours"], found["bare"], strict=True)]
    scaling = [one / all_ for (one, _), (all_, _) in zip(found["one_process"], found["all_cores"], strict=True)]
    if options.json:
        print(json.dumps({**found, "ratios": ratios, "scaling": scaling}, indent=2))
    else:
        megabytes = found["bytes"] / 1e6
        print(f"{found['pages']} pages, {megabytes:.1f} MB, {options.rounds} rounds, load {found['load']:.1f}")
        for name in ("ours", "bare"):
            middle = statistics.median(found[name])
            print(f"  {name}: {middle:.2f} s of one core, {megabytes / middle:.1f} MB/s")
        print(f"  ours / bare in speed: {_spread(ratios)}")
        for name, cores in (("one_process", 1), ("all_cores", found["cores"])):
            wall, processor = (statistics.median(times) for times in zip(*found[name], strict=True))
            print(f"  data ingest, {cores} process(es): {wall:.1f} s, {processor:.1f} s of processors")
        print(f"  as fast with {found['cores']} processes as with one, times: {_spread(scaling)}")
    return int(min(ratios) < BAR)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
