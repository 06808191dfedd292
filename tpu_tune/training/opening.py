"""Opening a run: check -> mesh -> seeds -> data -> model -> batches, the same for training, lr-find and evaluation.

Whatever a user can get wrong about settings, data and model is found here, before anything is written. With several
processes a mistake of one ends all of them.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints.chat_template import read_text
from tpu_tune.checkpoints.heads import pad_token
from tpu_tune.checkpoints.methods import METHODS, check_method
from tpu_tune.checkpoints.params import check_names, open_architecture
from tpu_tune.checkpoints.source import WeightSource
from tpu_tune.checkpoints.vocabulary import check_tokens, open_configured
from tpu_tune.data import Batches, Datasets, PairRows, eval_batches, load_data, mixture
from tpu_tune.data.training_sets import mismatch_group
from tpu_tune.errors import UserError
from tpu_tune.models import Architecture, check_length
from tpu_tune.training import arithmetic, distributed, schedule_free
from tpu_tune.training.head_settings import resolve_head
from tpu_tune.training.loggers import reporters
from tpu_tune.training.objectives import check_objective
from tpu_tune.training.optimizers import is_schedule_free
from tpu_tune.training.prepare_model import PreparedModel, prepare_model, storage_dtype
from tpu_tune.training.reference import add_reference
from tpu_tune.training.schedules import configured_schedule
from tpu_tune.transforms import QuantizeConfig, quantized_paths, sharding


@dataclasses.dataclass(frozen=True)
class Session:
    """A configuration with its data and model, open on these devices.

    Attributes:
      config: the configuration, checked, its seeds drawn.
      data: the training rows and the held-out ones.
      model: the model on its mesh.
      batches: the training batches by step.
      eval_batch_rows: rows of an evaluation batch, over all devices.
      load_seconds: how long loading the model took.
      began: when opening began, seconds of `time.monotonic`.
    """

    config: ConfigDict
    data: Datasets
    model: PreparedModel
    batches: Batches
    eval_batch_rows: int
    load_seconds: float
    began: float

    @property
    def length(self) -> arithmetic.RunLength:
        """How many steps and epochs the run has."""
        train, batches = self.config.train, self.batches
        rows = train.per_device_train_batch_size
        devices = batches.batch_rows // rows
        length = arithmetic.run_length(
            len(batches.rows), rows, devices, batches.accumulation, train.num_train_epochs, train.max_steps
        )
        if train.max_steps > 0:
            return length
        return dataclasses.replace(length, total_steps=batches.steps(train.num_train_epochs))

    def eval_batches(self, name: str = "") -> Iterator[dict[str, np.ndarray]]:
        """Yield the held-out rows, or those of one source, batch by batch; another process's rows are empty."""
        local_rows = sharding.rows_here(self.model.mesh, self.eval_batch_rows)
        rows = self.data.eval_part(name) if name else self.data.eval
        return eval_batches(rows, self.eval_batch_rows, local_rows)


def open_session(
    config: Mapping[str, Any] | ConfigDict,
    resolve_run: Callable[[ConfigDict], tuple[ConfigDict, list[str]]],
    say: Callable[[str], None] = lambda line: None,
    evaluate_only: bool = False,
) -> Session:
    """Check a configuration and open its data and its model.

    Args:
      config: the configuration, possibly partial.
      resolve_run: gives a checked configuration its seeds, and whatever else it takes from an earlier run; returns it
        with lines for the user.
      say: receives these lines.
      evaluate_only: only held-out rows are needed; `data.train` may be empty where `data.eval` is given.

    Raises:
      UserError: anything the user can mend about settings, data and model.
    """

    began = time.monotonic()

    def settings() -> tuple[ConfigDict, ConfigDict, Mesh, list[str]]:
        new = configuration.from_dict(config)
        if evaluate_only:
            new.data.train = new.data.train or new.data.eval
        new = resolve_head(check_settings(new))
        before = configuration.from_dict(configuration.to_dict(new))
        new, notes = resolve_run(new)
        mesh = sharding.make_mesh(new.mesh)
        micro_batch_rows(new, mesh)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            _check_batch(new, name, mesh.shape["data"] * mesh.shape["fsdp"])
        return new, before, mesh, notes

    config, before, mesh, notes = distributed.together("settings", settings)
    # A seed of -1 was drawn by each process for itself; process 0's counts.
    config.seed, config.data.data_seed = distributed.from_main([config.seed, config.data.data_seed], "seeds")
    for note in notes:
        say(note)
    batch_rows, eval_batch_rows = micro_batch_rows(config, mesh)
    data = distributed.together("data", lambda: _open_data(config, mesh))
    if evaluate_only and data.eval is None:
        raise UserError("there are no rows to evaluate on; give data.eval, or a data.eval_ratio above 0")
    started = time.monotonic()
    model = prepare_model(config, mesh, rows=data.train, say=say)
    jax.block_until_ready((model.trainable, model.frozen))
    load_seconds = time.monotonic() - started
    before.seed, before.data.data_seed = config.seed, config.data.data_seed
    before.model.remat, before.model.token_chunk_size = config.model.remat, config.model.token_chunk_size
    same = before.model.to_dict() == config.model.to_dict()  # else what was trained is evaluated
    used = ("eval",) if evaluate_only else ("train", "eval")
    data = add_reference(data, before, eval_batch_rows, model if same else None, mesh, say, used)
    batches = Batches(
        data.train,
        batch_rows,
        config.train.gradient_accumulation_steps,
        config.data.data_seed,
        sharding.rows_here(mesh, batch_rows),
        1 if config.data.packing else max(1, mismatch_group(config)),
    )
    return Session(config, data, model, batches, eval_batch_rows, load_seconds, began)


