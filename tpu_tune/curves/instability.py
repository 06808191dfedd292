"""Whether a training loss is unstable: no numbers, divergence, swings, a blow-up, repeated jumps.

Each of these looks at the loss alone and says what it saw; a single jump or a few left-out updates are remarks, since an
odd batch or float16's first steps make those.
"""

from __future__ import annotations

import math

import numpy as np

from tpu_tune.curves.losses import MIN_TRAIN, Found, Losses
from tpu_tune.curves.statistics import running

SPIKE_NOISE, SPIKE_LEVEL = 8.0, 0.5  # a spike stands above its surroundings by 8 noise levels and by half of them
_LOWER = "lower train.learning_rate to a third or a tenth (tpu-tune lr-find looks for a good one)"
_CALM = "warm up longer (train.warmup_ratio=0.1) and keep train.max_grad_norm=1.0"
_PRECISE = "set model.dtype=float32 once, to see whether it is the precision"


def unstable(seen: Losses, saved: list[int], vocab: int | None) -> Found:
    """Return the verdict, or None; `vocab` is not looked at."""
    found = _not_finite(seen)
    if found is not None or len(seen.train) < MIN_TRAIN:
        return found
    for look in (_diverged, _swings, _blown_up, _spikes, _left_out):
        found = look(seen, saved)
        if found is not None:
            return found
    return None


def _not_finite(seen: Losses) -> Found:
    bad, bad_eval, all_rows = seen.not_finite, seen.eval_not_finite, len(seen.not_finite) + len(seen.train)
    if bad:
        seen.numbers["not_finite_rows"] = len(bad)
    if bad_eval or len(bad) >= max(2, 0.01 * all_rows) or (bad and bad[-1] >= seen.last_step):
        what = f"{len(bad)} of {all_rows} training losses" if bad else f"{len(bad_eval)} evaluation losses"
        evidence = [f"{what} are not finite numbers, first at step {(bad or bad_eval)[0]}"]
        return "unstable", "not finite", evidence, [_LOWER, _CALM, _PRECISE]
    if seen.skipped:
        seen.remarks.append(f"{seen.skipped} updates were left out, for their gradients were not finite")
    if bad:
        seen.remarks.append(f"the training loss was no finite number at step {bad[0]}; it has gone on since")
    return None


def _diverged(seen: Losses, saved: list[int]) -> Found:
    """The end against the lowest stretch of the same length."""
    train, window = seen.train, max(3, len(seen.train) // 10)
    half = window // 2
    levels = running(np.median, train.values, half)
    place = half + int(np.argmin(levels[half : len(levels) - half]))  # whole windows only
    floor, end = float(levels[place]), train.end()
    rise = end - floor
    if rise <= max(6 * _median_error(seen, window), 0.25 * (seen.start - floor), 0.1 * abs(floor)):
        return None
    if len(train) - place < 3:
        return None
    step = int(train.steps[place])
    seen.numbers |= {"floor": floor, "floor_step": step}
    above = ", above where it began" if end > seen.start else ""
    before = max((number for number in saved if number <= step), default=None)
    back = [f"checkpoint {before} is from before it rose"] if before is not None else []
    evidence = [f"train loss rose from {floor:.4g} at step {step} to {end:.4g}{above}"]
    return "unstable", "diverged", evidence, [_LOWER, _CALM, *back]


def _swings(seen: Losses, saved: list[int]) -> Found:
    """A stretch that rose and came back: five points at least, which two isolated jumps do not lift."""
    train = seen.train
    if len(train) < 15:
        return None
    half = max(2, len(train) // 20)
    levels = running(np.median, train.values, half)[half : len(train) - half]
    lowest = np.minimum.accumulate(levels)
    top = int(np.argmax(levels - lowest))
    rise, low = float(levels[top] - lowest[top]), float(lowest[top])
    if rise <= max(8 * _median_error(seen, 2 * half + 1), 0.3 * (seen.start - low), 0.15 * abs(low)):
        return None
    step = int(train.steps[half + top])
    evidence = [
        f"train loss rose from {low:.4g} to {levels[top]:.4g} around step {step}, and ended at {train.end():.4g}"
    ]
    return "unstable", "swings", evidence, [_LOWER, _CALM]


def _blown_up(seen: Losses, saved: list[int]) -> Found:
    """Three losses in a row above where it began, or one by an order of magnitude."""
    train = seen.train
    over = train.values > max(1.25 * seen.start, seen.start + 8 * _noise(seen))
    over[: 3 + len(train) // 50] = False  # the start itself is no blow-up
    if not (over[:-2] & over[1:-1] & over[2:]).any() and train.values.max() <= 10 * abs(seen.start):
        return None
    place = int(np.argmax(train.values))
    evidence = [
        f"train loss rose to {train.values[place]:.4g} at step {int(train.steps[place])}, from {seen.start:.4g} at the start, "
        f"and ended at {train.end():.4g}"
    ]
    return "unstable", "blown up", evidence, [_LOWER, _CALM]


def _spikes(seen: Losses, saved: list[int]) -> Found:
    """Three jumps, or in a long run one in 200 points; or two, if they take up a twelfth of it."""
    train = seen.train
    middle = running(np.median, train.values, int(np.clip(len(train) // 20, 4, 20)))
    above = train.values - middle
    high = above > np.maximum(SPIKE_NOISE * seen.noise, SPIKE_LEVEL * np.abs(middle))
    starts = np.flatnonzero(high & ~np.concatenate([[False], high[:-1]]))
    seen.numbers["spikes"] = len(starts)
    steps = [str(int(train.steps[place])) for place in starts]
    if len(starts) >= max(3, len(train) // 200) or (len(starts) > 1 and high.sum() > max(3, 0.08 * len(train))):
        worst = int(np.argmax(np.where(high, above, -np.inf)))
        where = ", ".join(steps[:6]) + (", ..." if len(steps) > 6 else "")
        evidence = [
            f"train loss jumped {len(starts)} times (steps {where}), to {train.values[worst]:.4g} at its highest where "
            f"{middle[worst]:.4g} was usual"
        ]
        rows = "look at the rows of those steps: broken or very long ones make such jumps too"
        return "unstable", "spikes", evidence, [_LOWER, _CALM, rows]
    if steps:
        seen.remarks.append(f"a jump of the training loss at step {' and '.join(steps)}, from which it came back")
    return None


def _left_out(seen: Losses, saved: list[int]) -> Found:
    if seen.skipped < max(20, 0.05 * seen.last_step):
        return None
    evidence = [f"{seen.skipped} of {seen.last_step} updates were left out, for their gradients were not finite"]
    return "unstable", "not finite", evidence, [_LOWER, _CALM, _PRECISE]


def _noise(seen: Losses) -> float:
    return 0.0 if math.isnan(seen.noise) else seen.noise


def _median_error(seen: Losses, count: int) -> float:
    """Standard error of the median of `count` normal values."""
    return 1.25 * _noise(seen) / math.sqrt(count)
