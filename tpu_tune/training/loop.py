"""`train(config)`: the training program, to be read from top to bottom.

    settings -> mesh -> data -> model -> run directory -> jitted steps -> restore -> loop(step, log, evaluate, save) -> adapter

The data of a step and its dropout follow from (seed, step) alone and a checkpoint holds the rest, so that a run that
was killed goes on exactly as it would have.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import huggingface_write, peft
from tpu_tune.checkpoints.run import RunCheckpoints
from tpu_tune.data import Batches, Datasets, PairRows, load_data, prefetch
from tpu_tune.errors import UserError
from tpu_tune.training import arithmetic, distributed, loggers, run_directory, stopping, summary
from tpu_tune.training.evaluation import evaluate
from tpu_tune.training.interrupt import catch_signals
from tpu_tune.training.progress import Progress
from tpu_tune.training.setup import (
    PreparedModel,
    Steps,
    check_settings,
    micro_batch_rows,
    open_model,
    prepare_model,
    prepare_steps,
)
from tpu_tune.training.step import TrainState
from tpu_tune.transforms import sharding

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Run:
    """A finished or interrupted run.

    Attributes:
      output_dir: the run directory.
      config: as resolved.
      metrics: the rows of metrics.jsonl.
      step: steps taken.
      total_steps: steps of the whole run.
      result_dir: `adapter/` or `model/`, "" when interrupted.
      status: finished | already finished | interrupted | stopped early.
    """

    output_dir: str
    config: ConfigDict
    metrics: list[dict[str, Any]]
    step: int
    total_steps: int
    result_dir: str
    status: str


@dataclasses.dataclass
class _Memory:
    """What the loop remembers besides the state; saved with it, so that logs go on exactly too."""

    num_tokens: int = 0
    window: list[float] = dataclasses.field(default_factory=list)  # losses since the last logged row
    best_loss: float = math.inf
    best_step: int = 0
    evals_without_gain: int = 0
    skipped: int = 0
    rows: int = 0  # rows a step


PRINT = functools.partial(print, flush=True)  # at once, also into a file or a pipe


def train(
    config: ConfigDict,
    say: Callable[[str], None] = PRINT,
    on_eval: Callable[[list[dict]], str | None] | None = None,
) -> Run:
    """Train as the configuration says, resuming what is already in `output_dir`.

    Args:
      config: from `config.from_dict` or a config file.
      say: receives the few lines meant for the user.
      on_eval: called with all metric rows after every evaluation and at the end, e.g. to draw curves; a line that it
        returns after an evaluation is shown.

    Raises:
      UserError: anything the user can mend; nothing half-written stays behind.
    """
    # --- the run directory, the devices -------------------------------------------------------------------------
    is_main = jax.process_index() == 0
    say = say if is_main else lambda line: None
    mesh, start = distributed.together("settings", lambda: _start(config))
    batch_rows, eval_rows = micro_batch_rows(start.config, mesh)
    config, out = same_seeds(start.config), start.config.output_dir
    for note in start.notes:
        say(note)

    # --- data and model; whatever can be wrong with them is found before the run directory is made --------------
    data = distributed.together("data", lambda: open_data(config, mesh))
    begun = time.monotonic()
    model = prepare_model(config, mesh)
    jax.block_until_ready((model.trainable, model.frozen))
    distributed.together("config.json", lambda: run_directory.write_config(config) if is_main else None)
    distributed.together("run directory", lambda: run_directory.check_shared(out))
    say(
        f"model: {config.model.path} ({model.architecture.family}), loaded in {time.monotonic() - begun:.1f} s on {_devices(mesh)}"
    )
    say(trainable_line(model))
    batches = Batches(
        data.train,
        batch_rows,
        config.train.gradient_accumulation_steps,
        config.data.data_seed,
        sharding.rows_here(mesh, batch_rows),
    )
    length = run_length(config, batches)
    total = length.total_steps
    say(_data_line(data))
    say(arithmetic.words(length))

    # --- steps, and the state to go on from -----------------------------------------------------------------------
    steps = prepare_steps(config, model, total)
    rows = batch_rows * config.train.gradient_accumulation_steps
    state, memory = steps.initial_state, _Memory()
    with RunCheckpoints(
        run_directory.path(out, "checkpoints"), base_fingerprint(config, model), config.train.save_total_limit
    ) as checkpoints:
        found = checkpoints.restore(state)
        if found is not None:
            state, memory = (
                found[0],
                _Memory(**{key: found[1][key] for key in dataclasses.asdict(memory) if key in found[1]}),
            )
            checkpoints.best_step = memory.best_step or None
            say(f"resuming from step {int(state.step)} of {total}")
            if memory.rows not in (0, rows):
                say(
                    f"a step was {memory.rows} rows and is now {rows}, for the mesh has changed: order and schedule are new from here on"
                )
        first, memory.rows = int(state.step), rows
        result = run_directory.path(out, "adapter" if model.targets is not None else "model")
        stopped = 0 < config.train.early_stopping_patience <= memory.evals_without_gain
        # Before anything is written there: a process that is behind must see what the others saw.
        done = (first >= total or stopped) and huggingface_write.is_whole(result)
        read, done = distributed.from_main([first, done], "checkpoint")
        distributed.together("checkpoint", lambda: _check_same_step(first, read))
        if is_main:
            run_directory.truncate_metrics(out, first)
        if done:
            say(f"this run is done: {first} of {total} steps; its result is in {result}")
            return Run(out, config, run_directory.read_metrics(out), first, total, result, "already finished")
        if is_main:
            sizes = {"parameters": count_parameters(model), "devices": _devices(mesh), "total_steps": total}
            summary.write(out, {**summary.describe(config, model, data, batches), **sizes})
        sample = summary.sampler(config, model, data, say)
        if first == 0:
            sample(state, 0)
        sinks = loggers.open_sinks(config.train.report_to, out, configuration.to_dict(config), first, is_main)
        try:
            state, memory, status = _loop(
                config, model, data, batches, steps, checkpoints, state, memory, total, eval_rows, sinks, say, on_eval
            )
        finally:
            loggers.close(sinks)
        checkpoints.wait()
        if is_main:
            summary.write(out, summary.peak_memory())
        if status == "interrupted":
            say(f"interrupted: step {int(state.step)} of {total} is saved; the same command goes on from there")
            return Run(out, config, run_directory.read_metrics(out), int(state.step), total, "", status)

        # --- the result -----------------------------------------------------------------------------------------
        taken = int(state.step)
        if config.train.load_best_model_at_end and memory.best_step and memory.best_step != taken:
            state = checkpoints.restore(state, memory.best_step)[0]
            say(f"taking the weights of step {memory.best_step}, eval_loss {memory.best_loss:.4f}")
        _write_result(config, model, state, result)
        sample(state, taken)
        distributed.barrier("result")
    rows = run_directory.read_metrics(out)
    if on_eval and is_main:
        on_eval(rows)
    say(f"{status} after {taken} steps; the result is in {result}")
    return Run(out, config, rows, taken, total, result, status)


def _loop(
    config: ConfigDict,
    model: PreparedModel,
    data: Datasets,
    batches: Batches,
    steps: Steps,
    checkpoints: RunCheckpoints,
    state: TrainState,
    memory: _Memory,
    total: int,
    eval_rows: int,
    sinks: list[loggers.Sink],
    say: Callable[[str], None],
    on_eval: Callable[[list[dict]], str | None] | None,
) -> tuple[TrainState, _Memory, str]:
    train, per_epoch, out = config.train, batches.steps_per_epoch, config.output_dir
    first, status = int(state.step), "finished"
    is_main = jax.process_index() == 0
    eval_mine = sharding.rows_here(model.mesh, eval_rows)
    progress = Progress(total, first, train.logging_steps, show=is_main)
    clock, tokens_then = time.monotonic(), memory.num_tokens
    compile_note = time.monotonic()
    last_eval = 0

    def evaluated(step: int) -> bool:
        """Evaluate; return whether to stop early."""
        nonlocal clock, tokens_then, last_eval
        last_eval = step
        row = {
            "step": step,
            "epoch": step / per_epoch,
            **evaluate(steps, state.trainable, model.frozen, data.eval, eval_rows, eval_mine),
        }
        loggers.log(sinks, row)
        progress.write(
            f"step {step}: eval_loss {row['eval_loss']:.4f}, perplexity {row['eval_perplexity']:.2f}, accuracy {row['eval_token_accuracy']:.1%}"
        )
        better, patient = stopping.judge(row["eval_loss"], memory.best_loss, train.early_stopping_threshold)
        if better:
            memory.best_loss, memory.best_step = row["eval_loss"], step
        memory.evals_without_gain = 0 if patient else memory.evals_without_gain + 1
        loggers.flush(sinks)
        if on_eval and is_main:
            line = on_eval(run_directory.read_metrics(out))
            if line:
                progress.write(line)
        clock, tokens_then = time.monotonic(), memory.num_tokens
        return 0 < train.early_stopping_patience <= memory.evals_without_gain

    def save(step: int) -> None:
        loggers.flush(sinks)  # no checkpoint without the rows that lead to it
        if train.load_best_model_at_end:
            checkpoints.best_step = memory.best_step or None
        checkpoints.save(step, state, dataclasses.asdict(memory))

    with progress, catch_signals() as interrupting:
        for number, batch in enumerate(prefetch(batches.batch, first, total), start=first):
            state, device_metrics = steps.train(state, model.frozen, steps.put_batch(batch, 1))
            metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
            step = number + 1
            if number == first:
                say(f"first step after {time.monotonic() - compile_note:.1f} s, compiling included")
                if first == 0:
                    clock, tokens_then = time.monotonic(), int(metrics["num_tokens"])
            memory.num_tokens += int(metrics["num_tokens"])
            memory.skipped += metrics["finite"] == 0
            memory.window.append(metrics["loss"])
            if metrics["failures"] >= train.max_nonfinite_steps:
                raise UserError(
                    f"the loss or the gradient was not finite in {int(metrics['failures'])} steps in a row, up to step {step}; "
                    f"no update was made from them (last loss {metrics['loss']:.4g}). Lower train.learning_rate, or set "
                    "model.dtype=float32 to see whether it is the precision"
                )
            if step % train.logging_steps == 0 or (step == 1 and train.logging_first_step) or step == total:
                now = time.monotonic()
                rate = (memory.num_tokens - tokens_then) / max(now - clock, 1e-9)
                row = {
                    "step": step,
                    "epoch": step / per_epoch,
                    "loss": sum(memory.window) / len(memory.window),
                    "learning_rate": metrics["learning_rate"],
                    "grad_norm": metrics["grad_norm"],
                    "token_accuracy": metrics["accuracy"],
                    "num_tokens": memory.num_tokens,
                    "tokens_per_second": rate if step > first + 1 else None,
                }
                if memory.skipped:
                    row["skipped_steps"] = memory.skipped
                loggers.log(sinks, row)
                memory.window = []
                progress.update(step, row["loss"], row["tokens_per_second"])
                clock, tokens_then = now, memory.num_tokens
            else:
                progress.update(step)
            stop, interrupted = False, interrupting(step)
            if data.eval is not None and _due(train.eval_strategy, train.eval_steps, step, per_epoch):
                stop = evaluated(step)
            best = train.load_best_model_at_end and memory.best_step == step
            if interrupted or stop or best or _due(train.save_strategy, train.save_steps, step, per_epoch):
                save(step)
            if interrupted:
                return state, memory, "interrupted"
            if stop:
                progress.write(f"stopping early: eval_loss has not improved in {memory.evals_without_gain} evaluations")
                status = "stopped early"
                break
        if data.eval is not None and train.eval_strategy != "no" and last_eval != int(state.step) and first < total:
            evaluated(int(state.step))
        if train.save_strategy != "no" and first < total:
            save(int(state.step))
    return state, memory, status


def total_steps(config: ConfigDict, batches: Batches) -> int:
    """Return the steps of the whole run: max_steps, or ceil(epochs * steps per epoch) as Hugging Face counts."""
    return run_length(config, batches).total_steps


def run_length(config: ConfigDict, batches: Batches) -> arithmetic.RunLength:
    """Return the arithmetic of a run over these batches."""
    train, each = config.train, config.train.per_device_train_batch_size
    devices = batches.batch_rows // each
    return arithmetic.run_length(
        len(batches.rows), each, devices, batches.accumulation, train.num_train_epochs, train.max_steps
    )


def trainable_line(model: PreparedModel) -> str:
    """Return PEFT's line on how much is trained."""
    return trainable_words(model.num_trainable, count_parameters(model))


