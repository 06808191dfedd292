"""What is said of learning curves: the synthetic ones of a seed that nothing was tuned on, real runs, and each rule."""

import json
import math
import os
import pathlib
import subprocess
import sys

import curve_shapes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tpu_tune.curves.diagnosis import diagnose
from tpu_tune.curves.statistics import block_medians, mann_kendall, noise_level

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "curves"
REAL = {
    "underfit-flat": ("underfit", "flat"), "underfit-falling": ("underfit", "still falling"),
    "overfit": ("overfit", "eval loss has turned"), "unstable": ("unstable", "diverged"), "well-fit": ("well-fit", ""),
}  # fmt: skip


def rows(train, held_out=(), every=1, eval_every=None, rates=None):
    """Metrics rows of a training curve and of an evaluation curve over the same steps."""
    found = [{"step": (i + 1) * every, "loss": loss} for i, loss in enumerate(train)]
    if rates is not None:
        found = [{**row, "learning_rate": rate} for row, rate in zip(found, rates, strict=True)]
    eval_every = eval_every or len(train) * every // max(1, len(held_out))
    return found + [{"step": (i + 1) * eval_every, "eval_loss": loss} for i, loss in enumerate(held_out)]


def falling(count, constant, start=4.0, floor=2.0):
    return floor + (start - floor) * np.exp(-np.linspace(0, 1, count) / constant)


def noisy(values, level, seed=0):
    return values + level * np.random.default_rng(seed).standard_normal(len(values))


# --- the measure of the whole ----------------------------------------------------------------------------------------


def test_at_least_38_of_40_synthetic_curves_of_an_unseen_seed():
    assert curve_shapes.TEST_SEED not in curve_shapes.TUNING_SEEDS
    cases = curve_shapes.cases(curve_shapes.TEST_SEED)
    wrong = [f"{c.name}: {diagnose(c.rows).title}" for c in cases if diagnose(c.rows).verdict != c.verdict]
    assert len(cases) == 40 and len(wrong) <= 2, wrong
    named = " ".join(case.name for case in cases)
    assert all(word in named for word in ("restarted", "isolated spikes", "cosine", "12 points", "few train"))


def test_the_turn_is_found_where_it_was_put():
    turns = []
    for case in curve_shapes.cases(curve_shapes.TEST_SEED):
        found = diagnose(case.rows)
        if case.kind == "overfit" and found.verdict == "overfit":
            held_out = [row["step"] for row in case.rows if "eval_loss" in row]
            turns.append(abs(found.numbers["turn_step"] - case.turn) / (held_out[-1] / len(held_out)))
    assert len(turns) >= 8 and np.median(turns) <= 1 and max(turns) <= 4  # in evaluations


