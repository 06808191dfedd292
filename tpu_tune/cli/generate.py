"""`tpu-tune generate`: answer prompts."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from tpu_tune.cli import numbers
from tpu_tune.cli.common import DTYPES, Commands, add_step
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "generate",
        run,
        "answer prompts with a model, with or without an adapter",
        'tpu-tune generate --model output --prompt "What is AI?"\n'
        '  tpu-tune generate --model model.gguf --adapter output/adapter --prompt "What is AI?"',
    )
    add_model(parser)
    parser.add_argument(
        "--prompt", action="append", help="what to answer; may be given several times; default: lines of standard input"
    )
    add_sampling(parser, max_new_tokens=128)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the model to ask, its adapter, and how it is loaded and asked."""
    add_loading(parser)
    parser.add_argument(
        "--adapter", help="PEFT adapter directory, or a run with one, local or gs://; of a run, in place of its own"
    )


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_model` but the adapter."""
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face id, model directory (a merged one too), .gguf file, or run directory, local or gs://",
    )
    add_step(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of activations and weights (default: a run's own, float32 of a model)"
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "int4", "nf4", "mxfp4"),
        help="store the linear layers so (default: as the run did)",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="ask through the chat template, or go on from the plain text; by default as the rows of a run asked, and "
        "of another model through the template",
    )


def add_sampling(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the options of `sampling_of`; `max_new_tokens` is the default length."""
    parser.add_argument(
        "--max-new-tokens",
        type=numbers.whole(1),
        default=max_new_tokens,
        help=f"length of an answer (default {max_new_tokens})",
    )
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=numbers.real(at_least=0), default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--top-k", type=numbers.whole(), default=0, help="draw among the K likeliest (default: all)")
    parser.add_argument(
        "--top-p",
        type=numbers.real(above=0, at_most=1),
        default=0.95,
        help="draw among the likeliest that reach this probability (default 0.95)",
    )
    parser.add_argument("--seed", type=numbers.seed, default=0, help="of the draws (default 0)")


def sampling_of(options: argparse.Namespace) -> Any:
    """Return the `Sampling` that the options of `add_sampling` give."""
    from tpu_tune.inference import Sampling

    return Sampling(
        options.max_new_tokens,
        0.0 if options.greedy else options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.inference.run_model import load_any

    prompts = options.prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT (as often as you like), or lines on standard input")
    sampling = sampling_of(options)
    model = load_any(options.model, options.dtype, options.quantize, options.adapter, step=options.step)
    if options.chat is None and (note := _how_asked(model)):
        print(note, file=sys.stderr)
    answers = model.generate(prompts, sampling, chat=options.chat)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(
            json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False)
            if options.json
            else f"> {prompt}\n{answer.strip()}\n"
        )
    return 0


def _how_asked(model: Any) -> str:
    """Say that prompts go past the chat template, as the rows of the training did."""
    if model.taught in ("", "chat") or model.architecture.encoder or not model.tokenizer.chat_template:
        return ""
    form = "with Stanford Alpaca's prompt" if model.taught == "alpaca" else "in plain text"
    return f"note: asked {form}, as the rows of its training were; --chat asks through the chat template"
