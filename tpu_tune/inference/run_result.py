"""What a run has trained: the result that it ended with, or a checkpoint's weights in the same form.

A run that was stopped, or is still training, has no `adapter/` or `model/` yet; whoever reads one gets it here from a
checkpoint, written to a temporary directory as training would have written it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tpu_tune.checkpoints import huggingface_write, peft, storage
from tpu_tune.checkpoints.calibrated import FOLDER, with_calibrated
from tpu_tune.checkpoints.chat_template import read_text, template_of
from tpu_tune.checkpoints.methods import METHODS
from tpu_tune.checkpoints.params import load_params, open_architecture
from tpu_tune.checkpoints.prompts import taught_as, with_record
from tpu_tune.checkpoints.run_checkpoints import base_fingerprint, read_trainable
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.starting import as_others_read, as_trained, over_start
from tpu_tune.checkpoints.vocabulary import open_configured
from tpu_tune.checkpoints.weight_source import WeightSource
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture
from tpu_tune.transforms import LoraConfig, Method, QuantizeConfig, Targets

log = logging.getLogger(__name__)

Step = int | str | None  # of a checkpoint, "last", "best", or None for what `find_step` takes by itself
_written: dict[tuple[str, int, bytes], tempfile.TemporaryDirectory] = {}


def find_step(run: RunDirectory, config: ConfigDict, step: Step = None) -> int | None:
    """Return the checkpoint whose weights are meant, or None for the result that the run has ended with.

    Args:
      run: the run directory.
      config: its configuration.
      step: a checkpoint's step; `last`, or `best` for the one with the lowest eval_loss. By default the result of a run
        that has ended; of another the best under `train.load_best_model_at_end` (as its result would be), else the
        last, which is said aloud.

    Raises:
      UserError: there is no such checkpoint (the others are listed), or nothing at all yet.
    """
    if step is None and run.has_result(config.method):
        return None
    saved = run.saved_steps()
    if not saved:
        result = os.path.basename(run.result(config.method))
        if run.has_result(config.method):
            raise UserError(f"{run.path} has no checkpoint, only its result ({result}/): leave the step out")
        raise UserError(
            f"{run.path} has no {result}/ yet, and no checkpoint; let the training go on (the same train command does)"
        )
    if step is None:
        best = _best(run, saved) if config.train.load_best_model_at_end else None
        found, total = saved[-1] if best is None else best, run.summary().get("total_steps")
        log.warning(
            "%s has not ended: these are the weights of its %s checkpoint, step %d%s (it has %s)",
            run.path,
            "last" if best is None else "best",
            found,
            f" of {total}" if total else "",
            _listed(saved),
        )
        return found
    if step == "last":
        return saved[-1]
    if step == "best":
        best = _best(run, saved)
        if best is None:
            raise UserError(f"{run.path} has no evaluation at a step that it has a checkpoint of ({_listed(saved)})")
        return best
    if step not in saved:
        raise UserError(f"{run.path} has no checkpoint of step {step}; it has {_listed(saved)}")
    return int(step)


def result_of(run: RunDirectory, config: ConfigDict, step: Step = None) -> str:
    """Return a directory with what a run has trained, as a PEFT adapter (lora) or a Hugging Face model.

    It is the run's own where that has ended and no step is named. Else it is temporary and stays until the process
    ends.

    Args:
      run, config, step: as for `find_step`.

    Raises:
      UserError: as `find_step` and `write_result`.
    """
    found = find_step(run, config, step)
    if found is None:
        return run.result(config.method)
    stamp = b""
    with contextlib.suppress(OSError):  # a run of the same name may be another one by now
        stamp = storage.read_bytes(run.file("checkpoints", str(found), "_CHECKPOINT_METADATA"))
    key = (storage.absolute(run.path), found, stamp)
    if key not in _written:
        folder = tempfile.TemporaryDirectory(prefix="tpu-tune-")
        write_result(run, config, found, os.path.join(folder.name, "result"))
        _written[key] = folder
    return os.path.join(_written[key].name, "result")


def write_result(run: RunDirectory, config: ConfigDict, step: Step, directory: str) -> None:
    """Write what a run has trained to a directory, local or in a bucket.

    Args:
      run, config, step: as for `find_step`.
      directory: what to write.

    Raises:
      UserError: as `find_step`; a checkpoint cannot be read, belongs to other base weights, or is not finite; the base
        is not where it was, or the directory cannot be written.
    """
    found = find_step(run, config, step)
    if found is None:
        with storage.whole_directory(directory) as aside:
            shutil.copytree(storage.local_copy(run.result(config.method)), aside, dirs_exist_ok=True)
        return
    trained, memory = read_trainable(run.checkpoints, found)
    name = run.file("checkpoints", str(found))
    if not all(np.isfinite(leaf).all() for leaf in trained.values()):
        raise UserError(f"{name}: its weights are not finite; take an earlier one ({_listed(run.saved_steps())})")
    source = open_base(run, config)
    arch = open_architecture(source)
    method, _ = METHODS[config.method](config, arch, source.added_tokens.values())
    frozen: Mapping[str, Any] = {}
    if trained.keys() != arch.leaves().keys():  # else every weight was trained, and the base's do not matter
        if memory.get("base_fingerprint") != base_fingerprint(source, config):
            raise UserError(
                f"{name}: the base model {source.path} has changed since it was written; restore the model that the "
                "run began with"
            )
        frozen = _frozen(method, trained, source, arch, config)
    source = says_how_taught(source, run)
    # A leaf that is a NumPy array would be taken for one that wraps another: both have a `base`.
    trained = jax.tree.map(jnp.asarray, trained)
    write_trained(directory, config, method, trained, frozen, source, arch, run.path)


def write_trained(
    directory: str,
    config: ConfigDict,
    method: Method,
    trainable: Mapping[str, Any],
    frozen: Mapping[str, Any],
    source: WeightSource,
    arch: Architecture,
    run: str = "",
) -> None:
    """Write trained leaves as a PEFT adapter where the method is LoRA, else as a whole Hugging Face model.

    Args:
      directory: what to write.
      config: the run's configuration.
      method: what the model is made of.
      trainable: the trained leaves.
      frozen: the others; beside an adapter only an adapted embedding or head is needed.
      source: the opened base model.
      arch: its facts.
      run: the run's directory; by default `config.output_dir`.

    Raises:
      UserError: it cannot be written.
    """
    if isinstance(method, Targets):
        method, trainable = as_others_read(run or config.output_dir, config, method, trainable, arch)
        peft.write_adapter(directory, trainable, method, arch, config.model.path, frozen, source)
    else:
        huggingface_write.write_model(directory, method.combine(trainable, frozen), source, arch)


def says_how_taught(source: WeightSource, run: RunDirectory) -> WeightSource:
    """Return a run's model with a config that says how the run's rows asked; it is written so, and asked so later."""
    form = taught_as((run.summary().get("data") or {}).get("train"))
    return dataclasses.replace(source, config=with_record(source.config, form))


def open_base(run: RunDirectory, config: ConfigDict) -> WeightSource:
    """Open the model that a run was trained on, with the tokens that it added and the chat template that it used.

    The template stands beside the run's result; where that has none, it is what the configuration says.

    Raises:
      UserError: it is not where it was.
    """
    template = template_of(run.result(config.method))
    if not template:
        try:
            template = read_text(config.data.chat_template)
        except UserError as error:  # of a run from before results carried it
            log.warning("%s: %s; going on with the chat template of its base", run.path, error)
    try:
        return open_configured(config, template)
    except UserError as error:
        raise UserError(f"the model that {run.path} was trained on cannot be opened: {error}") from None


def read_own_adapter(
    run: RunDirectory, config: ConfigDict, adapter: str, arch: Architecture
) -> tuple[LoraConfig, dict[str, Any]]:
    """Read what `result_of` gives for a LoRA run as it was trained: over `trained_over`'s weights."""
    return as_trained(run.path, config, peft.read_adapter(adapter, arch), arch)