@pytest.mark.parametrize("name", REAL)
def test_real_runs(name):
    lines = (GOLDENS / f"{name}.jsonl").read_text().splitlines()
    found = diagnose([json.loads(line) for line in lines], vocab_size=264)
    verdict, reason = REAL[name]
    assert found.verdict == verdict and reason == found.reason, found
    assert found.evidence and found.advice


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_runs_made_anew(name, tmp_path, text_dir):
    script = GOLDENS.parents[2] / "benchmarks" / "diagnosis_runs.py"
    env = {**os.environ, "XLA_FLAGS": "", "JAX_DEFAULT_MATMUL_PRECISION": "default"}
    done = subprocess.run(
        [sys.executable, str(script), "--only", name, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    verdict, reason = REAL[name]
    assert f"== {name}: {verdict}{f' ({reason})' if reason else ''};" in done.stdout.splitlines()[-1]
    assert (tmp_path / "docs" / "images" / f"curves-{name}.png").stat().st_size < 100_000


# --- each rule -------------------------------------------------------------------------------------------------------


def test_flat_and_still_falling_are_told_apart():
    flat = diagnose(rows(noisy(np.full(60, 3.2), 0.05), noisy(np.full(6, 3.3), 0.005)))
    assert (flat.verdict, flat.reason) == ("underfit", "flat")
    assert "went from 3.2" in flat.evidence[0] and any("learning_rate" in line for line in flat.advice)
    rough = diagnose(rows(noisy(np.full(60, 3.2), 0.4)))
    assert (rough.verdict, rough.reason) == ("underfit", "flat and noisy")
    going = diagnose(rows(noisy(falling(60, 0.8), 0.03), falling(6, 0.8) + 0.1))
    assert (going.verdict, going.reason) == ("underfit", "still falling")
    truth = float(falling(3, 0.8)[-1] - (2 + 2 * math.exp(-2 / 3 / 0.8)))  # of the last third, without the noise
    assert going.numbers["last_third_fall"] == pytest.approx(-truth, rel=0.25)


def test_a_high_plateau_is_underfit_only_where_the_vocabulary_says_so():
    curve = rows(noisy(falling(60, 0.1, 10.8, 7.0), 0.05), falling(8, 0.1, 8.0, 7.1))
    assert diagnose(curve).verdict == "well-fit"
    high = diagnose(curve, vocab_size=32_000)  # log(32000) = 10.37
    assert (high.verdict, high.reason) == ("underfit", "flat and high") and "10.4" in high.evidence[0]


def test_a_loss_that_was_low_from_the_start_has_nothing_to_learn():
    curve = rows(noisy(np.full(60, 0.05), 0.002), np.full(6, 0.055))
    assert diagnose(curve).verdict == "well-fit"


def test_overfit_names_the_step_the_checkpoint_and_the_loss():
    steps = np.arange(1, 11)
    held_out = 2 + 0.02 * (steps - 4.0) ** 2  # lowest at the fourth evaluation, step 40
    curve = rows(noisy(falling(100, 0.5, 4, 0.5), 0.02), held_out)
    found = diagnose(curve, saved_steps=[20, 35, 60, 100])
    assert found.verdict == "overfit" and found.numbers["turn_step"] in (30, 40, 50)
    assert found.numbers["use_checkpoint"] == 35 and "use checkpoint 35" in found.advice[0]
    assert found.numbers["rise_percent"] == pytest.approx(100 * found.numbers["rise"] / found.numbers["turn_loss"])
    assert found.numbers["rise"] == pytest.approx(0.6, abs=0.15)
    assert diagnose(curve, saved_steps=[40]).advice[0].startswith("use checkpoint 40 (--step 40 of ")
    assert "train again with train.load_best_model_at_end" in diagnose(curve, saved_steps=[90]).advice[0]
    assert "holds the weights of step 40 already" in diagnose(curve, saved_steps=[90], keeps_best=True).advice[0]


def test_a_wide_gap_is_overfit_without_a_turn():
    found = diagnose(rows(noisy(falling(100, 0.4, 4, 0.3), 0.02), np.full(10, 2.5) + 0.3 * np.exp(-np.arange(10.0))))
    assert (found.verdict, found.reason) == ("overfit", "wide gap")


def test_well_fit_has_the_gap_in_numbers():
    found = diagnose(rows(noisy(falling(200, 0.08), 0.02), falling(10, 0.08) + 0.12))
    assert found.verdict == "well-fit"
    assert found.numbers["gap"] == pytest.approx(0.12, abs=3 * found.numbers["gap_error"])
    assert "generalization gap 0.12" in found.evidence[0]


def test_a_train_loss_above_the_evaluation_s_is_no_fault():
    found = diagnose(rows(noisy(falling(200, 0.08) + 0.3, 0.02), falling(10, 0.08)))
    assert (
        found.verdict == "well-fit" and found.numbers["gap"] < 0 and any("dropout" in line for line in found.evidence)
    )


def test_a_rate_that_decays_does_not_hide_that_it_still_falls():
    # In learning done (the integral of the rate) an exponential of half the run; in steps it is flat at its end.
    at = np.arange(1, 201) / 200
    rates = 1e-4 * 0.5 * (1 + np.cos(np.pi * at))
    spent = np.cumsum(rates) / rates.sum()
    losses = noisy(2 + 2 * np.exp(-spent / 0.5), 0.01)
    steps = losses[-1] - losses[150]
    assert abs(steps) < 0.05 * (losses[0] - losses[-1])  # what the eye sees at the end
    assert diagnose(rows(losses, rates=rates)).reason == "still falling"


@pytest.mark.parametrize("place", [0, 30, 59])
def test_single_jumps_change_no_verdict(place):
    curve = noisy(falling(60, 0.08), 0.02)
    curve[place] *= 4
    assert diagnose(rows(curve, falling(8, 0.08) + 0.1)).verdict == "well-fit"


def test_unstable_says_what_and_when():
    jumps = noisy(falling(100, 0.1), 0.02)
    jumps[[30, 50, 80]] *= 2.5
    found = diagnose(rows(jumps))
    assert (found.verdict, found.reason) == ("unstable", "spikes") and "steps 31, 51, 81" in found.evidence[0]
    up = noisy(falling(100, 0.1), 0.02)
    up[60:] += np.linspace(0, 3, 40)
    found = diagnose(rows(up), saved_steps=[25, 50, 75])
    assert (found.verdict, found.reason) == ("unstable", "diverged") and 40 <= found.numbers["floor_step"] <= 62
    assert found.advice[-1] in ("checkpoint 25 is from before it rose", "checkpoint 50 is from before it rose")
    lost = rows(noisy(falling(100, 0.1), 0.02))
    lost[70:] = [{**row, "loss": None} for row in lost[70:]]
    found = diagnose(lost)
    assert (found.verdict, found.reason) == ("unstable", "not finite") and "first at step 71" in found.evidence[0]
    dead = np.concatenate([[6, 5, 9, 25, 1e4, 4e6], np.full(94, 5.58)])  # diverged, and dead since
    assert (diagnose(rows(dead)).verdict, diagnose(rows(dead)).reason) == ("unstable", "diverged")


def test_one_lost_value_is_a_remark():
    curve = rows(noisy(falling(200, 0.08), 0.02), falling(10, 0.08) + 0.1)
    curve[20]["loss"] = None
    found = diagnose(curve)
    assert found.verdict == "well-fit" and any("no finite number at step 21" in line for line in found.evidence)


def test_left_out_updates_count():
    curve = rows(noisy(falling(200, 0.08), 0.02), falling(10, 0.08) + 0.1)
    curve[199]["skipped_steps"] = 6  # as float16's first ones
    found = diagnose(curve)
    assert found.verdict == "well-fit" and any("6 updates were left out" in line for line in found.evidence)
    curve[199]["skipped_steps"] = 40
    assert diagnose(curve).reason == "not finite" and "40 of 200 updates" in diagnose(curve).evidence[0]


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"note": "nothing"}],
        [{"step": 1, "loss": 2.0}],
        rows([3, 2.9, 2.8]),
        [{"step": 5, "eval_loss": 2.0}],
        rows(noisy(falling(50, 0.05), 0.01)),
        rows(noisy(falling(50, 0.05), 0.01), [2.1, 2.0]),
    ],
)
def test_too_few_points_are_said(metrics):
    found = diagnose(metrics)
    assert found.verdict == "not enough points" and found.evidence and found.advice


