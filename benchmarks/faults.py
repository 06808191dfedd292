"""Programs killed and interrupted, disks full, files damaged: how often something was lost, or came out different.

    python benchmarks/faults.py kills --rounds 50          # SIGKILL at random moments; every run ends equal to the bit
    python benchmarks/faults.py signals --rounds 50        # SIGTERM and Ctrl-C
    python benchmarks/faults.py disks --rounds 3           # a full disk under every command that writes
    python benchmarks/faults.py checkpoints --rounds 20    # a checkpoint of a run, damaged
    python benchmarks/faults.py files --rounds 2000        # files of every kind that is read, damaged
    python benchmarks/faults.py table                      # what they found, as a table

Everything random follows from `--seed`, save where a signal lands. Each part adds its counts to `--results`, so that
the campaign can be run in pieces; a part that is run again replaces its own. Exit status 1 where anything was lost,
was a traceback instead of a line, or came out different.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "launch"), str(ROOT / "benchmarks")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PARTS = {"kills": 50, "signals": 50, "disks": 3, "checkpoints": 20, "files": 2000}
GOOD = ("right", "one line")
BAD = ("lost", "traceback", "difference", "crash", "stuck", "memory", "left behind")


def run_part(part: str, rounds: int, seed: int, folder: pathlib.Path, only: str) -> dict[str, dict[str, int]]:
    """Return job or kind -> outcome -> count."""
    keep = folder / "failed"
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = pathlib.Path(name)
        if part == "files":
            import fault_files

            return {name: dict(found) for name, found in fault_files.run(place, rounds, seed, keep, only).items()}
        import fault_processes

        return {name: dict(found) for name, found in fault_processes.run(part, place, rounds, seed, only).items()}


def table(results: dict) -> str:
    """Return the counts as Markdown, a row for each part and job."""
    lines = ["| part | of | cases | right | one line | lost | tracebacks | differences | other |", "|" + "---|" * 9]
    for part in PARTS:
        jobs = results.get(part, {}).get("found", {})
        if part == "files" and jobs:
            total: dict[str, int] = {}
            for counts in jobs.values():
                for outcome, count in counts.items():
                    total[outcome] = total.get(outcome, 0) + count
            jobs = {f"{len(jobs)} kinds": total}
        for job, counts in jobs.items():
            other = sum(counts.get(name, 0) for name in BAD[3:])
            cells = [counts.get(name, 0) for name in (*GOOD, *BAD[:3])]
            lines.append(f"| {part} | {job} | {' | '.join(map(str, [sum(counts.values()), *cells, other]))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run a part, or print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("--rounds", type=int, help="cases of the part; of `disks` for each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="jobs or kinds with this in their names")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "tpu_tune-faults"))
    parser.add_argument("--results", type=pathlib.Path, help="default FOLDER/results.json")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.results or options.folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a disk that was mounted is given back
    if options.part != "table":
        rounds = PARTS[options.part] if options.rounds is None else options.rounds
        found = run_part(options.part, rounds, options.seed, options.folder, options.only)
        versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "pyarrow")}
        about = {"seed": options.seed, "rounds": rounds, "python": platform.python_version(), "versions": versions}
        results[options.part] = {"found": found, **about}
        if not options.only or options.results:
            file.write_text(json.dumps(results, indent=1) + "\n")
        results = {options.part: results[options.part]}
    print(table(results))
    counts = [count for part in results.values() for count in part["found"].values()]
    return int(any(found.get(name) for found in counts for name in BAD))


if __name__ == "__main__":
    sys.exit(main())
