"""What the curves of a run say: underfit, overfit, well-fit, unstable, or not enough points; with the numbers seen.

The definitions are those of the guide's "Interpreting the Learning Curves": underfit is a training loss that stays flat
or still falls at the end; overfit is one that goes on falling while the evaluation's has turned; well-fit is both at
rest with a small gap. They are looked for in this order, each by statistics that a few wild points do not move:

1. *unstable*: losses that are no numbers; a training loss that ends far above its floor; spikes (a point far above the
   running median, by the noise level), more of them than an accident.
2. *not enough points*: fewer than 6 training losses.
3. *underfit, flat*: the training loss has no trend (Mann-Kendall) and ends less than 3% below its start.
4. *overfit*: the evaluation ends above its smoothed minimum by more than its noise and 1.5%, and training does not.
5. *underfit, still falling*: over the last third, training or evaluation fall by a trend (Theil-Sen slope, Mann-Kendall
   test) that is worth more than 5% of the whole fall, or 6% of the loss.
6. *well-fit*, where there are evaluations; the gap is reported.

The last third is measured in learning done, the integral of the learning rate, and not in steps: a rate that decays to
0 flattens any curve, and a curve that is flat for that reason alone would fall on with a longer schedule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.curves.instability import unstable
from tpu_tune.curves.losses import MIN_TRAIN, Curve, Found, Losses, level_at, rate_decays, tail
from tpu_tune.curves.statistics import block_medians, mann_kendall, running, theil_sen

MIN_EVAL = 3  # evaluations, below which nothing is said of them
FLAT = 0.03  # of its start: a training loss that fell less has not learned
STILL = 0.05  # of the whole fall: what another third would bring while it counts as still falling
MOVES = 0.06  # of the loss: what is worth going on for however far it has fallen before
STILL_LEVEL = 0.01  # of the loss: falls below it are not worth going on for
TURN = 0.015  # of its minimum: a smaller rise of the evaluation is no turn
WIDE, WIDENING = 0.5, 0.25  # of the evaluation's loss: gaps that are overfit without a turn
GUESSING = 0.5  # of log(vocabulary): a plateau above it knows little but how often each token occurs
LOW = 0.1  # nats a token: a loss below it has nothing left to fall
_P05, _P01 = 1.645, 2.326  # one-sided normal quantiles
_MOST = 120  # points in pairwise statistics


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A verdict on a run.

    Attributes:
      verdict: underfit | overfit | well-fit | unstable | not enough points.
      reason: which kind of it, in a few words: "still falling", "spikes".
      evidence: what was seen, a sentence each, with numbers.
      advice: what to try.
      numbers: the figures behind them; losses in nats a token, steps, p-values.
      done: whether the run has reached its last step; before, "still falling" is as it should be.
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
        """One short line, as training prints it at an evaluation."""
        title = "still falling" if not self.done and self.reason == "still falling" else self.title
        return f"{'diagnosis' if self.done else 'so far'}: {title}" + (f"; {self.evidence[0]}" if self.evidence else "")

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
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
      metrics: rows of metrics.jsonl: training rows with `step` and `loss` (and `learning_rate`, where it is known),
        evaluation rows with `step` and `eval_loss`. Restarts, gaps and uneven intervals are fine.
      saved_steps: steps of the checkpoints that are there, of which one may be recommended.
      vocab_size: of the model: log(vocab_size) is the loss of pure guessing.
      total_steps: of the whole run, to tell a run that goes on from one that is done.
      keeps_best: whether the run ends with its best weights (train.load_best_model_at_end).
    """
    seen = Losses.of(metrics)
    done = not total_steps or seen.last_step >= total_steps
    for look in (unstable, _too_few, _flat, _overfit, _falling, _well_fit):
        found = look(seen, list(saved_steps), vocab_size)
        if found is not None:
            verdict, reason, evidence, advice = found
            if not done and reason.startswith("flat") and len(seen.train) < 5 * MIN_TRAIN:
                verdict, reason = "not enough points", "training"  # a start is often flat for a while
            if verdict == "overfit" and keeps_best and done:
                best = f"the result holds the weights of step {seen.numbers['best_eval_step']} already (load_best_model_at_end)"
                advice = [best, *advice[1:]]
            return Diagnosis(verdict, reason, tuple(evidence + seen.remarks), tuple(advice), _plain(seen.numbers), done)
    raise AssertionError("the last look always finds something")


def _too_few(seen: Losses, saved: list[int], vocab: int | None) -> Found:
    if len(seen.train) >= MIN_TRAIN:
        return None
    return (
        "not enough points",
        "training",
        [f"{len(seen.train)} training losses; it takes {MIN_TRAIN} to say something"],
        ["train longer, or lower train.logging_steps"],
    )


