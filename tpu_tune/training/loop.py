"""`train(config)`: the training program, to be read from top to bottom.

    settings, data, model -> run directory -> steps -> restore -> loop(step, log, evaluate, save) -> result

The data of a step and its dropout follow from (seed, step) alone and a checkpoint holds the rest, so that a run that
was killed goes on exactly as it would have. The device never waits for the loop: a step's metrics are read once the
next step is handed over, whose batch is on the device by then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from tpu_tune import config as configuration
from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_checkpoints import RunCheckpoints
from tpu_tune.checkpoints.run_directory import RunDirectory
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.towers import parts_left_aside
from tpu_tune.data import Datasets, PackedRows, PairRows, prefetch
from tpu_tune.errors import counted
from tpu_tune.training import (
    arithmetic,
    distributed,
    evaluation,
    head_settings,
    loggers,
    plateau,
    read_back,
    run_start,
    summary,
    too_little,
)
from tpu_tune.training.interrupt import catch_signals, time_limit
from tpu_tune.training.meter import LoopState, Meter
from tpu_tune.training.not_finite import check_ended_finite, check_finite
from tpu_tune.training.opening import Session, open_session
from tpu_tune.training.optimizers import learning_rate, set_learning_rate
from tpu_tune.training.preference_settings import unbalanced
from tpu_tune.training.prepare_steps import Steps, prepare_steps
from tpu_tune.training.progress import Progress
from tpu_tune.training.restore import check_same_step, restore
from tpu_tune.training.result import write_result
from tpu_tune.training.run_lock import RunLock, refuse_second
from tpu_tune.training.step import TrainState
from tpu_tune.transforms import Targets, experts_words

log = logging.getLogger(__name__)

PRINT = functools.partial(print, flush=True)  # at once, also into a file or a pipe
OnEval = Callable[[list[dict[str, Any]]], str | None]


@dataclasses.dataclass
class Run:
    """A finished or interrupted run.

    Attributes:
      output_dir: the run directory.
      config: the configuration as resolved.
      metrics: the rows of metrics.jsonl.
      step: steps taken.
      total_steps: steps of the whole run.
      result_dir: `adapter/` or `model/`, "" when interrupted.
      status: finished | already finished | interrupted | stopped early.
      signal: the number of the signal that interrupted it; 0 for none.
    """

    output_dir: str
    config: ConfigDict
    metrics: list[dict[str, Any]]
    step: int
    total_steps: int
    result_dir: str
    status: str
    signal: int = 0


def train(
    config: ConfigDict,
    say: Callable[[str], None] = PRINT,
    on_eval: OnEval | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Run:
    """Train as the configuration says, resuming what is already in `output_dir`.

    Args:
      config: from `config.from_dict` or a config file.
      say: receives the few lines meant for the user.
      on_eval: called with all metric rows after every evaluation and at the end, e.g. to draw curves; a line that it
        returns after an evaluation is shown.
      facts: what else `summary.json` is to hold from the start, such as the speed that a plan expects.

    Raises:
      UserError: anything the user can mend; what is wrong with settings, data or model is found before anything is
        written. Also where the last loss, the weights or every step was not finite: such a run has no result.
    """
    is_main = jax.process_index() == 0
    say = say if is_main else lambda line: None
    on_eval = on_eval if is_main else None

    # --- settings, data, model: whatever can be wrong with them is found before the run directory is made -------
    session = open_session(config, _find_run, say)
    run = RunDirectory(session.config.output_dir)

    def on_main(what: str, act: Callable[[], Any]) -> Any:
        return distributed.together(what, lambda: act() if is_main else None)

    with run_start.begin(run, session.config, say, on_main) as lock:
        distributed.together("run directory", lambda: run_start.check_shared(run))
        return _train(session, run, lock, say, on_eval, facts or {})


def _train(
    session: Session,
    run: RunDirectory,
    lock: RunLock | None,
    say: Callable[[str], None],
    on_eval: OnEval | None,
    facts: Mapping[str, Any],
) -> Run:
    """Train in a run directory that is this start's."""
    is_main = jax.process_index() == 0
    config, model, total = session.config, session.model, session.length.total_steps
    result = run.result(config.method)
    _introduce(session, say)

    # --- steps --------------------------------------------------------------------------------------------------
    steps = prepare_steps(config, model, total)
    with RunCheckpoints(run.checkpoints, model.fingerprint(config), config.train.save_total_limit) as checkpoints:
        # --- restore: the state to go on from -------------------------------------------------------------------
        state, loop_state = restore(checkpoints, steps, session, say)
        first = int(state.step)
        # Asked before anything is written there: a process that is behind must see what the others saw.
        stopped_early = loop_state.out_of_patience(config.train.early_stopping_patience)
        ended = (first >= total or stopped_early) and storage.is_complete(result)
        main_step, is_done = distributed.from_main([first, ended], "checkpoint")
        distributed.together("checkpoint", lambda: check_same_step(first, main_step))
        if is_main:
            run.truncate_metrics(first)
        if is_done:
            say(f"this run is done: {first} of {counted(total, 'step')}; its result is in {result}")
            read_back.check_before(run, result)
            return Run(run.path, config, run.metrics(), first, total, result, "already finished")
        if is_main:
            run.update_summary({**summary.describe(session), **facts})
        sample = summary.sampler(config, model, session.data, say)
        if first == 0:
            sample(state, 0)

        # --- loop -----------------------------------------------------------------------------------------------
        status = "stopped early"
        if not stopped_early:  # else it was killed after it had stopped, before its result was complete
            sinks = loggers.open_sinks(config.train.report_to, run, configuration.to_dict(config), first, is_main)
            if lock is not None:  # asked before a row or a checkpoint is written
                sinks.insert(0, loggers.Sink("lock", lambda row: lock.check(), flush=lock.check))
            try:
                loop = TrainingLoop(session, steps, checkpoints, loop_state, first, sinks, say, on_eval)
                state, status = loop.run(state)
            finally:
                if lock is None or not lock.is_lost:  # closing writes
                    loggers.close(sinks)
            checkpoints.wait()
        taken = int(state.step)
        if is_main:
            run.update_summary(summary.peak_memory())
        if status == "interrupted":
            say(f"interrupted: step {taken} of {total} is saved; the same command goes on from there")
            return Run(run.path, config, run.metrics(), taken, total, "", status, loop.signal)

        # --- result ---------------------------------------------------------------------------------------------
        best = loop_state.best_step
        if config.train.load_best_model_at_end and best and best != taken:
            state = checkpoints.restore(state, best)[0]
            say(f"taking the weights of step {best}, eval_loss {loop_state.best_loss:.4f}")
        check_ended_finite(loop_state, taken, total)
        state = steps.averaged(state)
        write_result(config, model, state, result)
        if is_main:
            run.update_summary({"result_step": taken})
        sample(state, taken)
        distributed.barrier("result")
        found = read_back.read_back(config, model, state, result)
        if is_main:
            run.update_summary(found.summary())
    rows = run.metrics()
    if on_eval:
        on_eval(rows)
    read_back.check(found.failed, found.words, result)
    say(f"{result} read back: {found.words}")
    say(f"{status} after {counted(taken, 'step')}; the result is in {result}")
    return Run(run.path, config, rows, taken, total, result, status)


