"""What `tpu-tune serve` gives its clients: tokens a second, time to the first token, time of an answer.

    python benchmarks/serve.py --model DIR
    python benchmarks/serve.py --model DIR --clients 1 4 16 --seconds 60 --only tpu-tune --json

The same model directory is served by `tpu-tune serve` and, where torch is installed, by `transformers serve` (with and
without its continuous batching), one after the other on this machine, both in float32 on the CPU unless `--device` says
otherwise. So many clients stream greedy chats of `--tokens` tokens, each the next as soon as its last has ended, for so
many seconds; answers that have begun by then are waited for. One round before that is not counted: it compiles. Of a
server that writes fewer tokens than asked for (it met an end), those that came are counted, one a chunk of the stream
at most where it sends no usage.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai

QUESTIONS = [
    "Write a short story about a lighthouse.", "Explain how a bicycle stays upright.", "List ten animals.",
    "Describe a walk through a forest.", "Why do leaves change their colour in autumn?", "Plan a day in a small town.",
    "Tell me about the history of bread.", "What should a beginner know about chess?",
]  # fmt: skip
_START = 600  # seconds until a server must answer


def commands(options: argparse.Namespace, port: int) -> dict[str, list[str]]:
    """Return each server's command line by its name."""
    ours = ["tpu_tune", "serve", "--model", options.model, "--name", "model", "--slots", str(options.slots)]
    theirs = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    transformers = ["serve", options.model, "--device", options.device, "--dtype", "float32"]
    return {
        "tpu-tune": ["-m", *ours, "--port", str(port), "--dtype", "float32"],
        "transformers": ["-c", theirs, *transformers, "--port", str(port), "--host", "127.0.0.1"],
        "transformers --continuous-batching": [
            "-c", theirs, *transformers, "--port", str(port), "--host", "127.0.0.1", "--continuous-batching",
        ],
    }  # fmt: skip


@contextlib.contextmanager
def served(name: str, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Run a server; the value is its address, and the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, *commands(options, port)[name]], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None or time.monotonic() - begun > _START:
                raise RuntimeError(f"{name} did not start")
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            time.sleep(0.5)
        yield address, time.monotonic() - begun
    finally:
        process.terminate()
        process.wait(60)


def ask(api: Any, model: str, question: str, tokens: int) -> tuple[float, float, int]:
    """Stream one answer; return seconds to its first token, to its end, and its tokens."""
    begun, first, pieces, usage = time.monotonic(), 0.0, 0, None
    messages = [{"role": "user", "content": question}]
    how = {"stream": True, "temperature": 0, "max_tokens": tokens, "stream_options": {"include_usage": True}}
    for chunk in api.chat.completions.create(model=model, messages=messages, **how):
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].delta.content:
            first = first or time.monotonic() - begun
            pieces += 1
    return first, time.monotonic() - begun, usage.completion_tokens if usage else pieces


def load(address: str, model: str, clients: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of so many clients."""
    begun = time.monotonic()

    def keep_asking(place: int) -> list[tuple[float, float, int]]:
        api = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
        found = []
        while not found or time.monotonic() - begun < options.seconds:
            question = QUESTIONS[(place + len(found)) % len(QUESTIONS)]
            found.append(ask(api, model, question, options.tokens))
        return found

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = [answer for of_client in pool.map(keep_asking, range(clients)) for answer in of_client]
    first, whole, tokens = (np.asarray(column) for column in zip(*answers, strict=True))
    return {
        "clients": clients,
        "answers": len(answers),
        "tokens_per_second": float(tokens.sum()) / (time.monotonic() - begun),
        **{f"first_token_p{rank}": float(np.percentile(first, rank)) for rank in (50, 95)},
        **{f"answer_p{rank}": float(np.percentile(whole, rank)) for rank in (50, 95)},
    }


def main() -> None:
    """Measure each server and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model directory with weights that torch reads too")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--slots", type=int, default=16, help="of tpu-tune serve")
    parser.add_argument("--device", default="cpu", help="of transformers serve")
    parser.add_argument("--only", nargs="+", help="these servers, by name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for name in options.only or commands(options, 0):
        with served(name, options) as (address, seconds):
            model = "model" if name == "tpu-tune" else options.model
            load(address, model, max(options.clients), argparse.Namespace(seconds=0, tokens=8))
            for clients in options.clients:
                rows.append({"server": name, "start": seconds, **load(address, model, clients, options)})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(rows))
        return
    print("| server | clients | answers | tokens/s | first token p50, p95 (s) | answer p50, p95 (s) |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['server']} | {row['clients']} | {row['answers']} | {row['tokens_per_second']:.1f} "
            f"| {row['first_token_p50']:.2f}, {row['first_token_p95']:.2f} "
            f"| {row['answer_p50']:.2f}, {row['answer_p95']:.2f} |"
        )


if __name__ == "__main__":
    main()