def _flat(seen: Losses, saved: list[int], vocab: int | None) -> Found:
    train, end = seen.train, seen.train.end()
    _, values = block_medians(train.steps, train.values, _MOST)
    trend = mann_kendall(values)
    fall = seen.start - end
    slope_fall = -theil_sen(np.linspace(0, 1, len(values)), values)  # over the whole run
    seen.numbers |= {"fall": fall, "trend_z": trend}
    level = max(abs(end), 1e-12)
    eval_fall = seen.eval.values[0] - seen.eval.end() if len(seen.eval) >= 2 else 0.0
    by_eval = eval_fall > max(STILL_LEVEL * level, 5 * seen.eval_noise)
    by_start = fall > max(FLAT * level, 3 * seen.noise) and (fall > 0.1 * level or trend < -_P05)
    by_trend = trend < -_P01 and slope_fall > FLAT * level
    if by_start or by_trend or by_eval:
        return None
    if end < LOW:
        return None
    evidence = [
        f"train loss went from {seen.start:.4g} to {end:.4g} in {seen.last_step} steps, "
        f"within its noise of {seen.noise:.2g} a point or {FLAT:.0%}"
    ]
    if vocab:
        evidence.append(f"guessing among {vocab:,} tokens has a loss of {math.log(vocab):.3g}")
    if len(seen.eval) >= 2:
        evidence.append(f"eval loss went from {seen.eval.values[0]:.4g} to {seen.eval.end():.4g}")
    noisy = seen.noise > 0.03 * level
    return (
        "underfit",
        "flat and noisy" if noisy else "flat",
        evidence,
        [
            "raise train.learning_rate three- to tenfold (tpu-tune lr-find looks for a good one)",
            "see with tpu-tune inspect whether anything is trained where it matters: more lora.target_modules, a higher lora.rank",
            "look at the data: whether the answers are what is trained on, and can follow from the prompts",
        ],
    )


def _overfit(seen: Losses, saved: list[int], vocab: int | None) -> Found:
    held_out, train = seen.eval, seen.train
    if len(held_out) < MIN_EVAL:
        return None
    values = running(np.median, held_out.values, 1) if len(held_out) >= 9 else held_out.values
    place = int(np.argmin(values))
    low = float(values[place])
    last = 1 if len(held_out) < 6 else min(tail(len(held_out)), max(1, len(held_out) - 1 - place))
    end = float(np.median(held_out.values[-last:]))
    rise, left = end - low, len(held_out) - 1 - place
    band = 4 * seen.eval_noise * math.sqrt(1 / last + 1 / 3)
    train_then, train_end = level_at(train, held_out.spent[place]), train.end()
    near = slice(
        max(0, place - 1), place + 2
    )  # smoothing decides whether it turned; where and from what, the value itself
    lowest = max(0, place - 1) + int(np.argmin(held_out.values[near]))
    step, there = int(held_out.steps[lowest]), float(held_out.values[lowest])
    worse = end - there
    seen.numbers |= {"turn_step": step, "turn_loss": there, "rise": worse, "train_at_turn": train_then}
    grew = (end - train_end) - (low - train_then)
    turned = left >= 1 and rise > max(band, TURN * low) and (left < 4 or mann_kendall(held_out.values[place:]) > _P05)
    if turned and grew > 0.5 * rise:
        seen.numbers["rise_percent"] = 100 * worse / there
        evidence = [
            f"eval loss turned at step {step}: {there:.4g} there, {end:.4g} at the end, {worse:.3g} ({worse / there:.1%}) worse",
            f"train loss went from {train_then:.4g} to {train_end:.4g} meanwhile",
        ]
        return "overfit", "eval loss has turned", evidence, [*_use_checkpoint(seen, saved, step), *_LESS]
    gap = end - train_end
    falling = _last_third(seen, train, seen.noise)[0]
    stalled = not _last_third(seen, held_out, seen.eval_noise)[0]
    widened = falling and gap > WIDENING * end and grew > 0.5 * gap
    if stalled and (gap > WIDE * end or widened):
        evidence = [
            f"eval loss rests at {end:.4g} while train loss is {train_end:.4g}: a gap of {gap:.3g}, {gap / end:.0%} of it",
            f"the lowest eval loss was {seen.numbers['best_eval_loss']:.4g} at step {seen.numbers['best_eval_step']}",
        ]
        return (
            "overfit",
            "wide gap",
            evidence,
            [*_use_checkpoint(seen, saved, seen.numbers["best_eval_step"]), *_LESS],
        )
    return None