def trainable_words(trained: int, total: int) -> str:
    """Return PEFT's words for a count."""
    return f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"


def count_parameters(model: PreparedModel) -> int:
    """Return all parameters: the base's and the adapters', whatever they are stored as."""
    base = sum(math.prod(shape) for shape in model.architecture.leaf_shapes().values())
    return base + (model.num_trainable if model.targets is not None else 0)


def base_fingerprint(config: ConfigDict, model: PreparedModel) -> str:
    """Return a hash of the base weights and of how they are stored."""
    stored = json.dumps([model.source.fingerprint, configuration.to_dict(config.quantize), config.model.param_dtype])
    return hashlib.sha256(stored.encode()).hexdigest()


def _write_result(config: ConfigDict, model: PreparedModel, state: TrainState, directory: str) -> None:
    trainable = jax.tree.map(distributed.whole, state.trainable)
    params = model.frozen
    if jax.process_count() > 1 and model.targets is not None:
        # An adapted embedding or head is written beside its adapter.
        wanted = [f"{target.module.tied_to or target.module.path}.weight" for target in model.targets.adapted]
        ends = [
            f"{module.path}.weight"
            for module in model.architecture.modules()
            if module.kind == "embedding" or module.is_head
        ]
        params = {
            path: jax.tree.map(distributed.whole, params[path]) for path in sorted({*wanted} & {*ends} & {*params})
        }
    if jax.process_index() != 0:
        return
    if model.targets is not None:
        peft.write_adapter(
            directory, trainable, model.targets, model.architecture, config.model.path, params, model.source
        )
    else:
        huggingface_write.write_model(directory, trainable, model.source, model.architecture)


