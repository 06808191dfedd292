"""What the curves of a run say: underfit, overfit, well-fit, unstable, or not enough points; with the evidence.

The definitions are those of the guide's "Interpreting the Learning Curves": a model is underfit if its training loss
stays flat or still falls at the end, overfit if the training loss keeps falling after the evaluation loss has begun to
rise, and well-fit if both have converged with a small gap. The rules are tried in this order, each by statistics
that a few outliers hardly change:

1. *unstable*: losses that are not finite, a training loss that ends far above its minimum, or more spikes (points far
   above the running median, compared with the noise) than an odd batch explains.
2. *not enough points*: fewer than 6 training losses.
   Of preference runs the rewards are judged next, by three rules of their own (`preferences`).
3. *underfit, flat*: the training loss has no trend (Mann-Kendall) and ends less than 3% below its start.
4. *overfit*: the evaluation loss ends above its smoothed minimum by more than its noise and 1.5%, the training loss
   not.
5. *underfit, still falling*: over the last third, the training or evaluation loss has a falling trend (Theil-Sen slope,
   Mann-Kendall test) worth more than 5% of the whole fall, or 6% of the loss.
6. *well-fit*, if there are evaluations; the gap is reported.

The last third is a third of the progress of learning, the integral of the learning rate, and not of the steps: a rate
that decays to 0 flattens any curve, and a curve that is flat only for that reason would fall further under a longer
schedule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from tpu_tune.curves.instability import unstable
from tpu_tune.curves.losses import MIN_TRAIN, Curve, Finding, Losses, level_at, rate_decays, tail
from tpu_tune.curves.preferences import diagnose_rewards
from tpu_tune.curves.series import has_rewards
from tpu_tune.curves.statistics import block_medians, mann_kendall, running

MIN_EVAL = 3  # with fewer evaluations there is no verdict on them
FLAT = 0.03  # share of the start: a training loss that fell less has not learned
STILL = 0.05  # share of the whole fall that another third would bring, above which a loss still falls
MOVES = 0.06  # share of the loss that makes training on worthwhile, however far it has fallen before
STILL_LEVEL = 0.01  # share of the loss: smaller falls are not worth training on for
TURN = 0.015  # share of its minimum: a smaller rise of the evaluation loss does not count
WIDE, WIDENING = 0.5, 0.25  # gaps, as a share of the evaluation loss, that mean overfitting even without a rise
GUESSING = 0.5  # share of log(vocabulary): a plateau above it knows little more than how often each token occurs
LOW = 0.1  # nats per token: a loss below it cannot fall much further
_P05, _P01 = 1.645, 2.326  # one-sided normal quantiles
_MAX_POINTS = 120  # for pairwise statistics


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A verdict on a run.

    Attributes:
      verdict: underfit | overfit | well-fit | unstable | preferences (of rewards) | not enough points.
      reason: the kind of that verdict, in a few words: "still falling", "spikes".
      evidence: the observations behind the verdict, a sentence each, with numbers.
      advice: what to try.
      numbers: the figures behind the evidence; losses in nats per token, steps, p-values.
      done: whether the run has reached its last step; before that, "still falling" is as it should be.
    """

    verdict: str
    reason: str
    evidence: tuple[str, ...]
    advice: tuple[str, ...]
    numbers: dict[str, Any]
    done: bool = True

    @property
    def title(self) -> str:
        """Verdict and reason: "underfit (still falling)"."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict

    def line(self) -> str:
        """Return one short line, as training prints it at an evaluation."""
        title = "still falling" if not self.done and self.reason == "still falling" else self.title
        return f"{'diagnosis' if self.done else 'so far'}: {title}" + (f"; {self.evidence[0]}" if self.evidence else "")

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain values for JSON."""
        return {**dataclasses.asdict(self), "evidence": list(self.evidence), "advice": list(self.advice)}