class TrainingLoop:
    """The loop, and what it does between steps: log, evaluate, save.

    Args:
      session: the open run.
      steps: its jitted functions.
      checkpoints: where the state is saved.
      loop_state: the counts to go on from; saved with the state.
      first: steps taken before this start.
      sinks: receivers of metric rows.
      say: receives lines for the user.
      on_eval: called with all metric rows after every evaluation; a line that it returns is shown.
    """

    def __init__(
        self,
        session: Session,
        steps: Steps,
        checkpoints: RunCheckpoints,
        loop_state: LoopState,
        first: int,
        sinks: list[loggers.Sink],
        say: Callable[[str], None],
        on_eval: OnEval | None,
    ):
        self.session, self.steps, self.checkpoints, self.loop_state = session, steps, checkpoints, loop_state
        self.sinks, self.say, self.on_eval = sinks, say, on_eval
        self.train = session.config.train
        self.first, self.total = first, session.length.total_steps
        self.every = {
            name: arithmetic.interval(self.train[f"{name}_steps"], self.total) for name in ("logging", "eval", "save")
        }
        self.steps_per_epoch = session.batches.steps_per_epoch
        self.meter = Meter(loop_state, first, self.steps_per_epoch)
        self.signal = 0  # what has interrupted it
        self.unread: tuple[int, Mapping[str, jax.Array]] | None = None  # the last step, and its metrics
        self.started = 0.0  # seconds
        self.progress = Progress(self.total, first, self.every["logging"], show=jax.process_index() == 0)

    def run(self, state: TrainState) -> tuple[TrainState, str]:
        """Train from `state` to the end; return the last state and how the run ended.

        Raises:
          UserError: too many steps in a row were not finite, or something cannot be written.
        """
        steps, train, frozen = self.steps, self.train, self.session.model.frozen
        first, total, evaluates = self.first, self.total, self.session.data.eval is not None
        status, step, last_eval = "finished", first, 0
        make, self.started = self.session.batches.batch, time.monotonic()
        batches = prefetch(lambda number: steps.put_batch(make(number), leading=1), first, total)
        is_over = time_limit(train.max_hours, self.session.began)
        with self.progress, catch_signals(is_over) as interrupted_at, self.row_before_error():
            for step, batch in enumerate(batches, start=first + 1):
                state, metrics = steps.train(state, frozen, batch)
                self.settle()
                self.unread = step, metrics
                stop, self.signal = False, interrupted_at(step)
                if evaluates and self.is_due(train.eval_strategy, self.every["eval"], step):
                    last_eval = step
                    state = self.evaluate(state)
                    stop = self.loop_state.out_of_patience(train.early_stopping_patience)
                is_best = train.load_best_model_at_end and self.loop_state.best_step == step
                if self.signal or stop or is_best or self.is_due(train.save_strategy, self.every["save"], step):
                    self.save(state)
                if self.signal:
                    return state, "interrupted"
                if stop:
                    count = self.loop_state.evals_without_gain
                    self.progress.write(f"stopping early: eval_loss has not improved in {count} evaluations")
                    status = "stopped early"
                    break
            self.settle()
            if evaluates and train.eval_strategy != "no" and first < total and last_eval != step:
                state = self.evaluate(state)
            if train.save_strategy != "no" and first < total:
                self.save(state)
        return state, status

    def settle(self) -> None:
        """Read the step whose metrics are still on the device, if there is one: count it, judge it, log it.

        The loop does so once the device has the next step to work on, and at once where the step is evaluated or saved,
        whose state the next one would overwrite.

        Raises:
          UserError: too many steps in a row were not finite.
        """
        if self.unread is None:
            return
        (step, metrics), self.unread = self.unread, None
        metrics = self.meter.add(step, metrics)
        if step == self.first + 1:
            self.say(f"first step after {time.monotonic() - self.started:.1f} s, compiling included")
        check_finite(metrics, step, self.train.max_nonfinite_steps)
        self.log(step)

    @contextlib.contextmanager
    def row_before_error(self) -> Iterator[None]:
        """Give the last step that was made its row before an error in what comes after it ends the loop."""
        try:
            yield
        except Exception:
            self.settle()
            raise

    def is_due(self, strategy: str, every: int, step: int) -> bool:
        """Whether something with a strategy of no | steps | epoch is to be done after a step."""
        return strategy != "no" and step % (every if strategy == "steps" else self.steps_per_epoch) == 0

    def log(self, step: int) -> None:
        """Show the step, and log a row where one is due."""
        train = self.train
        if step % self.every["logging"] and step != self.total and not (step == 1 and train.logging_first_step):
            return self.progress.update(step)
        row = self.meter.row(step)
        loggers.log(self.sinks, row)
        self.progress.update(step, row["loss"], row["tokens_per_second"])

    def evaluate(self, state: TrainState) -> TrainState:
        """Evaluate on the held-out rows, log and judge the result; under reduce_lr_on_plateau it may lower the rate."""
        self.settle()
        step = int(state.step)
        metrics = evaluation.evaluate(self.steps, self.steps.averaged(state).trainable, self.session)
        loggers.log(self.sinks, {"step": step, "epoch": self.meter.epoch(step), **metrics})
        self.progress.write(f"step {step}: {evaluation.describe(metrics)}")
        self.loop_state.judge(step, metrics["eval_loss"], self.train.early_stopping_threshold)
        loggers.flush(self.sinks)
        if self.on_eval:
            line = self.on_eval(RunDirectory(self.session.config.output_dir).metrics())
            if line:
                self.progress.write(line)
        state = self.lower_rate(state, metrics["eval_loss"])
        self.meter.restart_clock()
        return state

    def lower_rate(self, state: TrainState, eval_loss: float) -> TrainState:
        """Return the state with the learning rate that reduce_lr_on_plateau asks for after an evaluation."""
        if self.train.lr_scheduler_type != plateau.NAME:
            return state
        rule = plateau.Plateau.from_settings(self.train.lr_scheduler_kwargs)
        rate = learning_rate(state.opt_state)
        self.loop_state.plateau, new = rule.step(self.loop_state.plateau, eval_loss, rate)
        if new == rate:
            return state
        self.progress.write(
            f"eval_loss has not improved in {rule.patience + 1} evaluations: learning rate {rate:.3g} -> {new:.3g}"
        )
        return dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, new))

    def save(self, state: TrainState) -> None:
        """Save a checkpoint, and before it the metric rows that lead to it."""
        self.settle()
        loggers.flush(self.sinks)
        if self.train.load_best_model_at_end:
            self.checkpoints.best_step = self.loop_state.best_step or None
        self.checkpoints.save(int(state.step), state, dataclasses.asdict(self.loop_state))