def test_a_restart_changes_nothing():
    losses = noisy(falling(100, 0.08), 0.02)
    whole = rows(losses, falling(10, 0.08) + 0.1)
    train = [row for row in whole if "loss" in row]
    # Killed at step 70, gone on from 60: ten steps are there twice, the later ones count.
    twice = train[:70] + [{**row, "loss": row["loss"]} for row in train[60:]] + whole[100:]
    assert diagnose(twice) == diagnose(whole)


def test_a_run_that_goes_on_is_not_blamed_for_falling():
    curve = rows(noisy(falling(60, 0.8), 0.03), falling(6, 0.8) + 0.1)
    found = diagnose(curve, total_steps=1000)
    assert not found.done and found.line().startswith("so far: still falling; train loss still falls")
    assert diagnose(curve, total_steps=60).line().startswith("diagnosis: underfit (still falling)")
    early = diagnose(rows(noisy(np.full(12, 3.0), 0.02)), total_steps=1000)
    assert early.verdict == "not enough points"
    # What a plateau would be blamed for is not said of a run that was judged to be too young.
    young = rows(noisy(np.array([11.4, 11.0] + [10.6] * 10), 0.02))
    assert diagnose(young, vocab_size=49152).reason == "flat and high"
    assert diagnose(young, vocab_size=49152, total_steps=1000).advice == early.advice
    assert early.advice == ("let the run go on",) and "nearly flat after 12 training losses" in early.line()


def test_the_result_is_ready_for_json():
    for kind in curve_shapes.VERDICTS:
        case = curve_shapes.make(kind, np.random.default_rng([7, len(kind)]))
        json.loads(json.dumps(diagnose(case.rows, [5], 100).as_dict(), allow_nan=False))


# --- laws -------------------------------------------------------------------------------------------------------------

losses = st.floats(1e-3, 1e6) | st.none() | st.just(math.nan) | st.just(math.inf)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), losses, st.booleans()), max_size=60), st.floats(0.01, 100))
def test_any_rows_have_a_verdict_that_no_order_and_no_time_scale_changes(points, scale):
    # One value a step and side: which of two comes last is the order's business.
    table = {(step, side): value for step, value, side in points}
    found = [{"step": s, ("eval_loss" if side else "loss"): v} for (s, side), v in table.items()]
    first = diagnose(found)
    assert diagnose(found[::-1]) == first
    longer = diagnose([{**row, "step": row["step"] * 10} for row in found])
    assert (longer.verdict, longer.reason) == (first.verdict, first.reason)


