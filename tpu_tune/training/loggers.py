"""Where the metrics go: always `metrics.jsonl`; TensorBoard and Weights & Biases where `train.report_to` names them.

A sink is two functions. One that cannot start or breaks later is reported once and left out, and training goes on;
only `metrics.jsonl`, which the curves and a resumed run read, must work.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory, plain_number
from tpu_tune.errors import UserError


@dataclass(frozen=True)
class Sink:
    """One receiver of metrics: its name, `log(row)`, `close()` and `flush()`. A row is a flat dict that has "step"."""

    name: str
    log: Callable[[Mapping[str, Any]], None]
    close: Callable[[], None] = lambda: None
    flush: Callable[[], None] = lambda: None


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def reporters(report_to: str | Sequence[str]) -> list[str]:
    """The reporters that `train.report_to` asks for; "none" is none, "all" those whose package is installed.

    Raises:
      UserError: an unknown name; the nearest is given.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in names:
        if name not in (*_OPENERS, "all", "none"):
            near = difflib.get_close_matches(name, [*_OPENERS, "all", "none"], 1, 0.4)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"unknown train.report_to '{name}'; {hint}choose among {', '.join(_OPENERS)}, all, none")
    if "all" in names:
        return [name for name, (package, _) in _OPENERS.items() if importlib.util.find_spec(package)]
    return [name for name in dict.fromkeys(names) if name != "none"]


def open_sinks(
    report_to: str | Sequence[str],
    run: RunDirectory,
    config: Mapping[str, Any] | None = None,
    resume_step: int = 0,
    is_main: bool = True,
    warn: Callable[[str], None] = _warn,
) -> list[Sink]:
    """Open every sink.

    Args:
      report_to: `train.report_to`.
      run: the run directory, which exists.
      config: the configuration as plain dicts, shown by Weights & Biases.
      resume_step: updates that the restored checkpoint holds; TensorBoard forgets later ones.
      is_main: False gives no sinks: only process 0 logs.
      warn: receives one line for each sink that cannot start or breaks.

    Raises:
      UserError: an unknown name in `report_to`.
    """
    names = reporters(report_to)
    if not is_main:
        return []
    metrics = MetricsFile(run)
    sinks = [Sink("metrics.jsonl", metrics.append, metrics.flush, metrics.flush)]
    for name in names:
        package, opener = _OPENERS[name]
        if not importlib.util.find_spec(package):
            warn(f"{name} needs the package {package} (pip install {package}); training goes on without it")
            continue
        try:
            sinks.append(_guarded(opener(run, config or {}, resume_step), warn))
        except Exception as error:  # whatever a reporting service throws must not end the training
            warn(f"{name} cannot start ({_one_line(error)}); training goes on without it")
    return sinks


def log(sinks: Sequence[Sink], row: Mapping[str, Any]) -> None:
    """Send one row to every sink."""
    for sink in sinks:
        sink.log(row)


def flush(sinks: Sequence[Sink]) -> None:
    """Write what a sink still holds back."""
    for sink in sinks:
        sink.flush()


def close(sinks: Sequence[Sink]) -> None:
    """Close every sink, the last opened first."""
    for sink in reversed(sinks):
        sink.close()


def tag(key: str) -> str:
    """Hugging Face's tag of a metric: eval_loss -> eval/loss, loss -> train/loss."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: plain_number(value) for key, value in row.items() if key != "step"}
    return {tag(key): value for key, value in numbers.items() if isinstance(value, (int, float))}


def _guarded(sink: Sink, warn: Callable[[str], None]) -> Sink:
    """The sink, silent after its first failure."""
    broken = []

    def attempt(function: Callable[..., None], *arguments: Any) -> None:
        if broken:
            return
        try:
            function(*arguments)
        except Exception as error:
            broken.append(error)
            warn(f"{sink.name} stopped working ({_one_line(error)}); training goes on without it")

    return Sink(sink.name, lambda row: attempt(sink.log, row), lambda: attempt(sink.close))


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _open_tensorboard(run: RunDirectory, config: Mapping[str, Any], resume_step: int) -> Sink:
    # Not torch's SummaryWriter: the library never imports torch. Nor tensorboardX's: its thread dies of a full disk
    # with a traceback, and then blocks the training once its queue has filled up.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import directory_check
    from tensorboardX.summary import scalar

    folder = run.file("tensorboard")
    directory_check(folder)
    # The file's name is the second of its start: a name of its own keeps it from replacing one of the same second.
    writer = EventsWriter(os.path.join(folder, "events"), f".{resume_step:010d}")
    if resume_step:  # TensorBoard forgets what comes from this step on
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=start))

    def write(row: Mapping[str, Any]) -> None:
        for name, value in _scalars(row).items():
            writer.write_event(Event(step=int(row["step"]), wall_time=time.time(), summary=scalar(name, value)))
        writer.flush()

    return Sink("tensorboard", write, writer.close)


def _open_wandb(run: RunDirectory, config: Mapping[str, Any], resume_step: int) -> Sink:
    import wandb

    if os.environ.get("WANDB_MODE", "online") in ("online", "run") and not wandb.login(prompt=False):
        # wandb would ask for a key and wait; a run that was started and left must not.
        raise RuntimeError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
    # A resumed run goes on in the same wandb run, whose id is kept beside the metrics. Without one wandb draws it.
    id_file = run.file("wandb_run_id")
    identity = storage.read_bytes(id_file).decode().strip() if storage.exists(id_file) else ""
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "tpu_tune"),
        id=identity or None,
        resume="allow",
        dir=None if storage.is_remote(run.path) else run.path,
        config=dict(config),
    )
    run.write_text("wandb_run_id", session.id + "\n")
    session.define_metric("train/global_step")
    session.define_metric("*", step_metric="train/global_step")

    def write(row: Mapping[str, Any]) -> None:
        session.log({**_scalars(row), "train/global_step": int(row["step"])})

    return Sink("wandb", write, session.finish)


_OPENERS: dict[str, tuple[str, Callable[[RunDirectory, Mapping[str, Any], int], Sink]]] = {  # name -> (package, opener)
    "tensorboard": ("tensorboardX", _open_tensorboard),
    "wandb": ("wandb", _open_wandb),
}
