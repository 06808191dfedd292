"""`tpu-tune eval`: measure a model, or a run beside its base, on a file of questions or texts."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from typing import Any

from tpu_tune.cli import numbers
from tpu_tune.cli.common import DTYPES, Commands, add_step, read_config
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "eval",
        run,
        "measure a model on questions or texts, alone or beside its base",
        "tpu-tune eval --config configs/qlora.py\n"
        "  tpu-tune eval --model output/quickstart --base --task multiple-choice --data hellaswag.jsonl",
    )
    parser.add_argument("--model", help="run directory, Hugging Face id, local directory, or .gguf file")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config file. Without --model: measure its model on its evaluation rows. With --model: its data settings "
        "say which rows --task perplexity reads, and how. --config.KEY=VALUE overrides a key",
    )
    parser.add_argument("--adapter", help="PEFT adapter directory, or a run with one")
    add_step(parser)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--against", metavar="MODEL", help="a model or run to compare with on the same rows")
    other.add_argument("--base", action="store_true", help="compare a run with its model from before training")
    parser.add_argument(
        "--task",
        choices=("perplexity", "multiple-choice", "mmlu", "exact-match"),
        default="perplexity",
        help="multiple-choice takes rows as of HellaSwag, ARC, TruthfulQA and MMLU; mmlu scores as QLoRA does; "
        "exact-match takes questions and answers, such as GSM8K (default perplexity)",
    )
    parser.add_argument(
        "--data", default="", help="file, directory or hub id (perplexity of a run: its own evaluation data)"
    )
    parser.add_argument("--split", default="", help="of a directory or a hub id, such as validation, val or test")
    parser.add_argument("--subset", default="", help="of a hub id, such as ARC-Easy")
    parser.add_argument("--limit", type=numbers.whole(), default=0, metavar="N", help="only the first N rows")
    parser.add_argument(
        "--shots", type=numbers.whole(), default=0, metavar="N", help="solved examples before each question (default 0)"
    )
    parser.add_argument(
        "--shots-data",
        default="",
        metavar="FILE",
        help="where they come from (default: the first rows of --data, not scored)",
    )
    parser.add_argument(
        "--by",
        choices=("likelihood", "letter"),
        default="likelihood",
        help="what decides a multiple choice (default likelihood)",
    )
    parser.add_argument(
        "--max-new-tokens", type=numbers.whole(1), default=256, help="length of an answer (default 256)"
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--chat", action="store_true", help="exact-match: ask through the chat template")
    forms.add_argument("--as-taught", action="store_true", help="exact-match: ask as the rows of a run's training did")
    parser.add_argument(
        "--seed", type=numbers.seed, default=0, help="of shuffled choices and of the intervals' draws (default 0)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of activations and weights; float16 or bfloat16 is evaluation in half precision "
        "(default: the run's own, float32 of a model)",
    )
    parser.add_argument(
        "--quantize",
        choices=("none", "int8", "int4", "nf4", "mxfp4"),
        help="store the linear layers so (default: as the run did)",
    )
    parser.add_argument("--output", metavar="DIR", help="directory for predictions.jsonl and results.json")


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    if not options.model:
        return _without_model(options)
    from tpu_tune.inference.run_model import load_any
    from tpu_tune.training.tasks.run import TaskSettings, run_task

    settings = TaskSettings(
        options.task,
        options.data,
        options.shots,
        options.shots_data,
        options.by,
        options.split,
        options.subset,
        options.limit,
        options.max_new_tokens,
        options.chat,
        options.as_taught,
        seed=options.seed,
    )
    config = None
    if settings.task == "perplexity":
        config = _data_config(options)
    elif options.config or options.overrides:
        raise UserError(
            f"--config and --config.KEY set which rows --task perplexity reads, and how; --task {settings.task} takes "
            "neither"
        )
    else:
        _check_rows(settings)  # before any weight is read

    model = load_any(options.model, options.dtype, options.quantize, options.adapter, step=options.step)
    outcomes = [run_task(model, settings, config)]
    names = [options.model + (f" + {options.adapter}" if options.adapter else "")]
    names[0] += f", step {options.step}" if isinstance(options.step, int) else f", {options.step}" * bool(options.step)
    del model  # one model at a time
    if options.base or options.against:
        names.append("before training" if options.base else options.against)
        path = options.model if options.base else options.against
        outcomes.append(
            run_task(load_any(path, options.dtype, options.quantize, before=options.base), settings, config)
        )
    report = _report(settings, names, outcomes)
    if options.output:
        _write(options.output, report, outcomes)
    print(json.dumps(report) if options.json else _table(report))
    return 0


def _without_model(options: argparse.Namespace) -> int:
    """The loss of a config's own model, by the code that evaluates in training."""
    if options.task != "perplexity" or options.data or options.adapter or options.base or options.against:
        raise UserError("no model; give --model (a run directory, an id, a directory or a .gguf file)")
    if not options.config and not options.overrides:
        raise UserError("nothing to evaluate; give --model, or --config FILE")
    config = read_config(options)
    if options.dtype:
        config.model.dtype = options.dtype
    if options.quantize:
        config.quantize.format = options.quantize
    from tpu_tune.training import distributed
    from tpu_tune.training.evaluate_only import evaluate_only

    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        with distributed.leaving_alone():
            distributed.join()
            figures = evaluate_only(config, step=options.step)
    if options.json:
        print(json.dumps(figures))
    return 0