def diagnose(
    metrics: Sequence[Mapping[str, Any]],
    saved_steps: Sequence[int] = (),
    vocab_size: int | None = None,
    total_steps: int | None = None,
    keeps_best: bool = False,
) -> Diagnosis:
    """Judge a run by its metrics.

    Args:
      metrics: rows of metrics.jsonl: training rows with `step` and `loss` (and `learning_rate`, if it is known),
        evaluation rows with `step` and `eval_loss`. Restarts, gaps and uneven intervals are fine.
      saved_steps: steps of the checkpoints that still exist, one of which may be recommended.
      vocab_size: the model's vocabulary size: log(vocab_size) is the loss of pure guessing.
      total_steps: length of the whole run, to tell a run in progress from a finished one.
      keeps_best: whether the run ends with its best weights (train.load_best_model_at_end).
    """
    losses = Losses.from_metrics(metrics)
    done = not total_steps or losses.last_step >= total_steps
    rules = list(_RULES)
    if has_rewards(metrics):
        vocab_size = None  # the loss is no cross-entropy
        rules.insert(rules.index(_flat), lambda *_: diagnose_rewards(metrics, losses.numbers))
    findings = (rule(losses, list(saved_steps), vocab_size) for rule in rules)
    verdict, reason, evidence, advice = next(finding for finding in findings if finding is not None)
    if not done and reason.startswith("flat") and len(losses.train) < 5 * MIN_TRAIN:
        verdict, reason, evidence, advice = _too_early(losses)
    if verdict == "overfit" and keeps_best and done:
        step = losses.numbers["best_eval_step"]
        advice = [f"the result holds the weights of step {step} already (load_best_model_at_end)", *advice[1:]]
    return Diagnosis(
        verdict, reason, tuple(evidence + losses.remarks), tuple(advice), _json_numbers(losses.numbers), done
    )


def _too_few(losses: Losses, saved_steps: list[int], vocab_size: int | None) -> Finding | None:
    if len(losses.train) >= MIN_TRAIN:
        return None
    return Finding(
        "not enough points",
        "training",
        [f"{len(losses.train)} training losses; a verdict needs at least {MIN_TRAIN}"],
        ["train longer, or lower train.logging_steps"],
    )


def _too_early(losses: Losses) -> Finding:
    """In place of "flat" early in a run: many are flat at first, and nothing is wrong with those."""
    evidence = [f"nearly flat after {len(losses.train)} training losses, as many a run is at first"]
    return Finding("not enough points", "training", evidence, ["let the run go on"])


def _flat(losses: Losses, saved_steps: list[int], vocab_size: int | None) -> Finding | None:
    train, held_out, end = losses.train, losses.eval, losses.train.end()
    _, values = block_medians(train.steps, train.values, _MAX_POINTS)
    trend = mann_kendall(values)
    fall = losses.start - end
    slope_fall = -stats.theilslopes(values, np.linspace(0, 1, len(values))).slope  # over the whole run
    losses.numbers |= {"fall": fall, "trend_z": trend}
    level = max(abs(end), 1e-12)
    eval_fall = held_out.values[0] - held_out.end() if len(held_out) >= 2 else 0.0
    by_eval = eval_fall > max(STILL_LEVEL * level, 5 * losses.eval_noise)
    by_start = fall > max(FLAT * level, 3 * losses.noise) and (fall > 0.1 * level or trend < -_P05)
    by_trend = trend < -_P01 and slope_fall > FLAT * level
    if by_start or by_trend or by_eval or end < LOW:
        return None
    evidence = [
        f"train loss went from {losses.start:.4g} to {end:.4g} in {losses.last_step} steps, a change within its noise "
        f"({losses.noise:.2g}) or {FLAT:.0%}"
    ]
    if vocab_size:
        evidence.append(f"guessing among {vocab_size:,} tokens has a loss of {math.log(vocab_size):.3g}")
    if len(held_out) >= 2:
        evidence.append(f"eval loss went from {held_out.values[0]:.4g} to {held_out.end():.4g}")
    reason = "flat and noisy" if losses.noise > 0.03 * level else "flat"
    return Finding("underfit", reason, evidence, [_RAISE_RATE, _TRAIN_MORE_MODULES, _CHECK_ANSWERS])


