"""The steps of a recipe as stages: each calls the function of its single command and names the files it has written."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tpu_tune.data.processes import Engine
from tpu_tune.data.recipe import beam
from tpu_tune.data.recipe.settings import options_of
from tpu_tune.data.recipe.stages import Stage
from tpu_tune.errors import UserError

ROWS, BAD = "rows.jsonl", "bad.jsonl"
logger = logging.getLogger(__name__)


def stages_of(recipe: ConfigDict) -> list[Stage]:
    """Return the stages of a checked recipe, in their order."""
    stages = []
    for name in recipe.steps:
        run = functools.partial(_RUN[name], recipe)
        options = options_of(recipe, name)
        parameters = asdict(options)
        if name == "tokenize" and os.path.exists(options.tokenizer_path):
            parameters["tokenizer_files"] = _file_states(Path(options.tokenizer_path))
        stages.append(Stage(name, {**parameters, "skip_bad": recipe.skip_bad}, run))
    return stages


def _file_states(path: Path) -> list[str]:
    """Sizes and times of a tokenizer's files, so that another tokenizer under the same path is noticed."""
    files = sorted(path.glob("*token*")) if path.is_dir() else [path]
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]


def _ingest(recipe: ConfigDict, files: list[str], folder: Path) -> dict[str, Any]:
    from tpu_tune.data.ingest import ingest

    options = options_of(recipe, "ingest", skip_bad=recipe.skip_bad)
    with _engine(recipe, folder) as engine:
        bad = os.path.join(os.path.expanduser(recipe.output_dir), BAD)
        report = ingest(files, str(folder / ROWS), options, recipe.num_workers, engine, bad).as_dict()
    if not report["bad"]:
        os.unlink(bad)
    return {"rows_out": report.pop("rows"), **report, "outputs": [ROWS]}


def _engine(recipe: ConfigDict, folder: Path) -> contextlib.AbstractContextManager[Engine | None]:
    return beam.engine(folder, recipe.beam_options) if recipe.runner == "beam" else contextlib.nullcontext()


def _clean(recipe: ConfigDict, files: list[str], folder: Path) -> dict[str, Any]:
    from tpu_tune.data.clean import clean

    options, output = options_of(recipe, "clean"), folder / ROWS
    if recipe.runner == "beam":
        report = beam.clean(files, str(output), options, recipe.skip_bad, list(recipe.beam_options))
    else:
        report = clean(files, output, options, skip_bad=recipe.skip_bad)
    kept = {key: value for key, value in report.items() if key not in ("inputs", "output", "dry_run")}
    return {**kept, "outputs": [ROWS]}


def _cluster(recipe: ConfigDict, files: list[str], folder: Path) -> dict[str, Any]:
    from tpu_tune.data.cluster import cluster

    if len(files) != 1:
        raise UserError(f"cluster reads one file and there are {len(files)}; have ingest or clean before it in 'steps'")
    options = options_of(
        recipe,
        "cluster",
        skip_bad=recipe.skip_bad,
        map=str(folder / "map.html"),
        outliers=str(folder / "outliers.jsonl"),
    )
    report = cluster(files[0], str(folder / ROWS), options)
    left_out = ("input", "output", "options")
    kept = {key: value for key, value in report.items() if key not in left_out}
    return {"rows_in": kept.pop("rows"), "rows_out": kept.pop("kept"), **kept, "outputs": [ROWS]}


def _split(recipe: ConfigDict, files: list[str], folder: Path) -> dict[str, Any]:
    from tpu_tune.data.split import TRAIN, VALIDATION, SplitOptions, parse_ratio, split_file

    if len(files) != 1:
        raise UserError(f"split reads one file and there are {len(files)}; have ingest or clean before it in 'steps'")
    step = options_of(recipe, "split")
    if step.ratio and step.count is not None:
        raise UserError("recipe keys 'split.ratio' and 'split.count' are both set; give one of them")
    share = parse_ratio(step.ratio) if step.ratio else None
    options = SplitOptions(share, step.count, step.group_key, step.stratify_key, step.seed)
    report = split_file(files[0], folder, options, recipe.skip_bad)
    kept = {key: value for key, value in report.items() if key not in ("train", "val")}
    rows_out = kept["train_rows"] + kept["val_rows"]
    return {"rows_in": kept.pop("rows"), "rows_out": rows_out, **kept, "outputs": [TRAIN, VALIDATION]}


def _tokenize(recipe: ConfigDict, files: list[str], folder: Path) -> dict[str, Any]:
    from tpu_tune.checkpoints.tokenizers import open_tokenizer
    from tpu_tune.data import chat
    from tpu_tune.data.pretokenize import tokenize_file
    from tpu_tune.data.tokenize_options import TokenizeOptions

    step = options_of(recipe, "tokenize")
    tokenizer = open_tokenizer(step.tokenizer_path)
    options = TokenizeOptions(
        format=step.format,
        max_length=step.max_length,
        columns=dict(step.columns),
        chat_template=chat.read_template(tokenizer, step.chat_template),
        chat_template_kwargs=dict(step.chat_template_kwargs),
        train_on_source=step.train_on_source,
        num_eos=step.num_eos,
        objective="",
    )
    reports, outputs = [], []
    with _engine(recipe, folder) as engine:
        for file in files:
            name = f"{Path(file).name.partition('.')[0]}.arrow"
            report = tokenize_file(file, folder / name, tokenizer, options, recipe.num_workers, recipe.skip_bad, engine)
            for note in report["notes"]:
                logger.warning("%s: %s", file, note.replace("--format", "--config.tokenize.format"))
            reports.append({"file": name, **{key: report[key] for key in report if key != "output"}})
            outputs.append(name)
    return {
        "rows_in": sum(report["rows"] for report in reports),
        "rows_out": sum(report["examples"] for report in reports),
        "files": reports,
        "outputs": outputs,
    }


_RUN: dict[str, Callable[[ConfigDict, list[str], Path], dict[str, Any]]] = {
    "ingest": _ingest,
    "clean": _clean,
    "cluster": _cluster,
    "split": _split,
    "tokenize": _tokenize,
}


def advice(steps: Sequence[str], outputs: Sequence[str]) -> str:
    """The command that trains on what the last step has written."""
    train = outputs[0]
    words = f"tpu-tune train --config configs/qlora.py --config.model.path=DIR_OR_ID --config.data.train={train}"
    return words + (f" --config.data.eval={outputs[1]}" if len(outputs) == 2 else "")
