"""Stages one after the other, each kept with what it was made from, so that a second run repeats only what changed.

A recipe's folder holds one folder a stage, `1-ingest`, `2-clean` and so on. A stage works in a folder aside, which is
renamed when it is complete: after an interruption the finished stages are there whole and the broken one is not.
`stage.json` in each records the stage's parameters, its report, and a hash of all that its files depend on: its own
parameters and those of the stages before it, the input files, and this package's version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_tune.checkpoints import json_text, storage
from tpu_tune.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
      name: of the step, e.g. `clean`.
      parameters: the step's options; JSON can hold them.
      run: called with the files it starts from and an empty folder to write to; returns its report, which JSON can
        hold, with the list of the files' names that the next stage reads under `outputs`.
    """

    name: str
    parameters: Mapping[str, Any]
    run: Callable[[list[str], Path], dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """A finished stage: its folder, the whole paths of its outputs, its report, and whether it was there before."""

    name: str
    folder: Path
    outputs: list[str]
    parameters: Mapping[str, Any]
    report: dict[str, Any]
    seconds: float
    cached: bool


def run_stages(
    stages: Sequence[Stage],
    inputs: Sequence[str],
    folder: Path,
    version: str,
    then: Callable[[Done], None] | None = None,
) -> list[Done]:
    """Run stages in order, each on the outputs of the one before.

    Args:
      inputs: files or directories that the first stage reads; their names, sizes and times decide whether it is run
        again. What is no local path counts by its name.
      folder: the recipe's folder, made where it is not there.
      version: changes when stages would give something else from the same inputs.
      then: called with each finished stage.

    Raises:
      UserError: the folder cannot be written, or a stage fails; finished stages stay.
    """
    _make(folder)
    key = _hash([version, *_describe(inputs)])
    files, finished = list(inputs), []
    for number, stage in enumerate(stages, start=1):
        key = _hash([key, stage.name, json.dumps(stage.parameters, sort_keys=True, default=str)])
        stage_folder = folder / f"{number}-{stage.name}"
        done = _find_finished(stage_folder, stage, key)
        if done is None:
            logger.info("%s: %s", stage_folder.name, _count(files))
            done = _run(stage, files, stage_folder, key)
        else:
            logger.info("%s: unchanged, not run again", stage_folder.name)
        finished.append(done)
        if then is not None:
            then(done)
        files = done.outputs
    return finished


def _run(stage: Stage, files: list[str], stage_folder: Path, key: str) -> Done:
    start = time.monotonic()
    with storage.whole_directory(str(stage_folder)) as aside:
        report = dict(stage.run(files, Path(aside)))
        outputs = report.pop("outputs")
        seconds = round(time.monotonic() - start, 3)
        record = {
            "key": key,
            "name": stage.name,
            "parameters": dict(stage.parameters),
            "outputs": {name: os.path.getsize(os.path.join(aside, name)) for name in outputs},
            "seconds": seconds,
            "report": report,
        }
        Path(aside, "stage.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return Done(
        stage.name,
        stage_folder,
        [str(stage_folder / name) for name in outputs],
        stage.parameters,
        report,
        seconds,
        False,
    )


def _find_finished(stage_folder: Path, stage: Stage, key: str) -> Done | None:
    try:
        record = json_text.loads((stage_folder / "stage.json").read_bytes())
        if record["key"] != key:
            return None
        if any(os.path.getsize(stage_folder / name) != size for name, size in record["outputs"].items()):
            return None
        outputs = [str(stage_folder / name) for name in record["outputs"]]
        return Done(stage.name, stage_folder, outputs, stage.parameters, record["report"], record["seconds"], True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _describe(inputs: Sequence[str]) -> list[str]:
    described = []
    for name in inputs:
        path = Path(name).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        described.append(str(name))
        for file in files:
            if file.is_file():
                status = file.stat()
                described.append(f"{file} {status.st_size} {status.st_mtime_ns}")
    return described


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:32]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error


def _count(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{len(files)} inputs"