def check_settings(config: Mapping[str, Any] | ConfigDict, with_data: bool = True) -> ConfigDict:
    """Hold a configuration against all that is known before anything is loaded or written, and return it in full.

    Args:
      config: the configuration, possibly partial.
      with_data: whether the data must be there; a plan needs none.

    Raises:
      UserError: an unknown method, optimizer, objective, schedule (or setting of it) or reporter, data that is not
        there, or settings that exclude each other.
    """
    config = configuration.from_dict(config)
    if is_schedule_free(config.train):
        schedule_free.check(config.train)
    configured_schedule(config.train, max(config.train.max_steps, 1))
    reporters(config.train.report_to)
    check_method(config.method)
    check_objective(config)
    storage_dtype(config)
    if config.model.adapter and config.method != "lora":
        raise UserError(
            "model.adapter needs method=lora; to train a merged model in full, merge it with tpu-tune export first"
        )
    if with_data:
        mixture.check(mixture.sources_of(config.data.train), config.data.mix_strategy)
        mixture.resolve_all(config.data.train)
    if with_data and config.data.eval:
        mixture.resolve_all(config.data.eval, "data.eval")
    return config


def micro_batch_rows(config: ConfigDict, mesh: Mesh) -> tuple[int, int]:
    """Return the rows of a micro-batch over all devices: one for training, one for evaluation.

    Raises:
      UserError: a row's tokens do not divide over the mesh.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.max_length % mesh.shape["sequence"]:
        raise UserError(
            f"data.max_length={config.data.max_length} does not divide over mesh.sequence={mesh.shape['sequence']}; "
            "make it a multiple"
        )
    return config.train.per_device_train_batch_size * shards, config.train.per_device_eval_batch_size * shards


def _check_batch(config: ConfigDict, name: str, shards: int) -> None:
    """Raise where a batch is larger than a device can count or this machine can hold, before it is killed for it."""
    rows, length = config.train[name], config.data.max_length
    said = f"train.{name}={rows} rows of data.max_length={length} tokens"
    if rows * length >= 2**31:
        raise UserError(f"{said} are more tokens than a device counts (2^31); lower one of them")
    accumulation = config.train.gradient_accumulation_steps if "train_batch" in name else 1
    size = rows * length * shards * accumulation // jax.process_count() * 4  # of one array; a batch has several
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        times = f", times train.gradient_accumulation_steps={accumulation}" if accumulation > 1 else ""
        raise UserError(
            f"{said}{times} on {shards} devices are {size / 2**30:,.0f} GiB a batch, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory; lower one of them"
        )


def open_model(config: ConfigDict) -> tuple[WeightSource, Architecture]:
    """Open the model, and check what the configuration says about its modules against it; no weight is read.

    Raises:
      UserError: no usable model, an adapter that does not fit, names that match no module, or rows longer than the
        model has positions for.
    """
    source = open_configured(config, read_text(config.data.chat_template))
    arch = open_architecture(source)
    check_names(source, arch)
    check_length(arch, config.data.max_length)
    quantized_paths(arch.modules(), QuantizeConfig(**config.quantize))
    if config.model.adapter:
        check_tokens(source, config.model.adapter)
    METHODS[config.method](config, arch, source.added_tokens.values())
    return source, arch


def _open_data(config: ConfigDict, mesh: Mesh) -> Datasets:
    source, architecture = open_model(config)
    start_token = architecture.start_token if architecture.encoder else None
    pad = pad_token(source) if architecture.num_labels else None
    data = load_data(config, source.load_tokenizer(), architecture.vocab_size, start_token, pad)
    check_widths(data, mesh)
    return data


def check_widths(data: Datasets, mesh: Mesh) -> None:
    """Check that rows can be cut over the mesh's sequence axis.

    Raises:
      UserError: a row's width does not divide.
    """
    devices = mesh.shape["sequence"]
    for rows in (data.train, data.eval):
        if rows is None:
            continue
        for width in (rows.width, rows.encoder_width) if isinstance(rows, PairRows) else (rows.width,):
            if width % devices:
                raise UserError(
                    f"the rows are {width} tokens wide, which does not divide over mesh.sequence={devices}; "
                    "choose one that divides 64"
                )