def _data_config(options: argparse.Namespace) -> Any:
    """The data settings of perplexity: the run's own, or those of --config; --data names other rows."""
    from tpu_tune import config as configuration
    from tpu_tune.checkpoints.run_directory import RunDirectory

    if options.split or options.subset:
        raise UserError("--split and --subset belong to questions; for perplexity name the file with --data")
    run_directory = RunDirectory(options.model)
    if not options.config and run_directory.exists():
        config = run_directory.config()
        for key, value in options.overrides:
            configuration.assign(config, key, value)
    else:
        config = read_config(options)
    if options.data:
        config.data.train = config.data.eval = options.data
    config.data.train = config.data.train or config.data.eval
    if not config.data.train:
        raise UserError("no data given; name a file, a directory or a hub id with --data")
    return configuration.check(config)


def _check_rows(settings: Any) -> None:
    """Find what is wrong with the questions while it costs nothing."""
    from tpu_tune.training.tasks import exact_match, mmlu, questions
    from tpu_tune.training.tasks.run import read_rows_for

    rows, examples = read_rows_for(settings)
    if settings.task == "mmlu":
        mmlu.prompts_of(rows, settings.shots, examples)
        return
    read = exact_match.read_asked if settings.task == "exact-match" else questions.read_questions
    read(rows)
    if examples is not None:
        read(examples)


def _report(settings: Any, names: list[str], outcomes: list[Any]) -> dict[str, Any]:
    """The figures of each model with their intervals, and of two the differences."""
    from tpu_tune.training.tasks import compare, interval

    chosen = {key: value for key, value in dataclasses.asdict(settings).items() if value not in ("", 0, False)}
    models = [
        {
            "model": name,
            **outcome.figures,
            "intervals": {m.name: _pair(interval(m, settings.seed)) for m in outcome.measures},
        }
        for name, outcome in zip(names, outcomes, strict=True)
    ]
    report = {**chosen, **models[0]}
    if len(models) == 2:
        report["against"] = models[1]
        report["difference"] = {
            ours.name: dataclasses.asdict(compare(ours, theirs, settings.seed))
            for ours, theirs in zip(outcomes[0].measures, outcomes[1].measures, strict=True)
        }
    return report


def _pair(interval: Any) -> list[float]:
    return [interval.low, interval.high]


def _table(report: dict[str, Any]) -> str:
    """The report for people."""
    models = [report, *([report["against"]] if "against" in report else [])]
    count = report.get("questions")
    about = f"{report['task']}" + (f", {count} questions of {report['data']}" if count else "")
    about += f", by {report['by']}" if report["task"] == "multiple-choice" else ""
    about += f", {report['shots']} shots" if report.get("shots") else ""
    about += ", choices shuffled (the right one always stands at one place)" if report.get("shuffled") else ""
    lines = [["", *(model["model"] for model in models), *(["difference"] if len(models) == 2 else [])]]
    for name in report["intervals"]:
        is_share = name not in ("eval_loss", "bits_per_byte")
        line = [name, *(_bounds(model[name], *model["intervals"][name], is_share) for model in models)]
        if len(models) == 2:
            line.append(_bounds(*report["difference"][name].values(), is_share, sign="+"))
        lines.append(line)
        if name == "eval_loss":
            exps = [[math.exp(min(x, 700)) for x in (model[name], *model["intervals"][name])] for model in models]
            lines.append(["perplexity", *(_bounds(*values, False) for values in exps)])
    for name in report:
        if name.startswith("mmlu_") and name not in report["intervals"]:
            is_share = name != "mmlu_loss"
            lines.append([name, *(f"{model[name]:.1%}" if is_share else f"{model[name]:.4f}" for model in models)])
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(lines[0]))]
    body = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    wilson = report["task"] in ("multiple-choice", "exact-match")
    how = "95% confidence intervals: " + ("Wilson's score" if wilson else "bootstrap")
    how += "; of the difference, paired bootstrap" if len(models) == 2 else ""
    return "\n".join([about, *body, how])


def _bounds(value: float, low: float, high: float, is_share: bool, sign: str = "") -> str:
    kind = f"{sign}.1%" if is_share else f"{sign}.4f"
    return f"{value:{kind}} [{low:{kind}}, {high:{kind}}]"


def _write(directory: str, report: dict[str, Any], outcomes: list[Any]) -> None:
    from tpu_tune.data.streams import aside, writing

    files = ["predictions.jsonl", "predictions_against.jsonl"]
    for name, outcome in zip(files, outcomes, strict=False):
        with writing(os.path.join(directory, name)) as writer:
            for row in outcome.predictions:
                writer.write(row)
    with aside(os.path.join(directory, "results.json")) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
