"""What the training loop costs the host in a step, and how long a device waits for it, on this machine's CPU.

    python benchmarks/host.py
    python benchmarks/host.py --steps 300 --turns 5 --device-ms 2 10 50 --json

The loop is `tpu_tune.training.loop.TrainingLoop` as it is, with a tiny model (benchmarks/gpu.py's, random weights), a
row in metrics.jsonl every step, and nothing else to do. "Late" is that loop: a step's metrics are read once the next
step is handed over, and batches are put on the device by the thread that makes them. "At once" is what it was before:
the batch is put, the step handed over, and its metrics are waited for. Both are asked in turn, and medians of the turns
are shown.

1. The real step on jax's CPU backend: milliseconds a step and the ratio. The step and the host share the cores, so this
   shows less than an accelerator would.
2. A stand-in for an accelerator: a thread that takes one step at a time and sleeps for `--device-ms`. It notes how long
   it had nothing to do between two steps: that is what a device loses to the host.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import tempfile
import threading
import time
import types
from concurrent.futures import Future
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - it reads the environment
import numpy as np  # noqa: E402
from gpu import random_model, run_config, token_ids  # noqa: E402

from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory  # noqa: E402
from tpu_tune.training import loggers  # noqa: E402
from tpu_tune.training.loop import TrainingLoop  # noqa: E402
from tpu_tune.training.meter import LoopState, Meter  # noqa: E402
from tpu_tune.training.prepare_steps import prepare_steps  # noqa: E402

METRICS = ("loss", "grad_norm", "learning_rate", "num_tokens", "finite", "failures", "weight")


class SleepingDevice:
    """One step at a time, in order, each so many seconds long; `idle` has the seconds between two of them."""

    def __init__(self, seconds: float):
        self.seconds, self.idle, self._work = seconds, [], queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def train(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        """Hand over a step; like jax, return at once."""
        done: Future = Future()
        self._work.put(done)
        return state, {name: Result(done, float(name != "failures")) for name in METRICS}

    def _run(self) -> None:
        ended = None
        while True:
            done = self._work.get()
            if ended is not None:
                self.idle.append(time.perf_counter() - ended)
            time.sleep(self.seconds)
            ended = time.perf_counter()
            done.set_result(None)


class Result:
    """A number that a `SleepingDevice` computes; reading it waits."""

    def __init__(self, done: Future, value: float):
        self.done, self.value = done, value

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.done.result()
        return np.asarray(self.value, dtype)

    def block_until_ready(self) -> None:
        """Wait for it."""
        self.done.result()


def parse() -> argparse.Namespace:
    """Return the options, with those that benchmarks/gpu.py's functions want."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--device-ms", type=float, nargs="*", default=[2.0, 10.0, 50.0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.model, options.layers, options.attention = "tiny", 2, "auto"
    return options


def run(train: Any, put: Any, state: Any, setting: Any, late: bool, steps: int, folder: str) -> dict[str, float]:
    """Run the loop for some steps; return its milliseconds a step, and those of them that are spent on each thing."""
    config, model, batch = setting
    spent = dict.fromkeys(("handing over", "reading"), 0.0)

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments)
            spent[name] += time.perf_counter() - begun
            return result

        return call

    hand_over = timed("handing over", train)

    def at_once(state: Any, frozen: Any, batch: Any) -> Any:
        new, metrics = hand_over(state, frozen, put(batch))
        timed("reading", jax.block_until_ready)(metrics)
        return new, metrics

    parts = types.SimpleNamespace(
        train=hand_over if late else at_once, put_batch=lambda batch, leading: put(batch) if late else batch
    )
    session = types.SimpleNamespace(
        config=config,
        length=types.SimpleNamespace(total_steps=steps),
        batches=types.SimpleNamespace(batch=lambda number: batch, steps_per_epoch=steps),
        data=types.SimpleNamespace(eval=None),
        model=model,
    )
    metrics = MetricsFile(RunDirectory(folder))
    sinks = [loggers.Sink("metrics.jsonl", metrics.append, metrics.flush, metrics.flush)]
    loop = TrainingLoop(session, parts, None, LoopState(), 0, sinks, lambda line: None, None)
    loop.progress._show = False
    loop.meter = Meter(loop.loop_state, 0, steps)
    loop.meter.add = timed("reading", loop.meter.add)
    begun = time.perf_counter()
    loop.run(state)
    whole = time.perf_counter() - begun
    return {name: 1e3 * seconds / steps for name, seconds in {"step": whole, **spent}.items()}


def in_turn(make: Any, turns: int) -> dict[str, dict[str, float]]:
    """Return the medians of what `make(late)` returns, asked in turn late and at once, after a turn that warms."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for turn in range(turns + 1):
        for late in (False, True):
            one = make(late)
            if turn:
                found[late].append(one)
    return {
        ("late" if late else "at once"): {name: statistics.median(one[name] for one in all_) for name in all_[0]}
        for late, all_ in found.items()
    }


def main() -> None:
    """Measure and print."""
    options = parse()
    config = run_config(options, "lora")
    config.train.logging_steps, config.train.save_strategy = 1, "no"
    model = random_model(options, "lora")
    steps = prepare_steps(config, model, 1_000_000)
    ids = token_ids(options, model.architecture.vocab_size).astype(np.int32)
    places = np.broadcast_to(np.arange(options.tokens, dtype=np.int32), (options.rows, options.tokens))
    whole = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "positions": places, "segment_ids": np.ones_like(places)}
    batch = {name: part[None] for name, part in whole.items()}
    setting = config, model, batch
    records = []
    with tempfile.TemporaryDirectory() as folder:

        def real(late: bool) -> dict[str, float]:
            state = steps.start(model.trainable)
            return run(steps.train, lambda b: steps.put_batch(b, 1), state, setting, late, options.steps, folder)

        records.append({"device": "jax's CPU backend", **in_turn(real, options.turns)})
        for milliseconds in options.device_ms:

            def sleeping(late: bool, seconds: float = milliseconds / 1e3) -> dict[str, float]:
                device = SleepingDevice(seconds)
                found = run(device.train, lambda b: steps.put_batch(b, 1), None, setting, late, options.steps, folder)
                return {**found, "device idle": 1e3 * statistics.mean(device.idle)}

            records.append({"device": f"sleeps {milliseconds:g} ms a step", **in_turn(sleeping, options.turns)})
    if options.json:
        print(json.dumps({"jax": jax.__version__, "records": records}))
        return
    print("| device | read | ms a step | handing over | reading, with waiting | other | device idle | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for record in records:
        for name in ("at once", "late"):
            one = record[name]
            idle = f"{one['device idle']:.2f}" if "device idle" in one else ""
            ratio = f"{record['at once']['step'] / one['step']:.3f}"
            other = one["step"] - one["handing over"] - one["reading"]
            print(
                f"| {record['device']} | {name} | {one['step']:.2f} | {one['handing over']:.2f} | "
                f"{one['reading']:.2f} | {other:.2f} | {idle} | {ratio} |"
            )


if __name__ == "__main__":
    main()
