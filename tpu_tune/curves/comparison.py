"""Runs beside each other: which is better, by how much against the noise, in what they differ, and what to try next.

Runs are compared by their lowest evaluation loss (`--step best` takes its checkpoint), or by the end of the training
loss where one of them has no evaluation. The noise is how much such a loss scatters by itself: it is estimated from
how a run's losses scatter round their own curve, and is no less than what runs differ by that differ in seeds alone.
Losses that were not taken on the same rows in the same way are not compared at all.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune import config as configuration
from tpu_tune.curves.diagnosis import Diagnosis
from tpu_tune.curves.losses import tail
from tpu_tune.curves.runs import CurveRun
from tpu_tune.curves.series import series
from tpu_tune.errors import counted

CLEAR = 2.0  # times the noise: a smaller difference may be chance
_SEEDS = ("seed", "data.data_seed")
# What changes neither weights nor losses, beyond rounding.
_NO_MATTER = (
    "output_dir", "mesh.", "data.num_workers", "data.cache_dir", "train.report_to", "train.logging_", "train.save_",
    "train.sample_prompts", "train.per_device_eval_batch_size", "train.optim_offload", "train.loss_chunk_size",
    "train.eval_strategy", "train.max_nonfinite_steps", "train.max_hours",
    "model.remat", "model.token_chunk_size", "model.attention",
)  # fmt: skip
# What decides which rows are judged, and how: with a difference here two losses are of two things.
_JUDGED_BY = (
    "data.format", "data.columns", "data.chat_template", "data.response_markers",
    "data.instruction_markers", "data.add_bos_token", "data.max_length", "data.train_on_source", "data.source_max_len",
    "data.target_max_len", "objective.",
)  # fmt: skip
_SPLIT_BY = ("data.train", "data.eval_ratio", "data.data_seed")  # the same, where the rows are held out of data.train
# What a diagnosis advises -> the key, and the direction in which it is to change.
_ADVISED = (
    (r"(^|or )raise train\.learning_rate|higher learning rate", "train.learning_rate", 1),
    (r"lower train\.learning_rate", "train.learning_rate", -1),
    (r"higher lora\.rank", "lora.rank", 1),
    (r"lower lora\.rank", "lora.rank", -1),
    (r"^train longer", "steps", 1),
    (r"fewer epochs", "steps", -1),
    (r"lora\.dropout=", "lora.dropout", 1),
    (r"train\.weight_decay=", "train.weight_decay", 1),
    (r"train\.warmup_ratio=", "train.warmup_ratio", 1),
)
_NO_EVALUATIONS = (
    "give each run evaluations (data.eval, or data.eval_ratio above 0): a lower training loss may be overfit"
)
_GOES_ON = ("train.learning_rate", "lora.rank")  # keys of which a further step in the better direction is suggested


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is said of runs beside each other.

    Attributes:
      better: the name of the best run; "" where the noise covers the difference or the losses cannot be compared.
      title: that in a line.
      evidence: the observations behind it, a sentence each.
      advice: what to try.
      differences: config key -> its value in each run, None where a run has none.
      losses: the loss that each run is compared by (nats per token), None where it has none.
      noise: the standard deviation of the difference between the best two; None where there is none.
    """

    better: str
    title: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]
    differences: dict[str, list[Any]]
    losses: list[float | None]
    noise: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return what `tpu-tune curves` prints."""
        return [
            f"comparison: {self.title}",
            *[f"  - {text}" for text in self.evidence],
            *[f"  try: {text}" for text in self.advice],
        ]


@dataclasses.dataclass(frozen=True)
class _Level:
    """The loss that a run is compared by, its noise, and the step that it was had at."""

    loss: float
    noise: float
    step: int


def compare(runs: Sequence[CurveRun], diagnoses: Sequence[Diagnosis]) -> Comparison:
    """Compare two runs or more.

    Args:
      runs: from `read_runs`.
      diagnoses: the runs' diagnoses.
    """
    kind, levels = _levels(runs, diagnoses)
    differences = _differences(runs)
    shown = {key: values for key, values in differences.items() if not key.startswith(_NO_MATTER)}
    evidence = [_levels_line(runs, kind, levels), *_common_step(runs, kind)]
    evidence += _difference_lines(runs, shown)
    losses = [None if level is None else level.loss for level in levels]
    known = sorted((level.loss, number) for number, level in enumerate(levels) if level is not None)
    unlike = _unlike(runs, kind, differences)
    if len(known) < 2 or unlike:
        why = unlike or "fewer than two of the runs have losses"
        command = f"tpu-tune eval --model {runs[0].path} --against {runs[1].path} --data FILE"
        advice = (f"judge them on the same rows: {command}",) if unlike else ()
        return Comparison("", f"cannot be compared: {why}", tuple(evidence), advice, shown, losses, None)
    first, second = known[0][1], known[1][1]
    noise = max(math.hypot(levels[first].noise, levels[second].noise), _between_seeds(runs, levels))
    apart = known[1][0] - known[0][0]
    words = f"{kind} loss {_number(known[0][0])} against {_number(known[1][0])}, {apart:.3g} ({_share(apart, known)})"
    if apart > CLEAR * noise:
        better = runs[first].name
        title = f"better: {better}; {words} lower, {apart / max(noise, 1e-12):.3g} times the noise ({noise:.2g})"
    else:
        better = ""
        title = (
            f"no difference beyond the noise between {runs[first].name} and {runs[second].name}; {words} apart, the "
            f"noise is {noise:.2g}"
        )
    advice = _advice(runs, diagnoses, (first, second), shown, bool(better))
    if kind == "train":
        advice = [_NO_EVALUATIONS, *advice]
    return Comparison(better, title, tuple(evidence), tuple(advice), shown, losses, noise)


def beside(runs: Sequence[CurveRun], diagnoses: Sequence[Diagnosis]) -> list[Diagnosis]:
    """Return the diagnoses with what the other runs say to their advice: who did it already, and what came of it."""
    kind, levels = _levels(runs, diagnoses)
    flat = [_flat(run) for run in runs]
    if _unlike(runs, kind, _differences(runs)):
        return list(diagnoses)
    told = []
    for number, diagnosis in enumerate(diagnoses):
        advice = []
        for text in diagnosis.advice:
            answers = (_answer(text, number, other, runs, flat, levels) for other in range(len(runs)))
            advice.append(text + next(filter(None, answers), ""))
        told.append(dataclasses.replace(diagnosis, advice=tuple(advice)))
    return told


def _answer(
    text: str,
    number: int,
    other: int,
    runs: Sequence[CurveRun],
    flat: Sequence[Mapping[str, Any]],
    levels: Sequence[_Level | None],
) -> str:
    """Return what run `other` says to a piece of advice for run `number`; "" where it did nothing of the kind."""
    mine, theirs = levels[number], levels[other]
    if number == other or mine is None or theirs is None:
        return ""
    for pattern, key, direction in _ADVISED:
        if not re.search(pattern, text):
            continue
        before, after = (_last_step(runs[i]) if key == "steps" else flat[i].get(key) for i in (number, other))
        if not all(isinstance(value, int | float) for value in (before, after)) or (after - before) * direction <= 0:
            continue
        what = counted(after, "step") if key == "steps" else f"{key}={_value(after)}"
        apart = theirs.loss - mine.loss
        if abs(apart) <= CLEAR * math.hypot(mine.noise, theirs.noise):
            return f" ({runs[other].name} has {what}, and its loss is the same within the noise)"
        return (
            f" ({runs[other].name} has {what}, and its loss is {abs(apart):.3g} {'higher' if apart > 0 else 'lower'})"
        )
    return ""


def _levels(runs: Sequence[CurveRun], diagnoses: Sequence[Diagnosis]) -> tuple[str, list[_Level | None]]:
    """Return eval | train, and the level of each run: of its evaluations where all have some, else of its training."""
    curves = [series(run.metrics, "eval_loss") for run in runs]
    if all(len(values) for _, values in curves):
        found: list[_Level | None] = []
        scatter = _scatter([values for _, values in curves])
        for (steps, values), diagnosis in zip(curves, diagnoses, strict=True):
            best = int(np.argmin(values))
            noise = max(diagnosis.numbers.get("eval_noise") or 0.0, scatter)
            found.append(_Level(float(values[best]), noise, int(steps[best])))
        return "eval", found
    found = []
    for run, diagnosis in zip(runs, diagnoses, strict=True):
        steps, values = series(run.metrics, "loss")
        if not len(values):
            found.append(None)
            continue
        count = tail(len(values))
        noise = 1.25 * (diagnosis.numbers.get("train_noise") or float(np.std(values[-count:]))) / math.sqrt(count)
        found.append(_Level(float(np.median(values[-count:])), noise, int(steps[-1])))
    return "train", found


def _scatter(curves: Sequence[np.ndarray]) -> float:
    """Return the standard deviation of one evaluation round its run's curve, of all runs' together; 0 for too few.

    Second differences of independent noise have sqrt(6) times its standard deviation; the median of their sizes is
    0.6745 of that. What the curve itself bends makes it larger, which errs on the side of chance.
    """
    seconds = np.concatenate([np.abs(np.diff(values[len(values) // 3 :], 2)) for values in curves])
    return float(np.median(seconds)) / 0.6745 / math.sqrt(6) if len(seconds) >= 3 else 0.0


def _levels_line(runs: Sequence[CurveRun], kind: str, levels: Sequence[_Level | None]) -> str:
    each = []
    for run, level in zip(runs, levels, strict=True):
        if level is None:
            each.append(f"{run.name} none")
        else:
            each.append(f"{run.name} {_number(level.loss)} at step {level.step:,} of {_last_step(run):,}")
    return ("lowest eval loss: " if kind == "eval" else "train loss at the end: ") + ", ".join(each)


def _common_step(runs: Sequence[CurveRun], kind: str) -> list[str]:
    """Return the losses at the step where the shortest run ends, if the runs are of different lengths."""
    curves = [series(run.metrics, "eval_loss" if kind == "eval" else "loss") for run in runs]
    if not all(len(steps) for steps, _ in curves):
        return []
    ends = [steps[-1] for steps, _ in curves]
    step = min(ends)
    if max(ends) < 1.1 * step or any(steps[0] > step for steps, _ in curves):
        return []
    at = ", ".join(
        f"{run.name} {_number(float(np.interp(step, *curve)))}" for run, curve in zip(runs, curves, strict=True)
    )
    rows = {run.summary.get("rows_per_step") for run in runs}
    unlike = "; a step is not as many rows in each" if len(rows) > 1 else ""
    return [f"at step {step:,.0f}, where the shortest ends: {at}{unlike}"]


def _difference_lines(runs: Sequence[CurveRun], shown: Mapping[str, Sequence[Any]]) -> list[str]:
    if not all(run.config for run in runs):
        return ["what they differ in is not known: a config.json is missing"]
    if not shown:
        return ["their configurations do not differ in anything that changes the result"]
    keys = [f"{key}: {' | '.join(map(_value, values))}" for key, values in list(shown.items())[:12]]
    more = f" and {len(shown) - 12} more keys" if len(shown) > 12 else ""
    return [f"they differ in {'; '.join(keys)}{more}"]


def _flat(run: CurveRun) -> dict[str, Any]:
    return dict(configuration.flatten(run.config))


def _differences(runs: Sequence[CurveRun]) -> dict[str, list[Any]]:
    """Return key -> the runs' values, of the keys that are not the same in all runs with a configuration."""
    flat = [_flat(run) for run in runs]
    if not all(flat):
        return {}
    keys = dict.fromkeys(key for one in flat for key in one)
    values = {key: [one.get(key) for one in flat] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _unlike(runs: Sequence[CurveRun], kind: str, differences: Mapping[str, Sequence[Any]]) -> str:
    """Return why the losses are of different things; "" where they are not, as far as is known."""
    sizes = {run.summary.get("vocab_size") for run in runs} - {None}
    if len(sizes) > 1:
        return "their vocabularies are of different sizes, so a token is not the same to them"
    rows = ("data.train",)
    if kind == "eval":
        rows = ("data.eval",) if any(_flat(run).get("data.eval") for run in runs) else _SPLIT_BY
    keys = [key for key in differences if key in rows or key.startswith(_JUDGED_BY)]
    if keys:
        return f"they were not judged on the same rows in the same way ({', '.join(sorted(keys))})"
    return ""


def _between_seeds(runs: Sequence[CurveRun], levels: Sequence[_Level | None]) -> float:
    """Return the largest standard deviation between two runs that differ in seeds alone; 0 where there are none."""
    found = 0.0
    for one, other in itertools.combinations(range(len(runs)), 2):
        both = [runs[one], runs[other]]
        keys = [key for key in _differences(both) if not key.startswith(_NO_MATTER)]
        if keys and all(key in _SEEDS for key in keys) and levels[one] and levels[other]:
            found = max(found, abs(levels[one].loss - levels[other].loss) / math.sqrt(2))
    return found


def _advice(
    runs: Sequence[CurveRun],
    diagnoses: Sequence[Diagnosis],
    pair: tuple[int, int],
    shown: Mapping[str, Sequence[Any]],
    is_clear: bool,
) -> list[str]:
    """Return what to try, knowing the best run and the one after it."""
    first, second = pair
    best, other = runs[first], runs[second]
    keys = {key: (values[first], values[second]) for key, values in shown.items() if values[first] != values[second]}
    advice = []
    if is_clear and diagnoses[second].reason == "still falling" and _last_step(other) <= _last_step(best):
        advice.append(f"let {other.name} go on before it is given up: its loss still falls")
    if all(run.config for run in runs) and all(key in _SEEDS for key in keys):
        advice.append(
            "what they differ by is chance: take a smaller difference between other runs for chance too"
            if keys
            else "run one of them again with another seed to see how much is chance"
        )
    elif not is_clear:
        advice.append(
            "take the one that costs less, or repeat both with other seeds; "
            f"tpu-tune eval --model {best.path} --against {other.path} compares them row by row, which is finer"
        )
    elif len(keys) > 1:
        advice.append(
            f"{len(keys)} keys differ, so which of them made {best.name} better is not known: change one at a time"
        )
    else:
        advice += [
            _onward(key, *values, best, diagnoses[first], diagnoses[second], other) for key, values in keys.items()
        ]
    return [text for text in advice if text]


def _onward(
    key: str, mine: Any, theirs: Any, best: CurveRun, verdict: Diagnosis, other_verdict: Diagnosis, other: CurveRun
) -> str:
    """Return what the better of two values of the only key that differs says of values not tried yet."""
    said = f"{key}={_value(mine)} is better than {_value(theirs)}"
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (mine, theirs))
    if key not in _GOES_ON or not is_number or mine <= 0 or theirs <= 0:
        return f"{said}: keep it"
    contrary = ("unstable", "overfit") if mine > theirs else ("underfit",)
    if verdict.verdict in contrary or (other_verdict.verdict == "unstable" and theirs > mine):
        between = math.sqrt(mine * theirs)
        between = round(between) if isinstance(mine, int) else float(f"{between:.2g}")
        return (
            f"{said}, but {best.name} is {verdict.title} and {other.name} {other_verdict.title}: try {between} between"
        )
    factor = min(max(mine / theirs, 1 / 3), 3)
    further = max(1, round(mine * factor)) if isinstance(mine, int) else float(f"{mine * factor:.2g}")
    return f"{said}: go on the same way, to {_value(further)}"


def _last_step(run: CurveRun) -> int:
    return int(max((row["step"] for row in run.metrics if isinstance(row.get("step"), int | float)), default=0))


def _share(apart: float, known: Sequence[tuple[float, int]]) -> str:
    return f"{apart / max(abs(known[1][0]), 1e-12):.1%}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = "none" if value is None else str(value) if value != "" else '""'
    return text if len(text) <= 60 else f"{text[:57]}..."