def _due(strategy: str, every: int, step: int, per_epoch: int) -> bool:
    if strategy == "no":
        return False
    return step % (every if strategy == "steps" else per_epoch) == 0


def _check_widths(data: Datasets, mesh: jax.sharding.Mesh) -> None:
    shares = mesh.shape["sequence"]
    for rows in (data.train, data.eval):
        for width in (
            () if rows is None else (rows.width, *([rows.encoder_width] if isinstance(rows, PairRows) else []))
        ):
            if width % shares:
                raise UserError(
                    f"the rows are {width} tokens wide, which does not divide over mesh.sequence={shares}; "
                    "choose one that divides 64"
                )


def _start(config: ConfigDict) -> tuple[jax.sharding.Mesh, run_directory.RunStart]:
    config = check_settings(config)
    mesh = sharding.make_mesh(config.mesh)
    micro_batch_rows(config, mesh)
    return mesh, run_directory.open_run(config, write=False)


def same_seeds(config: ConfigDict) -> ConfigDict:
    """Take process 0's seeds: one of -1 was drawn by each process for itself."""
    config.seed, config.data.data_seed = distributed.from_main([config.seed, config.data.data_seed], "seeds")
    return config


def open_data(config: ConfigDict, mesh: jax.sharding.Mesh) -> Datasets:
    source, architecture = open_model(config)
    start_token = architecture.start_token if architecture.encoder else None
    data = load_data(config, source.load_tokenizer(), architecture.vocab_size, start_token)
    _check_widths(data, mesh)
    return data


def _check_same_step(mine: int, main: int) -> None:
    if mine != main:
        raise UserError(
            f"read checkpoint {mine} where process 0 read {main}: a damaged one, or an output_dir that is not the same for all "
            "hosts; use a gs:// path or a shared disk"
        )


def _devices(mesh: jax.sharding.Mesh) -> str:
    kind = mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {kind}" + (f" ({axes})" if axes else "")


def _data_line(data: Datasets) -> str:
    held_out = f", {len(data.eval)} for evaluation" if data.eval is not None else ""
    width = str(data.train.width)
    if isinstance(data.train, PairRows):
        width = f"{data.train.encoder_width} + {width}"
    return f"data: {len(data.train)} rows of {width} tokens{held_out}"
