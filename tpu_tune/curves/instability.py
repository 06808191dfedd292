"""Rules for an unstable training loss: not finite, divergence (also before the end), swings, spikes, skipped updates.

A single spike or a few skipped updates are remarks only: an odd batch, or float16's first steps, cause those.
"""

from __future__ import annotations

import math

import numpy as np

from tpu_tune.curves.losses import MIN_TRAIN, Finding, Losses
from tpu_tune.curves.statistics import running
from tpu_tune.errors import counted

SPIKE_NOISE, SPIKE_LEVEL = 8.0, 0.5  # a spike exceeds the running median by 8 noise levels and by half of the median
_LOWER_RATE = "lower train.learning_rate to a third or a tenth (tpu-tune lr-find looks for a good one)"
_STABILIZE = "use a longer warmup (train.warmup_ratio=0.1) and keep train.max_grad_norm=1.0"
_FLOAT32 = "try model.dtype=float32 once, to see whether the precision is the cause"


def unstable(losses: Losses, saved_steps: list[int], vocab_size: int | None) -> Finding | None:
    """Return what makes the training loss unstable, or None; `vocab_size` is not used."""
    finding = _not_finite(losses)
    if finding is not None or len(losses.train) < MIN_TRAIN:
        return finding
    for rule in (_diverged, _swings, _diverged_between, _spikes, _skipped_updates):
        finding = rule(losses, saved_steps)
        if finding is not None:
            return finding
    return None


def _not_finite(losses: Losses) -> Finding | None:
    bad, bad_eval = losses.not_finite, losses.eval_not_finite
    count = len(bad) + len(losses.train)
    if bad:
        losses.numbers["not_finite_rows"] = len(bad)
    if bad_eval or len(bad) >= max(2, 0.01 * count) or (bad and bad[-1] >= losses.last_step):
        which = (
            f"{len(bad)} of {count} training losses"
            if bad
            else counted(len(bad_eval), "evaluation loss", "evaluation losses")
        )
        evidence = [
            f"{which} {'is' if bad and len(bad) == 1 else 'are'} not finite numbers, first at step "
            f"{(bad or bad_eval)[0]}"
        ]
        return Finding("unstable", "not finite", evidence, [_LOWER_RATE, _STABILIZE, _FLOAT32])
    if losses.skipped:
        losses.remarks.append(
            f"{counted(losses.skipped, 'update was', 'updates were')} left out because of gradients that were not "
            "finite"
        )
    if bad:
        losses.remarks.append(f"the training loss was no finite number at step {bad[0]}, and finite again after it")
    return None


def _diverged(losses: Losses, saved_steps: list[int]) -> Finding | None:
    """The end is far above the lowest stretch of the same length."""
    train, window = losses.train, max(3, len(losses.train) // 10)
    half = window // 2
    levels = running(np.median, train.values, half)
    index = half + int(np.argmin(levels[half : len(levels) - half]))  # full windows only
    floor, end = float(levels[index]), train.end()
    rise = end - floor
    if rise <= max(6 * _median_error(losses, window), 0.25 * (losses.start - floor), 0.1 * abs(floor)):
        return None
    if len(train) - index < 3:
        return None
    step = int(train.steps[index])
    losses.numbers |= {"floor": floor, "floor_step": step}
    above = ", above its start" if end > losses.start else ""
    before = max((saved for saved in saved_steps if saved <= step), default=None)
    go_back = [f"checkpoint {before} is from before it rose"] if before is not None else []
    evidence = [f"train loss rose from {floor:.4g} at step {step} to {end:.4g}{above}"]
    return Finding("unstable", "diverged", evidence, [_LOWER_RATE, _STABILIZE, *go_back])


def _swings(losses: Losses, saved_steps: list[int]) -> Finding | None:
    """A stretch rose and fell again: at least five points, whose median two isolated spikes do not lift."""
    train = losses.train
    if len(train) < 15:
        return None
    half = max(2, len(train) // 20)
    levels = running(np.median, train.values, half)[half : len(train) - half]
    lowest = np.minimum.accumulate(levels)
    top = int(np.argmax(levels - lowest))
    rise, low = float(levels[top] - lowest[top]), float(lowest[top])
    if rise <= max(8 * _median_error(losses, 2 * half + 1), 0.3 * (losses.start - low), 0.15 * abs(low)):
        return None
    step = int(train.steps[half + top])
    evidence = [
        f"train loss rose from {low:.4g} to {levels[top]:.4g} around step {step}, and ended at {train.end():.4g}"
    ]
    return Finding("unstable", "swings", evidence, [_LOWER_RATE, _STABILIZE])


def _diverged_between(losses: Losses, saved_steps: list[int]) -> Finding | None:
    """Three losses in a row are above the start, or one is ten times as high."""
    train = losses.train
    above = train.values > max(1.25 * losses.start, losses.start + 8 * _noise(losses))
    above[: 3 + len(train) // 50] = False  # the start itself does not count
    if not (above[:-2] & above[1:-1] & above[2:]).any() and train.values.max() <= 10 * abs(losses.start):
        return None
    top = int(np.argmax(train.values))
    evidence = [
        f"train loss rose to {train.values[top]:.4g} at step {int(train.steps[top])}, from {losses.start:.4g} at the "
        f"start, and ended at {train.end():.4g}"
    ]
    return Finding("unstable", "diverged", evidence, [_LOWER_RATE, _STABILIZE])


def _spikes(losses: Losses, saved_steps: list[int]) -> Finding | None:
    """Three spikes, or in a long run one in 200 points; or two that make up more than a twelfth of the points."""
    train = losses.train
    usual = running(np.median, train.values, int(np.clip(len(train) // 20, 4, 20)))
    above = train.values - usual
    high = above > np.maximum(SPIKE_NOISE * losses.noise, SPIKE_LEVEL * np.abs(usual))
    starts = np.flatnonzero(high & ~np.concatenate([[False], high[:-1]]))
    losses.numbers["spikes"] = len(starts)
    steps = [str(int(train.steps[start])) for start in starts]
    if len(starts) >= max(3, len(train) // 200) or (len(starts) > 1 and high.sum() > max(3, 0.08 * len(train))):
        worst = int(np.argmax(np.where(high, above, -np.inf)))
        listed = ", ".join(steps[:6]) + (", ..." if len(steps) > 6 else "")
        evidence = [
            f"train loss jumped {counted(len(starts), 'time')} ({'step' if len(starts) == 1 else 'steps'} {listed}); "
            "the highest jump reached "
            f"{train.values[worst]:.4g}, from a usual {usual[worst]:.4g}"
        ]
        rows = "look at the rows of those steps: broken or very long ones cause such jumps too"
        return Finding("unstable", "spikes", evidence, [_LOWER_RATE, _STABILIZE, rows])
    if steps:
        losses.remarks.append(f"the training loss jumped at step {' and '.join(steps)}, and recovered")
    return None


def _skipped_updates(losses: Losses, saved_steps: list[int]) -> Finding | None:
    if losses.skipped < max(20, 0.05 * losses.last_step):
        return None
    evidence = [f"{losses.skipped} of {losses.last_step} updates were left out because their gradients were not finite"]
    return Finding("unstable", "not finite", evidence, [_LOWER_RATE, _STABILIZE, _FLOAT32])


def _noise(losses: Losses) -> float:
    return 0.0 if math.isnan(losses.noise) else losses.noise


def _median_error(losses: Losses, count: int) -> float:
    """Return the standard error of the median of `count` normal values."""
    return 1.25 * _noise(losses) / math.sqrt(count)