# --- the statistics, against SciPy ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=3, max_size=40))
def test_the_trend_has_the_sign_of_kendall_s_tau(values):
    x, y = np.arange(len(values), dtype=float) ** 1.5, np.array(values, float)
    tau = stats.kendalltau(x, y)
    assert np.sign(mann_kendall(y)) in (0, np.sign(np.nan_to_num(tau.statistic)))


def test_mann_kendall_is_normal_without_a_trend_and_known_with_one():
    random = np.random.default_rng(0)
    z = [mann_kendall(random.standard_normal(30)) for _ in range(400)]
    assert stats.kstest(z, "norm").pvalue > 0.01
    # S = 45, var = 10 * 9 * 25 / 18 = 125: Z = 44 / sqrt(125)
    assert mann_kendall(np.arange(10.0)) == pytest.approx(44 / math.sqrt(125))


def test_the_noise_level_is_the_noise_s_and_not_the_curve_s():
    level = noise_level(noisy(falling(2000, 0.2), 0.05))
    assert level == pytest.approx(0.05, rel=0.1)
    spiked = noisy(falling(2000, 0.2), 0.05)
    spiked[::50] *= 5
    assert noise_level(spiked) == pytest.approx(0.05, rel=0.25)
    assert noise_level(falling(30, 0.2)) == 0.0 and math.isnan(noise_level(np.ones(4)))


def test_block_medians_keep_short_series_and_thin_long_ones():
    x = np.arange(1000.0)
    at, values = block_medians(x, x, 100)
    assert len(at) == 100 and np.array_equal(at, values) and at[0] == 4.5
    assert block_medians(x[:50], x[:50], 100)[0] is not None and len(block_medians(x[:50], x[:50], 100)[0]) == 50


# --- preference runs -------------------------------------------------------------------------------------------------


def preferences(count=40, chosen=0.5, rejected=-1.0, accuracy=0.9, logps=-80.0, every=5, level=0.02):
    """Rows of a run whose rewards go from 0 to `chosen` and `rejected`, and whose chosen log-probability from -80."""
    found = rows(noisy(falling(count, 0.2, 0.69, 0.3), 0.01))
    way = 1 - np.exp(-np.linspace(0, 3, count))
    values = {
        "rewards/chosen": chosen * way, "rewards/rejected": rejected * way,
        "rewards/margins": (chosen - rejected) * way,
        "rewards/accuracies": 0.5 + (accuracy - 0.5) * way, "logps/chosen": -80 + (logps + 80) * way,
    }  # fmt: skip
    for name, curve in values.items():
        for row, value in zip(found[:count], noisy(curve, level), strict=True):
            row[name] = float(value)
        found += [
            {"step": found[place]["step"], "eval_loss": 0.4, f"eval_{name}": float(curve[place])}
            for place in range(every - 1, count, every)
        ]
    return found


@pytest.mark.parametrize("held_out", [True, False], ids=["held-out", "training"])
@pytest.mark.parametrize(
    ("ends", "reason", "advice"),
    [
        ({"logps": -130.0, "chosen": -5.0, "rejected": -9.0}, "chosen answers collapse", "lower train.learning_rate"),
        ({"chosen": -0.8, "rejected": -1.6}, "both rewards fall", "objective.sft_weight=1"),
        ({"accuracy": 0.52}, "margin without accuracy", "data look"),
    ],
)
def test_rewards_that_go_wrong_are_told_apart(ends, reason, advice, held_out):
    metrics = preferences(**ends)
    if not held_out:
        metrics = [row for row in metrics if "loss" in row]
    found = diagnose(metrics)
    assert (found.verdict, found.reason) == ("preferences", reason)
    assert advice in " ".join(found.advice)
    assert ("of held-out answers" if held_out else "in training") in found.evidence[0]


def test_rewards_that_part_are_no_fault():
    for ends in ({}, {"chosen": 0.3, "rejected": -0.2, "accuracy": 0.7}, {"chosen": -0.1, "rejected": -2.0}):
        found = diagnose(preferences(**ends), vocab_size=1000)
        assert found.verdict != "preferences", found.reason
        assert not any("tokens" in line for line in found.evidence)  # nobody guesses among tokens here
    assert diagnose(preferences(4)).verdict == "not enough points"
