"""Whether a start begins a run or continues the one that is in `output_dir`.

`open_run` is the first thing a start does: it compares the new configuration with the recorded one and refuses what
would silently change a run half-way. The files themselves are `checkpoints.run_directory`'s.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune import ctrl_c
from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.errors import UserError
from tpu_tune.training import run_lock

# What may differ between two starts of one run: how long it goes on, what it reports, and the machine it runs on.
MAY_CHANGE = (
    "output_dir", "mesh.", "data.num_workers", "data.cache_dir", "train.max_steps", "train.num_train_epochs",
    "train.logging_", "train.save_", "train.eval_", "train.report_to", "train.per_device_eval_batch_size",
    "model.remat", "model.token_chunk_size", "train.optim_offload", "train.loss_chunk_size",
    "train.early_stopping_", "train.load_best_model_at_end", "train.max_nonfinite_steps",
    "train.sample_prompts", "train.max_hours",
)  # fmt: skip
_SCHEDULE = ("train.max_steps", "train.num_train_epochs")
_SEEDS = ("seed", "data.data_seed")
_LEFT_OPEN = {"model.remat": "auto", "model.token_chunk_size": 0}  # the run's first start has chosen for its device


@dataclass(frozen=True)
class RunStart:
    """What `open_run` found.

    Attributes:
      config: the configuration with seeds of -1 replaced by the recorded or freshly drawn ones.
      resuming: whether the directory already held this run.
      notes: lines to tell the user, e.g. that the schedule changed.
    """

    config: ConfigDict
    resuming: bool
    notes: list[str] = field(default_factory=list)


def open_run(config: ConfigDict, write: bool = True) -> RunStart:
    """Check the run directory against `config`; make it if needed, and write `config.json`.

    Args:
      config: the whole configuration; `config.output_dir` is the run directory. It is not modified.
      write: False only looks, so that a start that fails later leaves nothing behind; `RunDirectory.write_config`
        follows. With
        several processes give explicit seeds: a seed of -1 is drawn by each process for itself.

    Returns:
      The configuration to use, whether this start resumes, and notes for the user.

    Raises:
      UserError: the directory cannot be made, its config.json is unreadable, or it belongs to another run.
    """
    run = RunDirectory(config.output_dir)
    recorded = _recorded(run)
    if recorded is not None:
        recorded = {**dict(configuration.flatten(configuration.default())), **recorded}
    elif storage.is_dir(run.checkpoints):
        raise UserError(
            f"{run.path} holds checkpoints but no config.json, so they cannot be continued; choose another output_dir"
        )
    resolved, notes = _resolve_seeds(config, recorded)
    if recorded is not None:
        notes += _compare(run.path, recorded, dict(configuration.flatten(resolved)))
    if write:
        run.write_config(resolved)
    else:
        run.check_writable()
    return RunStart(resolved, recorded is not None, notes)


@contextlib.contextmanager
def begin(
    run: RunDirectory, config: ConfigDict, say: Callable[[str], None], together: Callable[[str, Callable], Any]
) -> Iterator[run_lock.RunLock | None]:
    """Hold the run directory for this start and write `config.json`; the lock is process 0's, None in others.

    A start that fails before its first row of metrics and its first checkpoint takes back what it wrote, so that the
    directory can be used with another configuration. What a kill leaves is a run that goes on from its beginning.

    Args:
      run: the run directory.
      config: the configuration as resolved.
      say: receives lines about a lock that was left.
      together: `distributed.together`: (what, function of process 0) -> its result, None elsewhere.

    Raises:
      UserError: another process trains there, or the directory cannot be written.
    """
    with contextlib.ExitStack() as stack:
        lock = together("run.lock", lambda: stack.enter_context(run_lock.hold(run, say)))
        is_new = lock is not None and not storage.exists(run.file("config.json"))

        def undo() -> None:
            if is_new and not lock.is_lost:
                run.undo_start()

        def leave() -> None:
            undo()
            stack.close()  # which gives the lock back

        with ctrl_c.before_leaving(leave):
            try:
                together("config.json", lambda: run.write_config(config))
                yield lock
            except BaseException:
                undo()
                raise


def with_seeds(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Return the configuration with seeds of -1 replaced as `open_run` does, and a line on each; nothing is written."""
    return _resolve_seeds(config, _recorded(RunDirectory(config.output_dir)))


def _resolve_seeds(config: ConfigDict, recorded: Mapping[str, Any] | None) -> tuple[ConfigDict, list[str]]:
    resolved, notes = configuration.from_dict(configuration.to_dict(config)), []
    for key in _SEEDS:
        if configuration.config_get(config, key) == -1:
            value = (recorded or {}).get(key)
            value = secrets.randbelow(2**31) if value is None else value
            configuration.assign(resolved, key, value)
            notes.append(f"{key} = {value}")
    for key, auto in _LEFT_OPEN.items():
        value = (recorded or {}).get(key, auto)
        if configuration.config_get(config, key) == auto != value:
            configuration.assign(resolved, key, value)
            notes.append(f"{key} = {value}, as this run has it")
    return resolved, notes


def check_shared(run: RunDirectory) -> None:
    """Hold against several hosts that each has a disk of its own: all have to see what process 0 has written.

    Raises:
      UserError: there is no config.json.
    """
    if _recorded(run) is None:
        raise UserError(
            f"output_dir {run.path}: process 0's config.json is not there; hosts need one place for checkpoints, "
            "a gs:// path or a shared disk"
        )


def _recorded(run: RunDirectory) -> dict[str, Any] | None:
    """The recorded configuration, flat; None where there is none."""
    try:
        recorded = run.recorded()
    except UserError as error:
        raise UserError(f"{error}; choose another output_dir, or remove it") from error
    return None if recorded is None else dict(configuration.flatten(recorded))


def _compare(directory: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Raise at a difference that may not be; return what is to be said about those that may."""
    notes = []
    different = {key: (old[key], value) for key, value in new.items() if _plain(old[key]) != _plain(value)}
    fixed = [key for key in different if not key.startswith(MAY_CHANGE)]
    if fixed:
        each = "; ".join(f"{key} was {_show(different[key][0])} and is now {_show(different[key][1])}" for key in fixed)
        raise UserError(
            f"output_dir {directory} holds a run with another configuration: {each}. "
            "Choose another output_dir, or set the old value to go on with that run"
        )
    for key in _SCHEDULE:
        if key in different:
            before, now = different[key]
            notes.append(
                f"{key} was {before} and is now {now}: from here on the learning rate follows the schedule of the new "
                "length, while the updates already made followed the old one"
            )
    return notes


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _show(value: Any) -> str:
    return json.dumps(value)