def _find_run(config: ConfigDict) -> tuple[ConfigDict, list[str]]:
    """Compare a configuration with the run in its `output_dir`; return it with the run's seeds, and lines to say."""
    if jax.process_index() == 0:
        refuse_second(RunDirectory(config.output_dir))
    start = run_start.open_run(config, write=False)
    return start.config, start.notes


def _introduce(session: Session, say: Callable[[str], None]) -> None:
    """Say what is trained on what, and how long."""
    model, data = session.model, session.data
    family, devices = model.architecture.family, summary.devices(model.mesh)
    say(f"model: {session.config.model.path} ({family}), loaded in {session.load_seconds:.1f} s on {devices}")
    if aside := parts_left_aside(model.source, model.architecture):
        say(f"only its text model is loaded; left aside, and unchanged: {', '.join(aside)}")
    if model.architecture.num_labels:
        say(head_settings.in_words(session.config, model.source))
    say(arithmetic.trainable_words(model.num_trainable, model.num_parameters))
    if isinstance(model.method, Targets) and (line := experts_words(model.architecture.modules(), model.method)):
        say(line)
    say(_data_line(data))
    say(arithmetic.words(session.length, len(data.train.documents) > len(data.train)))
    for line in _warnings(session):
        say(f"warning: {line}")


def _warnings(session: Session) -> list[str]:
    """Return what of a run's length and of its added tokens is rarely meant so."""
    config, model, data = session.config, session.model, session.data
    lines = too_little.of_length(config, session.length, data.eval is not None, len(data.train.documents))
    if config.objective.name == "kto":
        lines += unbalanced(config, data.train.data.roles[data.train.documents])
    if config.model.add_special_tokens:
        known = open_source(config.model.path).load_tokenizer().get_vocab()
        lines += too_little.of_tokens(config, model.architecture, model.method, known)
    return lines


def _data_line(data: Datasets) -> str:
    width = str(data.train.width)
    if isinstance(data.train, PairRows):
        width = f"{data.train.encoder_width} + {width}"
    held_out = f", {_rows(data.eval)} for evaluation" if data.eval is not None else ""
    return f"data: {_rows(data.train)} of {width} tokens{held_out}"


def _rows(rows: PackedRows | PairRows) -> str:
    examples = len(rows.documents)
    s = "" if len(rows) == 1 else "s"
    return f"{examples} examples in {len(rows)} packed row{s}" if examples > len(rows) else f"{len(rows)} row{s}"
