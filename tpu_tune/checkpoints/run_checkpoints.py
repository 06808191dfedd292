"""Checkpoints of a run, by Orbax: asynchronous, whole or absent, restorable onto another mesh.

`<run>/checkpoints/<step>/` holds the training state (trainable leaves, optimizer, counters) and a small JSON of what
the loop remembers; never a frozen leaf, only the fingerprint of the base they belong to.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError

log = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves and restores the state of one run. Use as a context manager: leaving it waits for the last save.

    Args:
      directory: the run's `checkpoints` directory.
      fingerprint: a hash of the base weights (and their quantization) that the trained leaves belong to.
      keep: number of checkpoints that stay, besides the best one; 0 keeps all.
    """

    def __init__(self, directory: str, fingerprint: str, keep: int = 0):
        self._directory = storage.absolute(directory)
        self._fingerprint, self._keep = fingerprint, keep
        self._pending: int | None = None
        self._hook = sys.unraisablehook
        self.best_step: int | None = None
        try:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
                ),
            )
        except OSError as error:
            raise UserError(f"{directory}: checkpoints cannot be kept there: {error.strerror or error}") from error
        except Exception as error:  # a bucket's client has its own
            if not storage.is_remote(directory):
                raise
            raise UserError(f"{directory}: checkpoints cannot be kept there: {_reason(error)}") from error

    def __enter__(self) -> RunCheckpoints:
        # A failure is told once, by us: Orbax logs tracebacks from its threads, and TensorStore's callbacks that find
        # Orbax's event loop closed print theirs through the hook.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_from_orbax)
        self._hook, sys.unraisablehook = sys.unraisablehook, _without_closed_loops(sys.unraisablehook)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        failed = True
        try:
            if kind is None:
                self.wait()
                failed = False
        finally:
            try:
                self._manager.close()
            except Exception as error:  # a failed save was reported when it was waited for
                log.debug("closing the checkpoint manager: %s", error)
            if not failed:  # after a failure, callbacks may still come
                for name in ("absl", "asyncio"):
                    logging.getLogger(name).removeFilter(_not_from_orbax)
                sys.unraisablehook = self._hook

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, loop_state: dict[str, Any]) -> None:
        """Start saving; the state may be donated as soon as this returns.

        Raises:
          UserError: this or the previous save failed, e.g. for a full disk; the last good step is named.
        """
        self.wait()
        if step in self.steps:
            return
        loop_state = {**loop_state, "base_fingerprint": self._fingerprint}
        self._guarded(
            step,
            lambda: self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), memory=ocp.args.JsonSave(loop_state))
            ),
        )
        self._pending = step

    def wait(self) -> None:
        """Wait for a save in progress, then delete what `keep` no longer allows.

        Raises:
          UserError: the save failed.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        self._guarded(step, self._manager.wait_until_finished)
        if self._keep > 0:
            newest = self.steps[-self._keep :]
            for old in self.steps:
                if old not in newest and old != self.best_step:
                    self._manager.delete(old)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """Return (state, loop state) of a step (default: the last that can be read), or None where there is none.

        Args:
          like: a state of the same structure; its arrays' shapes, dtypes and shardings are what comes back.
          step: the checkpoint's step.

        Raises:
          UserError: no checkpoint can be read, or it belongs to another base model.
        """
        candidates = [step] if step is not None else self.steps[::-1]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
        problem: Exception | None = None
        for candidate in candidates:
            try:
                restored = self._manager.restore(
                    candidate,
                    args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), memory=ocp.args.JsonRestore()),
                )
            except Exception as error:  # whatever is broken about it, an older one may be whole
                log.warning("checkpoint %d cannot be read (%s)", candidate, _reason(error))
                problem = error
                continue
            if restored.memory["base_fingerprint"] != self._fingerprint:
                raise UserError(
                    f"{self._directory}: the base model has changed since checkpoint {candidate} was written; "
                    "restore the model that the run began with, or choose another output_dir"
                )
            if step is None:  # those after it are damaged and would stand in the way of new ones
                for damaged in candidates[: candidates.index(candidate)]:
                    self._manager.delete(damaged)
            return restored.state, restored.memory
        if problem is not None:
            raise UserError(f"{self._directory}: no checkpoint can be read ({_reason(problem)})") from problem
        return None

    def _guarded(self, step: int, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            good = [one for one in self.steps if one != step]
            last = (
                f"the last good one is step {good[-1]}, the same command goes on from there"
                if good
                else "there is no earlier one"
            )
            raise UserError(
                f"{self._directory}: checkpoint {step} could not be written ({_reason(error)}); {last}"
            ) from error


def base_fingerprint(source: WeightSource, config: ConfigDict) -> str:
    """Return a hash of the base weights and of how a run stores them, which a checkpoint's leaves belong to."""
    quantize = configuration.to_dict(config.quantize)
    # What says no more than runs had before these keys is left out, as their checkpoints have it.
    if not quantize["calibration"]:
        del quantize["calibration"]
    if quantize["format"] != "int4" or quantize["symmetric"]:
        del quantize["symmetric"]
    stored = [source.fingerprint, quantize, config.model.param_dtype]
    return hashlib.sha256(json.dumps(stored).encode()).hexdigest()


def read_trainable(directory: str, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the trained leaves of a checkpoint, without the optimizer's, onto this machine, whatever mesh wrote them.

    Args:
      directory: the run's `checkpoints` directory.
      step: the checkpoint's step.

    Returns:
      The leaves by path (float32, stacked layers leading; of a schedule-free optimizer their average, which is what is
      used), and what the loop remembered, `base_fingerprint` among it.

    Raises:
      UserError: it cannot be read.
    """
    path = os.path.join(storage.absolute(directory), str(step))
    quiet = logging.getLogger("absl")
    quiet.addFilter(_not_from_orbax)  # it warns of metadata that belongs to the directory above
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(os.path.join(path, "state")).item_metadata.tree
            wanted, optimizer = {"trainable": dict.fromkeys(tree["trainable"], 0)}, tree.get("opt_state")
            if isinstance(optimizer, dict) and {"z", "b1"} <= optimizer.keys():
                wanted["opt_state"] = {"z": dict.fromkeys(tree["trainable"], 0), "b1": 0}
            leaves = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted),
                partial_restore=True,
            )
            restored = reader.restore(os.path.join(path, "state"), args=leaves)
            trainable, averaging = restored["trainable"], restored.get("opt_state")
            if averaging:
                trainable = average_of(trainable, averaging["z"], averaging["b1"])
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            memory = reader.restore(os.path.join(path, "memory"))
    except Exception as error:  # whatever is broken about it
        raise UserError(f"{path} cannot be read ({_reason(error)}); another checkpoint may be whole") from error
    finally:
        quiet.removeFilter(_not_from_orbax)
    return trainable, memory


def average_of(y: Mapping[str, Any], z: Mapping[str, Any], b1: Any) -> dict[str, Any]:
    """Return a schedule-free optimizer's average x by path, where y = (1 - b1) z + b1 x is what it trains."""
    return {path: ((leaf - (1 - b1) * z[path]) / b1).astype(leaf.dtype) for path, leaf in y.items()}


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _not_from_orbax(record: logging.LogRecord) -> bool:
    # asyncio tells of tasks whose exception nobody fetched; theirs names the coroutine's file.
    return "orbax" not in record.pathname and not (record.name == "asyncio" and "orbax" in record.getMessage())


def _without_closed_loops(hook: Callable[[Any], None]) -> Callable[[Any], None]:
    def report(problem: Any) -> None:
        if str(problem.exc_value) != "Event loop is closed":
            hook(problem)

    return report
