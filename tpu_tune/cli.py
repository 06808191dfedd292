"""`tpu-tune`: one command per job. Each parses, calls one function and prints.

Configuration keys are given as absl and ml_collections users know them: `--config FILE.py`, then
`--config.train.learning_rate=1e-4` for single keys; lists and patterns also as JSON text.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from tpu_tune import __version__
from tpu_tune import config as configuration
from tpu_tune.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 for a user's mistake, 2 for a wrong command line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("tpu_tune").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing is as it should be
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser, overrides = _parser(), []
    plain = []
    while arguments:
        word = arguments.pop(0)
        if word.startswith("--config."):
            key, equals, value = word[len("--config.") :].partition("=")
            if not equals:
                if not arguments:
                    parser.error(f"--config.{key} needs a value")
                value = arguments.pop(0)
            overrides.append((key, value))
        else:
            plain.append(word)
    options, unknown = parser.parse_known_args(plain)
    if unknown:
        key = unknown[0].removeprefix("--").partition("=")[0]
        known = key in dict(configuration.flatten(configuration.default()))
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}"
            + (f"; a config key is written --config.{key}" if known else "")
        )
    if overrides and "config" not in options:
        parser.error(f"{options.command} has no config, so --config.{overrides[0][0]} means nothing to it")
    options.overrides = overrides
    try:
        status = options.run(options) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _complain(
            f"the device's memory does not suffice ({str(error).splitlines()[0][:200]}). Lower "
            "train.per_device_train_batch_size (and raise train.gradient_accumulation_steps as much) or data.max_length, "
            "set model.remat=full, or quantize.format=nf4"
        )


def _complain(text: str) -> int:
    print(f"tpu-tune: {' '.join(text.split())}", file=sys.stderr)
    return 1


def _train(options: argparse.Namespace) -> int:
    config = _config(options)
    from tpu_tune.training import distributed

    with distributed.leaving_alone():
        distributed.join()
    import tpu_tune

    if not options.no_check:
        _check_memory(config)

    # With --json standard output holds nothing but JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        with distributed.leaving_alone():
            run = tpu_tune.train(config)
    if options.json:
        print(
            json.dumps({"status": run.status, "step": run.step, "output_dir": run.output_dir, "result": run.result_dir})
        )
    elif run.status != "interrupted":
        from tpu_tune.checkpoints import storage

        curves = os.path.join(run.output_dir, "curves.png")
        print(
            f"metrics: {os.path.join(run.output_dir, 'metrics.jsonl')}"
            + (f"; curves: {curves}" if storage.exists(curves) else "")
        )
    return 0


def _check_memory(config: Any) -> None:
    """Plan for the devices of this machine, before anything is downloaded or loaded.

    Raises:
      UserError: the job does not fit; the table is on standard error.
    """
    from tpu_tune import planning

    log = logging.getLogger("tpu_tune")
    checkpoints = os.path.join(config.output_dir, "checkpoints")
    if os.path.isdir(checkpoints) and os.listdir(checkpoints):
        return  # it has run before
    device = planning.device_here()
    if device is None:
        return
    log.info("does it fit %s? (compiling the step beforehand; --no-check leaves it out)", device.name)
    try:
        figures = planning.plan(config, device)
    except UserError:
        return  # training says it better
    except Exception as error:  # a plan that cannot be made is no reason not to train
        log.warning("the memory could not be checked beforehand (%s: %s)", type(error).__name__, error)
        return
    log.info("%s (compiler: %s)", planning.verdict(figures), figures["compiler"])
    if figures["fits"] or figures["compiler"].startswith("none"):
        return
    print(planning.table(figures), file=sys.stderr)
    raise UserError(
        f"this job does not fit {device.name}; tpu-tune plan --suggest --device '{device.name}' with the same --config "
        "looks for one that does, and --no-check trains all the same"
    )


def _plan(options: argparse.Namespace) -> int:
    from tpu_tune import planning

    config, device = _config(options), planning.find_device(" ".join(options.device))
    if not options.suggest:
        figures = planning.plan(config, device, options.rows, not options.no_compile)
        print(json.dumps(figures, indent=2) if options.json else planning.table(figures))
        return 0

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    say(f"looking for what fits {device.name}, with at most {options.max_compiles} compiles")
    found = planning.suggest(config, device, options.rows, not options.no_compile, options.max_compiles, say)
    print(json.dumps(found, indent=2) if options.json else planning.advice(found, device))
    return 0


def _generate(options: argparse.Namespace) -> int:
    import tpu_tune
    from tpu_tune.inference import Sampling

    prompts = options.prompt or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT (as often as you like), or lines on standard input")
    sampling = Sampling(
        options.max_new_tokens,
        0.0 if options.greedy else options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
    )
    model = tpu_tune.load(options.model, options.dtype, options.quantize, options.adapter)
    answers = model.generate(prompts, sampling, chat=options.chat)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(
            json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False)
            if options.json
            else f"> {prompt}\n{answer.strip()}\n"
        )
    return 0


def _export(options: argparse.Namespace) -> int:
    from tpu_tune.inference import export

    figures: dict[str, Any] = {}
    if not (options.base or options.merge or options.gguf) and (options.merge_base or options.dtype):
        raise UserError(
            "--merge-base and --dtype belong to --merge, --gguf or --base; the adapter alone is copied as it is"
        )
    if options.gguf and options.dtype:
        raise UserError("--dtype belongs to --merge or --base; a GGUF file's numbers are chosen with --gguf-type")
    if options.gguf_type and not options.gguf:
        raise UserError("--gguf-type belongs to --gguf")
    if options.gguf:
        kind = options.gguf_type or "f16"
        figures = export.export_gguf(options.run_directory, options.output, options.merge_base or "original", kind)
        what = f"the merged model as GGUF, {kind.upper()}"
    elif options.base:
        export.export_base(
            options.run_directory, options.output, options.merge_base or "dequantized", options.dtype or ""
        )
        what = "the base that PEFT should load"
    elif options.merge:
        figures = export.export_merged(
            options.run_directory, options.output, options.merge_base or "original", options.dtype or ""
        )
        what = f"the model merged into its {options.merge_base or 'original'} base"
    else:
        export.export_adapter(options.run_directory, options.output)
        what = "the PEFT adapter"
    if options.json:
        print(json.dumps({"output": options.output, **figures}))
        return 0
    print(f"{options.output}: {what}")
    if figures:
        print(
            f"against the model as it was trained: logits differ by at most {figures['max_logit_difference']:.4g} "
            f"({figures['relative_logit_difference']:.2%} of the largest), the first guess is the same in "
            f"{figures['same_first_guesses']:.1%} of places"
        )
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from tpu_tune.inference.inspection import inspect_model
    from tpu_tune.transforms import LoraSpec

    config = _config(options)
    facts = inspect_model(options.model, LoraSpec.from_config(config.lora))
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{options.model}: {facts['family']}, {facts['parameters']:,} parameters")
    for key in ("hidden_size", "num_layers", "num_encoder_layers", "num_heads", "num_kv_heads", "vocab_size"):
        if key in facts:
            print(f"  {key}: {facts[key]:,}")
    print("modules (N is the layer; shapes are in x out):")
    for module in facts["modules"]:
        layers = f"x{module['layers']}" if module["layers"] else ""
        note = f"uses the weight of {module['tied_to']}" if module["tied_to"] else module["role"]
        shape = " x ".join(map(str, module["shape"])) + (" + bias" if module["bias"] else "")
        print(f"  {module['name']:<44} {shape:<20} {layers:<5} {note}")
    lora = facts["lora"]
    print("this LoRA configuration would train:")
    for target in lora["targets"]:
        print(f"  {target['name']}  rank {target['rank']}, {target['layers']} x, {target['trainable']:,} parameters")
    share = 100 * lora["trainable"] / lora["all"]
    print(f"trainable params: {lora['trainable']:,} || all params: {lora['all']:,} || trainable%: {share:.4f}")
    return 0


def _config(options: argparse.Namespace) -> Any:
    config = configuration.from_file(options.config) if options.config else configuration.default()
    for key, value in options.overrides:
        configuration.assign(config, key, value)
    return configuration.check(config)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tpu-tune", description="Fine-tune an open language model with JAX on a TPU, a GPU or a CPU.",
        epilog="tpu-tune COMMAND --help shows a command's options and an example.",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"tpu-tune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(run=run, overrides=[])
        added.add_argument("--json", action="store_true", help="print figures as JSON")
        return added

    train = command("train", _train, "train, or go on with a run that is in output_dir",
                    "tpu-tune train --config configs/qlora.py --config.model.path=DIR --config.data.train=chats.jsonl")  # fmt: skip
    train.add_argument(
        "--config", required=True, metavar="FILE", help="config file; --config.KEY=VALUE overrides a key"
    )

    train.add_argument(
        "--no-check", action="store_true", help="start without asking the compiler first whether the job fits"
    )

    plan = command("plan", _plan, "say whether a job fits a device, and what it takes; needs neither weights nor the device",
                   "tpu-tune plan --config configs/qlora.py --config.model.path=llama-7b --device v5e-1")  # fmt: skip
    plan.add_argument("--config", metavar="FILE", help="config file; --config.KEY=VALUE overrides a key")
    plan.add_argument(
        "--device", required=True, nargs="+", metavar="NAME",
        help="TPU slice (v2-8, v3-8, v4-8, v5e-1, v5e-4, v5e-8, v5e-64, v6e-1, v6e-8, v5p-8) or card (t4, l4, rtx3090, "
        "rtx4080, rtx4090, a100-40g, a100-80g, h100, h200, rtx6000ada-48g), with x2 behind it for two cards",
    )  # fmt: skip
    plan.add_argument("--suggest", action="store_true", help="look for the largest batch that fits")
    plan.add_argument(
        "--rows", type=int, metavar="N", help="training rows (packed ones, if data.packing), for the run's length"
    )
    plan.add_argument(
        "--no-compile", action="store_true", help="count bytes only: seconds instead of minutes, and an estimate"
    )
    plan.add_argument("--max-compiles", type=int, default=8, metavar="N", help="of --suggest (default 8)")

    generate = command("generate", _generate, "answer prompts with a model, with or without an adapter",
                       'tpu-tune generate --model model.gguf --adapter output/adapter --prompt "What is AI?"')  # fmt: skip
    generate.add_argument(
        "--model", required=True, help="Hugging Face id, local directory (a merged model too), or .gguf file"
    )
    generate.add_argument("--adapter", help="PEFT adapter directory")
    generate.add_argument(
        "--prompt", action="append", help="what to answer; may be given several times; default: lines of standard input"
    )
    generate.add_argument("--max-new-tokens", type=int, default=128, help="length of an answer (default 128)")
    generate.add_argument("--greedy", action="store_true", help="always the likeliest token")
    generate.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    generate.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest (default: all)")
    generate.add_argument(
        "--top-p", type=float, default=0.95, help="draw among the likeliest that reach this probability (default 0.95)"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    generate.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of activations and weights (default float32)"
    )
    generate.add_argument("--quantize", choices=("int8", "int4", "nf4"), help="store the linear layers so")
    generate.add_argument(
        "--no-chat", dest="chat", action="store_false", help="go on from the plain text, without the chat template"
    )

    export = command("export", _export, "write a run's adapter, its merged model, or its base",
                     "tpu-tune export output/quickstart --merge --output merged\n  tpu-tune export output/quickstart --gguf --output model.gguf")  # fmt: skip
    export.add_argument("run_directory", metavar="RUN", help="run directory")
    export.add_argument("--output", required=True, help="directory to write; with --gguf the file")
    what = export.add_mutually_exclusive_group()
    what.add_argument("--merge", action="store_true", help="write a Hugging Face model with the adapter merged in")
    what.add_argument(
        "--gguf", action="store_true", help="write one GGUF file with the adapter merged in, for llama.cpp and its kin"
    )
    what.add_argument(
        "--base", action="store_true", help="write the base model that PEFT should load below the adapter"
    )
    export.add_argument("--merge-base", choices=("original", "dequantized"),
                        help="weights to merge into (default original) or to write as the base (default dequantized, exact to training)")  # fmt: skip
    export.add_argument("--dtype", choices=DTYPES, help="of the tensors (default: the original's; float32 from a GGUF)")

    export.add_argument(
        "--gguf-type", choices=("f16", "bf16", "q8_0"), help="number format of a GGUF file's matrices (default f16)"
    )

    inspect = command("inspect", _inspect, "show a model's modules and what a LoRA configuration would train; reads no weights",
                      'tpu-tune inspect model.gguf --config.lora.target_modules=q_proj,v_proj --config.lora.rank=16')  # fmt: skip
    inspect.add_argument("model", metavar="MODEL", help="Hugging Face id, local directory, or .gguf file")
    inspect.add_argument(
        "--config", metavar="FILE", help="config file whose lora.* is used; --config.lora.KEY=VALUE overrides"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
