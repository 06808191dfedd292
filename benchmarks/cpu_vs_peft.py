"""Training speed against torch + PEFT on the CPU: LoRA on SmolLM2 over the quickstart's ragged chats.

    python benchmarks/cpu_vs_peft.py                     # float32 and bfloat16, three rounds each
    python benchmarks/cpu_vs_peft.py --dtypes float32 --rounds 5 --json

Both train rank-16 adapters on every linear layer of the same weights (not quantized) with the same tokens, loss masks
and AdamW. We take packed rows through the package's own data room and jitted step; they take padded batches of eight
conversations in random order, in whichever of torch's ways (attention kernel, and in bfloat16 cast model or autocast)
is fastest when it is tried at the start. Each side lives in a process of its own and is asked in turn for
about the same number of tokens, so that what else the machine does hits both. What counts is real tokens (no padding)
a second. CPU time is the process's, all threads: on a busy machine tokens a CPU-second vary less than tokens a second.

Needs torch and peft (`pip install .[parity]`). The base and the chats come through `launch/fetch.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from sides import Side, serve

HERE = pathlib.Path(__file__).resolve()
RANK, ALPHA, LEARNING_RATE, MAX_LENGTH, BATCH = 16, 32.0, 2e-4, 256, 8


# --- what both sides share ------------------------------------------------------------------------------------------
def run_config(model: str, chats: str, dtype: str, quantize: str = "none") -> Any:
    """Return the configuration of the run that is timed."""
    from tpu_tune import config as configuration

    return configuration.from_dict(
        {
            "method": "lora",
            "model": {"path": model, "dtype": dtype, "remat": "dots"},
            "quantize": {"format": quantize},
            "lora": {"rank": RANK, "alpha": ALPHA, "target_modules": "all-linear"},
            "data": {"train": chats, "format": "messages", "max_length": MAX_LENGTH, "eval_ratio": 0.0},
            "train": {
                "per_device_train_batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "lr_scheduler_type": "constant",
            },
            "mesh": {"data": 1, "fsdp": 1},
        }
    )


def timed(step: Any, tokens: int) -> dict[str, Any]:
    """Call `step() -> (real tokens, loss)` until it has seen so many tokens.

    Returns:
      `tokens`, `seconds`, `cpu_seconds` (of the process) and `losses`.
    """
    seen, losses = 0, []
    begun, cpu = time.monotonic(), time.process_time()
    while seen < tokens:
        count, loss = step()
        seen += count
        losses.append(loss)
    return {
        "tokens": seen,
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "losses": losses,
    }


# --- ours -------------------------------------------------------------------------------------------------------------
def ours(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Our side: yields the start-up times, then one timing for each number of tokens that is sent in."""
    import jax

    from tpu_tune.data import Batches, load_data
    from tpu_tune.models import architecture
    from tpu_tune.training.prepare_model import prepare_model
    from tpu_tune.training.prepare_steps import prepare_steps
    from tpu_tune.transforms import sharding

    config = run_config(options.model, options.chats, options.dtype)
    begun = time.monotonic()
    model = prepare_model(config, sharding.make_mesh(config.mesh))
    jax.block_until_ready((model.trainable, model.frozen))
    record = {"load_seconds": time.monotonic() - begun, "jax": jax.__version__}
    data = load_data(config, model.source.load_tokenizer(), architecture(model.source.config).vocab_size)
    batches = Batches(data.train, BATCH, 1, config.data.data_seed)
    steps = prepare_steps(config, model, 1000)
    state, number = steps.initial_state, 0

    def step() -> tuple[int, float]:
        nonlocal state, number
        state, metrics = steps.train(state, model.frozen, steps.put_batch(batches.batch(number), 1))
        number += 1
        return int(metrics["num_tokens"]), float(metrics["loss"])

    begun = time.monotonic()
    step()
    record["first_step_seconds"] = time.monotonic() - begun
    record["fill"] = data.summary["train"]["fill"]
    tokens = yield record
    while True:
        tokens = yield timed(step, tokens)


