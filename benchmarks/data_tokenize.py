"""Tokenizing a file: `tpu-tune data tokenize` beside `datasets.map` with the same tokenizer, on the same rows.

    python benchmarks/data_tokenize.py                     # three rounds over 20 MB
    python benchmarks/data_tokenize.py --megabytes 50 --rounds 5 --json

Rows of text are made of Shakespeare's works, each with a number in it; the GPT-NeoX tokenizer tokenizes them, in turn:
ours from the .jsonl file to a finished Arrow file, reading, prediction of the size and cutting into blocks included;
`datasets` from a data set that it has loaded already to its finished Arrow file, by `map(batched=True, num_proc=N)`,
one process a core, into the same columns, uncut. Seconds are wall time; beside them the processor time of all
processes, which a busy machine tilts less.

Exit status 1 where ours is slower in the median of the rounds, or the numbers of tokens differ.
"""

from __future__ import annotations

import argparse
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


def write_rows(text: str, file: pathlib.Path, megabytes: float) -> int:
    """Write rows of text until there are so many megabytes; no two are the same. Return their number."""
    paragraphs = [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    written = count = 0
    with open(file, "w", encoding="utf-8") as out:
        while written < megabytes * 1e6:
            row = {"text": f"{count}. {paragraphs[count % len(paragraphs)]}"}
            written += out.write(json.dumps(row) + "\n")
            count += 1
    return count


def seconds(function: Callable[[], int]) -> tuple[float, float, int]:
    """Wall time, processor time with that of finished processes, and what the function returns."""

    def processor() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    start, used = time.perf_counter(), processor()
    result = function()
    return time.perf_counter() - start, processor() - used, result


def measure(rounds: int, megabytes: float) -> dict[str, Any]:
    """Return (wall, processor, tokens) of every round of either."""
    import datasets
    import fetch

    from tpu_tune.checkpoints.tokenizers import open_tokenizer
    from tpu_tune.data.pretokenize import tokenize_file
    from tpu_tune.data.tokenize_options import TokenizeOptions

    datasets.disable_progress_bars()
    folder, cores = fetch.fetch("text"), os.cpu_count() or 1
    tokenizer = open_tokenizer(str(folder / "20B_tokenizer.json"))
    found: dict[str, Any] = {"ours": [], "datasets": []}
    with tempfile.TemporaryDirectory() as place:
        file = pathlib.Path(place, "rows.jsonl")
        text = (folder / "t8.shakespeare.txt").read_text(encoding="utf-8")
        found |= {"rows": write_rows(text, file, megabytes), "bytes": file.stat().st_size, "cores": cores}
        loaded = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=place)

        def ours() -> int:
            return tokenize_file(
                file, pathlib.Path(place, "ours.arrow"), tokenizer, TokenizeOptions(format="auto", max_length=2048)
            )["tokens"]

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            ids = tokenizer([text + tokenizer.eos_token for text in batch["text"]], return_attention_mask=False)
            return {"input_ids": ids["input_ids"], "labels": ids["input_ids"]}

        def theirs() -> int:
            mapped = loaded.map(
                encode,
                batched=True,
                num_proc=cores,
                remove_columns=["text"],
                load_from_cache_file=False,
                cache_file_name=str(pathlib.Path(place, "theirs.arrow")),
            )
            return sum(len(chunk.values) for chunk in mapped.data["input_ids"].chunks)

        for _ in range(rounds):
            found["ours"].append(seconds(ours))
            found["datasets"].append(seconds(theirs))
    return found | {"load": os.getloadavg()[0]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--megabytes", type=float, default=20, metavar="N")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = measure(options.rounds, options.megabytes)
    pairs = list(zip(found["ours"], found["datasets"], strict=True))
    wall, processor = ([theirs[i] / ours[i] for ours, theirs in pairs] for i in (0, 1))
    same = all(ours[2] == theirs[2] for ours, theirs in pairs)
    if options.json:
        print(json.dumps({**found, "wall_ratios": wall, "processor_ratios": processor}, indent=2))
    else:
        megabytes = found["bytes"] / 1e6
        print(
            f"{found['rows']:,} rows, {megabytes:.1f} MB, {found['ours'][0][2]:,} tokens, {found['cores']} cores, "
            f"load {found['load']:.1f}"
        )
        for name in ("ours", "datasets"):
            elapsed, used = (statistics.median(record[i] for record in found[name]) for i in (0, 1))
            print(f"  {name}: {elapsed:.1f} s, {megabytes / elapsed:.1f} MB/s; {used:.1f} s of processors")
        print(f"  as fast as datasets.map, times: {_spread(wall)}; by processor time: {_spread(processor)}")
        print("" if same else "  THE NUMBERS OF TOKENS DIFFER", end="" if same else "\n")
    return int(statistics.median(wall) < 1 or not same)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
