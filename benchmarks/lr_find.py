"""What `tpu-tune lr-find` suggests, against the best of a sweep, on SmolLM2 with the quickstart's chats.

    python benchmarks/lr_find.py                       # hours on two busy cores, half an hour on two idle ones
    python benchmarks/lr_find.py --keep runs.jsonl     # keeps what is done, and goes on there when started again

The configuration is configs/quickstart.py's (QLoRA, rank 16, nf4, cosine with 10% warm-up, AdamW) but for its length,
60 steps, and its batch: two packed rows of 256 tokens instead of four, to halve the time. Every run begins with the
same weights and sees the same rows in the same order; its figure is the evaluation loss of its end. Runs are evaluated
every 18 steps, as `tpu-tune train` does, and `rate_hint` is asked each time: with the suggested rate, a thousand times
it and a thousandth, the latter two up to the first hint.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
PROJECT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
SWEEP = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def configuration() -> Any:
    """Return the quickstart's configuration, smaller."""
    from tpu_tune import config

    found = config.from_file(str(PROJECT / "configs" / "quickstart.py"))
    found.train.max_steps, found.train.per_device_train_batch_size = 60, 2
    return found


class Kept:
    """Figures by name in a file of JSON lines; what is there is not computed again."""

    def __init__(self, path: str | None):
        """Read what is there."""
        self.path, self.figures = path, {}
        if path and os.path.exists(path):
            self.figures = {row["name"]: row for row in map(json.loads, open(path))}

    def get(self, name: str, make: Any) -> dict[str, Any]:
        """Return the figures under a name, made and written if they are not there."""
        if name not in self.figures:
            self.figures[name] = {"name": name, **make()}
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.figures[name]) + "\n")
        print(json.dumps(self.figures[name]), file=sys.stderr, flush=True)
        return self.figures[name]


def full_run(trials: Any, rate: float, stop: bool = False) -> dict[str, Any]:
    """Train for the run's length, or to the first hint if `stop`.

    Returns:
      Its rows, the evaluation loss of its end, and the hint with its step, None where there was none.
    """
    from tpu_tune.curves.learning_rate import trials as tr
    from tpu_tune.curves.learning_rate.hint import hint_of

    begun, rows, rates, hint = time.monotonic(), [], tr.scheduled(trials, rate, trials.total), None
    for step, (loss, state) in enumerate(tr.train(trials, rates), start=1):
        rows.append({"step": step, "loss": loss, "learning_rate": rates[step - 1]})
        if step % 18 == 0 or step == trials.total:
            rows.append({"step": step, "eval_loss": tr.held_out_loss(trials, state)})
            hint = hint or ((now := hint_of(rows)) and f"{now} (at step {step})")
            if stop and hint:
                break
    return {"eval_loss": rows[-1]["eval_loss"], "hint": hint, "seconds": time.monotonic() - begun, "rows": rows}


def found(trials: Any) -> dict[str, Any]:
    """Return what `tpu-tune lr-find` finds."""
    from tpu_tune.curves.learning_rate import find
    from tpu_tune.curves.learning_rate.plot import draw

    begun = time.monotonic()
    result = find.find_with(trials, find.FinderOptions(), lambda line: print(line, file=sys.stderr, flush=True))
    draw(result, "lr.png", "quickstart")
    return {"rate": result.suggestion.rate, "seconds": time.monotonic() - begun, "reason": result.suggestion.reason}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", metavar="FILE", help="file of JSON lines with the figures of runs that are done")
    options = parser.parse_args()
    import jax

    from tpu_tune.curves.learning_rate.trials import open_trials

    trials, kept = open_trials(configuration()), Kept(options.keep)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    suggestion = kept.get("lr-find", lambda: found(trials))
    rate = suggestion["rate"]
    print(f"suggested: {rate:.2e} after {suggestion['seconds']:.0f} s: {suggestion['reason']}")
    for name, factor in (("the suggested rate", 1.0), ("a thousand times", 1e3), ("a thousandth", 1e-3)):
        one = rate * factor
        hint = kept.get(f"{one:.2e}", lambda one=one, factor=factor: full_run(trials, one, factor != 1))["hint"]
        print(f"{name}: {hint}")
    ends = {one: kept.get(f"{one:.2e}", lambda one=one: full_run(trials, one))["eval_loss"] for one in (rate, *SWEEP)}
    best = min(ends[one] for one in SWEEP)
    print("\n| learning rate | eval loss after 60 steps | above the sweep's best |\n|---|---|---|")
    for one, loss in sorted(ends.items()):
        print(f"| {one:.1e}{' (suggested)' if one == rate else ''} | {loss:.4f} | {100 * (loss / best - 1):+.1f}% |")


if __name__ == "__main__":
    main()