def _overfit(losses: Losses, saved_steps: list[int], vocab_size: int | None) -> Finding | None:
    held_out, train = losses.eval, losses.train
    if len(held_out) < MIN_EVAL:
        return None
    smoothed = running(np.median, held_out.values, 1) if len(held_out) >= 9 else held_out.values
    turn = int(np.argmin(smoothed))
    left = len(held_out) - 1 - turn
    count = 1 if len(held_out) < 6 else min(tail(len(held_out)), max(1, left))
    low, end = float(smoothed[turn]), float(np.median(held_out.values[-count:]))
    rise, train_then, train_end = end - low, level_at(train, held_out.progress[turn]), train.end()
    # The smoothed curve decides whether the loss turned; the step and the loss to report are those of a real
    # evaluation.
    lowest = max(0, turn - 1) + int(np.argmin(held_out.values[max(0, turn - 1) : turn + 2]))
    step, lowest_loss = int(held_out.steps[lowest]), float(held_out.values[lowest])
    worse = end - lowest_loss
    losses.numbers |= {"turn_step": step, "turn_loss": lowest_loss, "rise": worse, "train_at_turn": train_then}
    gap_growth = (end - train_end) - (low - train_then)
    band = 4 * losses.eval_noise * math.sqrt(1 / count + 1 / 3)
    rising = left < 4 or mann_kendall(held_out.values[turn:]) > _P05
    if left >= 1 and rise > max(band, TURN * low) and rising and gap_growth > 0.5 * rise:
        losses.numbers["rise_percent"] = 100 * worse / lowest_loss
        evidence = [
            f"eval loss was lowest at step {step} ({lowest_loss:.4g}) and ended at {end:.4g}, "
            f"{worse:.3g} ({worse / lowest_loss:.1%}) higher",
            f"train loss went from {train_then:.4g} to {train_end:.4g} in the same steps",
        ]
        return Finding(
            "overfit", "eval loss has turned", evidence, [*_best_checkpoint(losses, saved_steps, step), *_LESS]
        )
    gap = end - train_end
    widened = gap > WIDENING * end and gap_growth > 0.5 * gap and _last_third(losses, train, losses.noise)[0]
    if (gap > WIDE * end or widened) and not _last_third(losses, held_out, losses.eval_noise)[0]:
        best_step = losses.numbers["best_eval_step"]
        evidence = [
            f"eval loss converged at {end:.4g}, train loss at {train_end:.4g}: a gap of {gap:.3g}, {gap / end:.0%} "
            "of it",
            _lowest_eval(losses),
        ]
        return Finding("overfit", "wide gap", evidence, [*_best_checkpoint(losses, saved_steps, best_step), *_LESS])
    return None


def _falling(losses: Losses, saved_steps: list[int], vocab_size: int | None) -> Finding | None:
    train, held_out = losses.train, losses.eval
    falls, fall, z = _last_third(losses, train, losses.noise)
    losses.numbers |= {"last_third_fall": fall, "last_third_z": z}
    eval_falls, eval_fall, has_eval = False, 0.0, len(held_out) >= MIN_EVAL
    if has_eval:
        eval_falls, eval_fall, _ = _last_third(losses, held_out, losses.eval_noise)
        losses.numbers["last_third_eval_fall"] = eval_fall
    if not eval_falls and not (falls and not has_eval):
        if falls:
            losses.remarks.append("train loss still falls, eval loss does not: more steps would not help")
        return None
    whole = max(losses.start - train.end(), 1e-12)
    evidence = []
    if falls:
        evidence.append(f"train loss still falls: {fall:.3g} over the last third, {fall / whole:.0%} of its whole fall")
    if eval_falls:
        evidence.append(f"eval loss {'too' if falls else 'still falls'}: {eval_fall:.3g} over the last third")
    evidence.append(f"train loss {train.end():.4g}" + (f", eval loss {held_out.end():.4g}" if len(held_out) else ""))
    longer = "train longer: twice train.num_train_epochs (if the learning rate decays, in a new output_dir)"
    if rate_decays(train):
        longer = "train longer: twice train.num_train_epochs, in a new output_dir because the schedule changes"
    return Finding("underfit", "still falling", evidence, [longer, "or raise train.learning_rate two- to threefold"])