def _falling(seen: Losses, saved: list[int], vocab: int | None) -> Found:
    train, held_out = seen.train, seen.eval
    falls, fall, z = _last_third(seen, train, seen.noise)
    seen.numbers |= {"last_third_fall": fall, "last_third_z": z}
    eval_falls, eval_fall, known = False, 0.0, len(held_out) >= MIN_EVAL
    if known:
        eval_falls, eval_fall, _ = _last_third(seen, held_out, seen.eval_noise)
        seen.numbers["last_third_eval_fall"] = eval_fall
    if not (falls and (eval_falls or not known)) and not eval_falls:
        if falls:
            seen.remarks.append("train loss still falls, eval loss does not: more steps would not help")
        return None
    whole = max(seen.start - train.end(), 1e-12)
    evidence = []
    if falls:
        evidence.append(f"train loss still falls: {fall:.3g} over the last third, {fall / whole:.0%} of its whole fall")
    if eval_falls:
        evidence.append(f"eval loss {'too' if falls else 'still falls'}: {eval_fall:.3g} over the last third")
    evidence.append(f"train loss {train.end():.4g}" + (f", eval loss {held_out.end():.4g}" if len(held_out) else ""))
    with_decay = rate_decays(train)
    advice = [
        "train longer: twice train.num_train_epochs (in a new output_dir where the rate decays, for its schedule)"
    ]
    if with_decay:
        advice = ["train longer, with a schedule as long: in a new output_dir with twice train.num_train_epochs"]
    advice.append("or raise train.learning_rate two- to threefold")
    return "underfit", "still falling", evidence, advice


def _well_fit(seen: Losses, saved: list[int], vocab: int | None) -> Found:
    train, held_out = seen.train, seen.eval
    end = train.end()
    if vocab and end > GUESSING * math.log(vocab):
        return (
            "underfit",
            "flat and high",
            [
                f"train loss came to rest at {end:.4g}, {end / math.log(vocab):.0%} of the {math.log(vocab):.3g} of pure "
                f"guessing among {vocab:,} tokens",
            ],
            [
                "give it more to learn with: a higher lora.rank, more lora.target_modules, method=full, a larger model",
                "try other learning rates, lower ones too (tpu-tune lr-find)",
                "look at the data: whether there is something to learn in it",
            ],
        )
    if len(held_out) < MIN_EVAL:
        return (
            "not enough points",
            "evaluation",
            [
                f"train loss rests at {end:.4g}, and {len(held_out)} evaluations do not tell well-fit from overfit; "
                f"it takes {MIN_EVAL}",
            ],
            ["give data.eval or data.eval_ratio, and lower train.eval_steps"],
        )
    eval_end = held_out.end()
    resting = train.values[-max(tail(len(train)), len(train) // 4) :]  # at rest, more points say it better
    end = float(np.median(resting))
    gap, unsure = eval_end - end, 1.25 * seen.noise / math.sqrt(len(resting))
    seen.numbers |= {"gap": gap, "gap_error": unsure}
    evidence = [
        f"both losses have come to rest: train {end:.4g}, eval {eval_end:.4g}, generalization gap {gap:.2g} "
        f"(+-{unsure:.1g}), {gap / eval_end:.1%} of it",
        f"the lowest eval loss was {seen.numbers['best_eval_loss']:.4g} at step {seen.numbers['best_eval_step']}",
    ]
    if gap < -unsure:
        evidence.append("train loss is above eval loss: dropout or harder rows do that, and it is no fault")
    advice = ["keep it; for a better one: more or cleaner data, a higher lora.rank, or a larger model"]
    return "well-fit", "", evidence, advice


_LESS = (
    "train for fewer epochs, or stop early: train.early_stopping_patience=3 with train.load_best_model_at_end=True",
    "more data, lora.dropout=0.05 to 0.1, train.weight_decay=0.01, or a lower lora.rank",
)


def _use_checkpoint(seen: Losses, saved: list[int], step: int) -> list[str]:
    before = max((number for number in saved if number <= step), default=None)
    seen.numbers["use_checkpoint"] = before
    if before is not None:
        exactly = "" if before == step else f", the last one saved before step {step}"
        return [f"use checkpoint {before}{exactly}"]
    kept = f"only {', '.join(map(str, sorted(saved)))} are" if saved else "none are there"
    return [
        f"no checkpoint at or before step {step} is kept ({kept}): train again with train.load_best_model_at_end=True"
    ]


def _last_third(seen: Losses, curve: Curve, noise: float) -> tuple[bool, float, float]:
    """Whether a curve still falls, by how much over the last third of the learning done, and Z of the trend.

    Few points are looked at over the last half, whose fall is scaled to a third.
    """
    part = curve.after(2 / 3)
    if len(part) < 8:
        part = curve.after(1 / 2)
    if len(part) < 4:
        part = Curve(curve.steps[-4:], curve.values[-4:], curve.spent[-4:])
    if len(part) < 2:
        return False, 0.0, 0.0
    x, y = block_medians(part.spent, part.values, _MOST)
    slope, z = theil_sen(x, y), mann_kendall(y)
    fall = -slope / 3 if slope == slope else 0.0
    # Evaluations begin when much has been learned: the training loss knows how far there was to fall.
    whole = max(seen.start - seen.train.end(), curve.values[0] - curve.end())
    level = abs(curve.end())
    worth = max(min(STILL * whole, MOVES * level), STILL_LEVEL * level)
    sure = z < -_P05 if len(part) >= 5 else part.values[0] - part.values[-1] > 3 * noise
    return bool(sure and fall > worth), fall, z


def _plain(numbers: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value.item() if hasattr(value, "item") else value for key, value in numbers.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
