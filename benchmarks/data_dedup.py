"""Near-duplicate removal of 200,000 short rows: time, memory, and which of the planted rows were found.

    python benchmarks/data_dedup.py            # or: python benchmarks/data_dedup.py 20000

Rows are 15 to 60 made-up words, Zipf-distributed, from a fixed seed. One in ten is a copy of an earlier row with one
to three words replaced, so that its similarity lies on either side of the threshold of 0.8. `tpu-tune data clean` runs
as a command of its own; seconds are its wall and processor time from start to end, peak RSS its own. Recall is of the
copies whose exact Jaccard similarity (character 5-grams) with their original reaches 0.8; a false drop is a dropped row
of which no earlier row of the same original reaches it.
"""

from __future__ import annotations

import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, COPIES, THRESHOLD, SEED = 200_000, 0.1, 0.8, 0


def make_rows(count: int, copies: float = COPIES, seed: int = SEED) -> tuple[list[str], list[int]]:
    """Return texts, and for each the number of the row that it copies (its own where it is no copy)."""
    draw = random.Random(seed)
    letters, weights = "etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1)
    words = ["".join(draw.choices(letters, weights, k=draw.randint(2, 9))) for _ in range(20_000)]
    zipf = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
    texts, originals = [], []
    for number in range(count):
        if number > 100 and draw.random() < copies:
            original = originals[draw.randrange(number)]
            changed = texts[original].split()
            for _ in range(draw.choice((1, 1, 1, 2, 3))):
                changed[draw.randrange(len(changed))] = draw.choice(words)
            texts.append(" ".join(changed))
            originals.append(original)
        else:
            texts.append(" ".join(draw.choices(words, cum_weights=zipf, k=draw.randint(15, 60))))
            originals.append(number)
    return texts, originals


def jaccard(a: str, b: str, size: int = 5) -> float:
    """Similarity of two texts' sets of character n-grams."""
    a, b = ({text[i : i + size] for i in range(len(text) - size + 1)} for text in (a, b))
    return len(a & b) / len(a | b)


def measure(count: int) -> dict[str, float]:
    """Make rows, clean them, and compare what is left with what was planted."""
    texts, originals = make_rows(count)
    with tempfile.TemporaryDirectory() as directory:
        rows, clean = Path(directory) / "rows.jsonl", Path(directory) / "clean.jsonl"
        with rows.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts))
        command = [sys.executable, "-m", "tpu_tune", "data", "clean", str(rows), "--output", str(clean)]
        command += ["--no-default-phrases", "--near-duplicates", str(THRESHOLD)]
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        with clean.open(encoding="utf-8") as file:
            dropped = set(range(count)) - {json.loads(line)["id"] for line in file}
    planted = [n for n in range(count) if originals[n] != n and jaccard(texts[n], texts[originals[n]]) >= THRESHOLD]
    families: dict[int, list[int]] = {}
    for number, original in enumerate(originals):
        families.setdefault(original, []).append(number)
    false = [
        number
        for number in dropped - set(planted)
        if not any(jaccard(texts[number], texts[n]) >= THRESHOLD for n in families[originals[number]] if n < number)
    ]
    return {
        "rows": count,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_rss_mb": round(after.ru_maxrss / 1024),
        "planted": len(planted),
        "recall": round(len(dropped.intersection(planted)) / len(planted), 5),
        "dropped": len(dropped),
        "false_drops": len(false),
    }


def main() -> None:
    """Print a Markdown row, or with --json the figures."""
    words = [word for word in sys.argv[1:] if word.isdigit()]
    figures = measure(int(words[-1]) if words else ROWS)
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    print("| rows | seconds | processor seconds | peak RSS, MB | planted | recall | dropped | false drops |")
    print("|---|---|---|---|---|---|---|---|")
    print("| " + " | ".join(f"{value:,}" for value in figures.values()) + " |")


if __name__ == "__main__":
    main()