def _well_fit(losses: Losses, saved_steps: list[int], vocab_size: int | None) -> Finding:
    train, held_out = losses.train, losses.eval
    end = train.end()
    if vocab_size and end > GUESSING * math.log(vocab_size):
        evidence = [
            f"train loss converged at {end:.4g}, {end / math.log(vocab_size):.0%} of the loss of guessing among "
            f"{vocab_size:,} tokens ({math.log(vocab_size):.3g})"
        ]
        return Finding("underfit", "flat and high", evidence, [_MORE_CAPACITY, _OTHER_RATES, _CHECK_DATA])
    if len(held_out) < MIN_EVAL:
        evidence = [
            f"train loss converged at {end:.4g}, but {len(held_out)} evaluations cannot tell well-fit from overfit; "
            f"a verdict needs at least {MIN_EVAL}"
        ]
        advice = ["set data.eval or data.eval_ratio, and lower train.eval_steps"]
        return Finding("not enough points", "evaluation", evidence, advice)
    eval_end = held_out.end()
    plateau = train.values[-max(tail(len(train)), len(train) // 4) :]  # on a plateau, more points are more exact
    end = float(np.median(plateau))
    gap, error = eval_end - end, 1.25 * losses.noise / math.sqrt(len(plateau))
    losses.numbers |= {"gap": gap, "gap_error": error}
    evidence = [
        f"both losses have converged: train {end:.4g}, eval {eval_end:.4g}, generalization gap {gap:.2g} "
        f"(+-{error:.1g}), {gap / eval_end:.1%} of eval loss",
        _lowest_eval(losses),
    ]
    if gap < -error:
        evidence.append("train loss is above eval loss: harmless, the effect of dropout or of harder training rows")
    advice = ["keep it; to improve: more or cleaner data, a higher lora.rank, or a larger model"]
    return Finding("well-fit", "", evidence, advice)


_RULES = (unstable, _too_few, _flat, _overfit, _falling, _well_fit)  # the last one always finds something

_RAISE_RATE = "raise train.learning_rate three- to tenfold (tpu-tune lr-find looks for a good one)"
_TRAIN_MORE_MODULES = (
    "check with tpu-tune inspect which modules are trained: more lora.target_modules, or a higher lora.rank"
)
_CHECK_ANSWERS = "look at the data: are the answers what is trained on, and do they follow from the prompts?"
_MORE_CAPACITY = "train more weights: a higher lora.rank, more lora.target_modules, method=full, or a larger model"
_OTHER_RATES = "try other learning rates, lower ones too (tpu-tune lr-find)"
_CHECK_DATA = "look at the data: is there something to learn in it?"
_LESS = (
    "train for fewer epochs, or stop early: train.early_stopping_patience=3 with train.load_best_model_at_end=True",
    "more data, lora.dropout=0.05 to 0.1, train.weight_decay=0.01, or a lower lora.rank",
)


def _lowest_eval(losses: Losses) -> str:
    return f"the lowest eval loss was {losses.numbers['best_eval_loss']:.4g} at step {losses.numbers['best_eval_step']}"


def _best_checkpoint(losses: Losses, saved_steps: list[int], step: int) -> list[str]:
    """Return the advice to use the last checkpoint saved up to a step, or what to do if there is none."""
    before = max((saved for saved in saved_steps if saved <= step), default=None)
    losses.numbers["use_checkpoint"] = before
    if before is not None:
        late = "" if before == step else f", the last one saved before step {step}"
        return [f"use checkpoint {before} (--step {before} of export, generate, eval and push){late}"]
    kept = f"only {', '.join(map(str, sorted(saved_steps)))}" if saved_steps else "none"
    return [f"no checkpoint up to step {step} was kept ({kept}): train again with train.load_best_model_at_end=True"]


def _last_third(losses: Losses, curve: Curve, noise: float) -> tuple[bool, float, float]:
    """Return whether a curve still falls, by how much over the last third of the progress, and Z of the trend.

    With few points the last half is used, and its fall scaled to a third.
    """
    end = curve.after(2 / 3)
    if len(end) < 8:
        end = curve.after(1 / 2)
    if len(end) < 4:
        end = Curve(curve.steps[-4:], curve.values[-4:], curve.progress[-4:])
    if len(end) < 2:
        return False, 0.0, 0.0
    x, y = block_medians(end.progress, end.values, _MAX_POINTS)
    z = mann_kendall(y)
    fall = -stats.theilslopes(y, x).slope / 3 if np.ptp(x) > 0 else 0.0
    # Evaluations begin when much has been learned already: only the training loss shows how far there was to fall.
    whole = max(losses.start - losses.train.end(), curve.values[0] - curve.end())
    level = abs(curve.end())
    worthwhile = max(min(STILL * whole, MOVES * level), STILL_LEVEL * level)
    significant = z < -_P05 if len(end) >= 5 else end.values[0] - end.values[-1] > 3 * noise
    return bool(significant and fall > worthwhile), fall, z


def _json_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in numbers.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}