def load_times(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time to load and quantize to nf4, in a process that has done nothing else."""
    begun = time.monotonic()
    import jax

    from tpu_tune.training.prepare_model import prepare_model
    from tpu_tune.transforms import sharding

    config = run_config(options.model, options.chats, options.dtype, "nf4")
    record = {"import_seconds": time.monotonic() - begun}
    begun = time.monotonic()
    model = prepare_model(config, sharding.make_mesh(config.mesh))
    jax.block_until_ready((model.trainable, model.frozen))
    yield {**record, "load_quantize_seconds": time.monotonic() - begun}


# --- theirs -----------------------------------------------------------------------------------------------------------
def theirs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """torch + PEFT: yields how it runs fastest, then one timing for each number of tokens that is sent in."""
    import contextlib

    import numpy as np
    import peft
    import torch
    import transformers

    from tpu_tune.checkpoints.source import open_source
    from tpu_tune.data import load_data

    torch.set_num_threads(options.cores)
    torch.manual_seed(0)
    half = options.dtype == "bfloat16"
    source = open_source(options.model)
    data = load_data(run_config(options.model, options.chats, options.dtype), source.load_tokenizer()).train.data
    weights = {name: torch.from_numpy(np.asarray(source.read(name), np.float32)) for name in source.shapes}

    def build(attention: str, storage: Any) -> Any:
        config = transformers.AutoConfig.for_model(**source.config)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model.to(storage), lora).train()  # adapters are float32 in any case

    random = np.random.default_rng(0)

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            order = random.permutation(len(data))
            for start in range(0, len(order) - BATCH + 1, BATCH):
                pieces = [slice(data.offsets[i], data.offsets[i + 1]) for i in order[start : start + BATCH]]
                width = max(piece.stop - piece.start for piece in pieces)
                ids, labels = np.zeros((BATCH, width), np.int64), np.full((BATCH, width), -100, np.int64)
                seen = np.zeros((BATCH, width), np.int64)
                for row, piece in enumerate(pieces):
                    length = piece.stop - piece.start
                    ids[row, :length], seen[row, :length] = data.tokens[piece], 1
                    labels[row, :length] = np.where(data.loss_mask[piece], data.tokens[piece], -100)
                yield {
                    "input_ids": torch.tensor(ids),
                    "labels": torch.tensor(labels),
                    "attention_mask": torch.tensor(seen),
                }

    def stepper(attention: str, storage: Any, autocast: bool) -> Any:
        model = build(attention, storage)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
        positions = [0, 0]

        def step(batch: dict[str, Any] | None = None) -> tuple[int, float]:
            batch = next(stream) if batch is None else batch
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            positions[0] += int(batch["attention_mask"].sum())
            positions[1] += batch["attention_mask"].numel()
            return int(batch["attention_mask"].sum()), float(loss.detach())

        return step, positions

    stream = batches()
    probe = next(stream)
    ways = {}
    for attention in ("sdpa", "eager"):
        if half:
            ways[f"{attention}, bfloat16 model"] = (attention, torch.bfloat16, False)
            ways[f"{attention}, autocast of a bfloat16 model"] = (attention, torch.bfloat16, True)
            ways[f"{attention}, autocast of a float32 model"] = (attention, torch.float32, True)
        else:
            ways[attention] = (attention, torch.float32, False)
    tried = {}
    for name, way in ways.items():
        step, _ = stepper(*way)
        step(probe)  # warm-up
        tried[name] = min(timed(lambda step=step: step(probe), 1)["seconds"] for _ in range(3))
        del step
    best = min(tried, key=tried.get)
    step, positions = stepper(*ways[best])
    step(probe)
    tokens = yield {
        "way": best,
        "tried_seconds": tried,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }
    while True:
        positions[:] = [0, 0]
        tokens = yield {**timed(step, tokens), "fill": positions[0] / max(1, positions[1])}


# --- the comparison ---------------------------------------------------------------------------------------------------
def start(side: str, dtype: str, options: argparse.Namespace) -> Side:
    """Start a side."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    # A mesh of virtual devices, set for tests, would cut the processor into pieces; a cache of compiled functions
    # would hide what compiling costs.
    for name in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_DEFAULT_MATMUL_PRECISION"):
        environment.pop(name, None)
    words = [sys.executable, str(HERE), "--side", side, "--dtypes", dtype, "--cores", str(options.cores)]
    return Side([*words, "--model", options.model, "--chats", options.chats], environment)


def compare(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides in turn in one dtype and return all that was measured."""
    say(f"{dtype}: starting both sides (ours compiles, theirs tries its ways)")
    quantizing = start("load", dtype, options)
    quantizing.close()
    we = start("ours", dtype, options)
    they = start("theirs", dtype, options)
    result = {"dtype": dtype, "load": quantizing.first, "ours": we.first, "theirs": they.first, "rounds": []}
    try:
        for number in range(options.rounds):
            load = os.getloadavg()
            mine, other = we.ask(options.tokens), they.ask(options.tokens)
            row = {"ours": mine, "theirs": other, "loadavg": load}
            row["ratio"] = rate(mine) / rate(other)
            row["cpu_ratio"] = rate(mine, "cpu_seconds") / rate(other, "cpu_seconds")
            result["rounds"].append(row)
            say(
                f"{dtype} round {number + 1}: ours {rate(mine):.0f} tokens/s, theirs {rate(other):.0f} tokens/s, "
                f"ratio {row['ratio']:.2f}; a CPU-second: {rate(mine, 'cpu_seconds'):.0f} and "
                f"{rate(other, 'cpu_seconds'):.0f} tokens, ratio {row['cpu_ratio']:.2f}; load average {load[0]:.1f}"
            )
    finally:
        we.close()
        they.close()
    for name in ("ratio", "cpu_ratio"):
        found = [row[name] for row in result["rounds"]]
        result[name] = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return result


def rate(timing: dict[str, Any], by: str = "seconds") -> float:
    """Return real tokens a second (or a CPU-second)."""
    return timing["tokens"] / timing[by]


def say(line: str) -> None:
    """Tell how it goes, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def summary(result: dict[str, Any]) -> str:
    """Return one dtype's results in words."""
    first, theirs_fill = result["ours"], statistics.mean(row["theirs"]["fill"] for row in result["rounds"])
    wall, cpu = result["ratio"], result["cpu_ratio"]
    busy = max(row["loadavg"][0] for row in result["rounds"])
    return "\n".join(
        [
            f"{result['dtype']}:",
            f"  ours / torch + PEFT, real tokens a second: median {wall['median']:.2f} "
            f"({wall['min']:.2f} to {wall['max']:.2f})",
            f"  the same by CPU time: median {cpu['median']:.2f} ({cpu['min']:.2f} to {cpu['max']:.2f})",
            f"  filled with real tokens: {first['fill']:.0%} of our packed rows, "
            f"{theirs_fill:.0%} of their padded batches",
            f"  their fastest way: {result['theirs']['way']}",
            f"  ours: load {first['load_seconds']:.1f} s, "
            f"load and quantize to nf4 {result['load']['load_quantize_seconds']:.1f} s, "
            f"first step with compiling {first['first_step_seconds']:.1f} s",
            f"  highest load average at a round's start: {busy:.1f}"
            + (" (a busy machine: trust the CPU ratio)" if busy > 2 * (os.cpu_count() or 1) else ""),
        ]
    )


def quickstart_inputs(options: argparse.Namespace) -> None:
    """Fill in the paths that were not given: the quickstart's base and chats, fetched."""
    sys.path.insert(0, str(HERE.parent.parent / "launch"))
    import chats_to_jsonl
    import fetch

    options.model = options.model or str(next(fetch.fetch("base").glob("*.gguf")))
    if not options.chats:
        made = fetch.cache_dir() / "quickstart" / "chats.jsonl"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            chats_to_jsonl.convert(fetch.fetch("chats"), made)
        options.chats = str(made)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16", help="one or both of float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side gets")
    parser.add_argument(
        "--tokens", type=int, default=5000, help="real tokens a turn, at least (a packed step holds about 2000)"
    )
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="torch's threads")
    parser.add_argument(
        "--model", default="", help="a .gguf file or Hugging Face directory; default: the quickstart's base, fetched"
    )
    parser.add_argument(
        "--chats", default="", help="a .jsonl of messages; default: the quickstart's, fetched and converted"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--side", choices=("ours", "theirs", "load"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        options.dtype = options.dtypes
        serve({"ours": ours, "theirs": theirs, "load": load_times}[options.side](options))
        return 0
    quickstart_inputs(options)
    results = [compare(dtype, options) for dtype in options.dtypes.split(",")]
    versions = {name: results[0]["theirs"][name] for name in ("torch", "peft", "transformers")}
    versions |= {"jax": results[0]["ours"]["jax"], "python": sys.version.split()[0]}
    if options.json:
        print(json.dumps({"cpus": os.cpu_count(), "versions": versions, "results": results}))
    else:
        print("\n".join(summary(result) for result in results))
        print(f"{os.cpu_count()} CPUs; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
