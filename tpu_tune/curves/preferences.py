"""What goes wrong in preference runs although the loss falls: three rules on the rewards.

A reward is beta times how much more probable an answer has become than it was to the reference (of orpo, simpo and cpo:
beta times its log-probability). Where there are 3 evaluations the rules read these, which ask the same pairs each time,
else the training rows. A curve rises or falls by the difference of its ends (`losses.tail`), where that is more than
twice its noise.

1. *collapse*: the chosen answers' log-probability ends more than 25% below where it began.
2. *both rewards fall*: so do both, and the chosen one's fall is more than half of what the margin has gained.
3. *margin without accuracy*: the margin has risen, and the share of pairs ranked rightly ends below 60%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tpu_tune.curves.losses import Finding, tail
from tpu_tune.curves.series import series
from tpu_tune.curves.statistics import noise_level

COLLAPSE, OF_MARGIN, GUESS = 0.25, 0.5, 0.6
_MIN_EVAL, _MIN_TRAIN = 3, 6


def diagnose_rewards(metrics: Sequence[Mapping[str, Any]], numbers: dict[str, Any]) -> Finding | None:
    """Return what the rewards of a run say against it, None where that is nothing; adds to the figures."""
    side = "eval_" if len(series(metrics, "eval_rewards/margins")[0]) >= _MIN_EVAL else ""
    curves = {name: series(metrics, f"{side}{name}")[1] for name in _NAMES}
    if min(len(curves["rewards/margins"]), len(curves["rewards/chosen"])) < (_MIN_EVAL if side else _MIN_TRAIN):
        return None
    ends = {name: _ends(values) for name, values in curves.items() if len(values)}
    moved = {name: _moved(curves[name]) for name in ends}
    numbers |= {f"{side}{name}": end for name, (_, end) in ends.items()}
    said = "of held-out answers" if side else "in training"
    went = {name: f"{name} went from {start:.4g} to {end:.4g}" for name, (start, end) in ends.items()}
    start, end = ends["logps/chosen"]
    if moved["logps/chosen"] < 0 and start - end > COLLAPSE * abs(start):
        evidence = [f"{went['logps/chosen']} {said}, {(start - end) / abs(start):.0%} below its start"]
        return Finding("preferences", "chosen answers collapse", evidence, [*_NEARER, _ANCHOR])
    gained = max(moved["rewards/margins"], 0.0)
    if moved["rewards/rejected"] < 0 and -moved["rewards/chosen"] > OF_MARGIN * gained > 0:
        evidence = [f"{went[name]} {said}" for name in ("rewards/chosen", "rewards/rejected")]
        evidence.append(f"the margin gained {gained:.3g}, from rejected answers that fell further and not chosen ones")
        return Finding("preferences", "both rewards fall", evidence, [_ANCHOR, *_NEARER])
    if gained and "rewards/accuracies" in ends and ends["rewards/accuracies"][1] < GUESS:
        evidence = [f"{went['rewards/margins']} {said}, and {ends['rewards/accuracies'][1]:.0%} of pairs are right"]
        evidence.append("a few pairs make the margin: guessing is right in half of them")
        return Finding("preferences", "margin without accuracy", evidence, list(_FAIRER))
    return None


_NAMES = (
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip
_ANCHOR = (
    "hold the chosen answers up: objective.sft_weight=1 (dpo), objective.cpo_alpha=1 (cpo), or loss_type=apo_zero, or "
    "objective.name=orpo"
)
_NEARER = (
    "lower train.learning_rate three- to tenfold, or train for fewer epochs",
    "stay nearer the reference: a higher objective.beta (0.3 to 0.5)",
)
_FAIRER = (
    "look at the pairs with tpu-tune data look: are the chosen answers better, and not only longer?",
    "objective.loss_type=ipo or sigmoid_norm, which count tokens and not answers' lengths",
    "objective.loss_type=robust with objective.label_smoothing=0.1, where labels are wrong in a tenth of the pairs",
)


def _ends(values: np.ndarray) -> tuple[float, float]:
    count = tail(len(values))
    return float(np.median(values[:count])), float(np.median(values[-count:]))


def _moved(values: np.ndarray) -> float:
    """By how much a curve has risen from its first points to its last ones; 0 where that is within its noise."""
    start, end = _ends(values)
    return end - start if abs(end - start) > 2 * noise_level(values) else 0.0