def trained_over(
    run: RunDirectory, config: ConfigDict, source: WeightSource, with_adapter: bool = True
) -> WeightSource:
    """Return the source of the base that a run's adapter was trained over, given the model that `open_base` opened.

    It differs where weights were rounded against activations, and where the adapter started from them.

    Args:
      run, config: the run.
      source: its model.
      with_adapter: the run's adapter goes over it; else what an adapter took out of the weights stays in them.

    Raises:
      UserError: what it is made of is not in the run.
    """
    if with_adapter:
        source = over_start(source, open_architecture(source), run.path, config)
    if not config.quantize.calibration:
        return source
    mark = base_fingerprint(source, config)
    return with_calibrated(source, open_architecture(source), run.file(FOLDER), mark)


def _frozen(
    method: Method, trained: Mapping[str, Any], source: WeightSource, arch: Architecture, config: ConfigDict
) -> Mapping[str, Any]:
    """Return the frozen leaves that the result is written with."""
    if isinstance(method, Targets) and not any(
        target.module.kind == "embedding" or target.module.is_head for target in method.adapted
    ):
        return {}
    params = load_params(source, arch, jnp.float32, QuantizeConfig(**config.quantize))
    return method.split(params, trained)[1]


def _best(run: RunDirectory, saved: list[int]) -> int | None:
    """Return the saved step with the lowest eval_loss; None where none of them was evaluated."""
    losses = {row["step"]: row["eval_loss"] for row in run.metrics() if row.get("eval_loss") is not None}
    kept = [step for step in saved if step in losses]
    best = min(kept, key=losses.__getitem__, default=None)
    lowest = min(losses, key=losses.__getitem__, default=None)
    if best is not None and losses[lowest] < losses[best]:
        there = (run.path, lowest, losses[lowest], best, losses[best])
        log.warning(
            "%s: eval_loss was lowest at step %d (%.4f), of which no checkpoint is left; step %d has %.4f", *there
        )
    return best


def _listed(steps: list[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:3], "...", *shown[-8:]])
