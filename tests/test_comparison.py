"""`tpu-tune curves A B`: which run is better, by how much against the noise, in what they differ, and what to try."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from helpers_training import make_config

from tpu_tune import config as configuration
from tpu_tune.cli import main
from tpu_tune.curves.comparison import Comparison, beside, compare
from tpu_tune.curves.runs import CurveRun

NOISE = 0.01


def run(name: str, floor: float, steps: int = 200, seed: int = 0, eval_every: int = 10, **keys: Any) -> CurveRun:
    """A run whose losses level off at `floor`, with noise; `vocab_size` and `rows_per_step` go into its summary."""
    random = np.random.default_rng(seed)
    summary = {key: keys.pop(key) for key in ("vocab_size", "rows_per_step") if key in keys}
    constant = keys.pop("constant", 30)
    truth = floor + 2 * np.exp(-np.arange(1, steps + 1) / constant)
    rows = [
        {"step": step, "loss": float(truth[step - 1] + 5 * NOISE * random.standard_normal())}
        for step in range(1, steps + 1)
    ]
    for step in range(eval_every, steps + 1, eval_every) if eval_every else ():
        rows.append({"step": step, "eval_loss": float(truth[step - 1] + NOISE * random.standard_normal())})
    config = configuration.to_dict(make_config(data__train="rows.jsonl", **keys))
    return CurveRun(name, f"runs/{name}", rows, config, {"total_steps": steps, "vocab_size": 264, **summary})


def compared(*runs: CurveRun) -> Comparison:
    return compare(runs, [one.diagnosis() for one in runs])


def test_the_better_run_is_named_with_the_difference_and_the_noise():
    low, high = run("low", 2.0), run("high", 2.2, seed=1, train__learning_rate=1e-3, train__save_steps=7)
    found = compared(high, low)
    assert found.better == "low" and found.noise == pytest.approx(NOISE * np.sqrt(2), rel=0.6)
    difference = found.losses[0] - found.losses[1]
    assert difference == pytest.approx(0.2, abs=4 * NOISE)
    assert found.title.startswith("better: low; eval loss ") and f"{difference:.3g} (9" in found.title
    assert f"{difference / found.noise:.3g} times the noise ({found.noise:.2g})" in found.title
    assert found.differences == {"train.learning_rate": [1e-3, 5e-5]}  # what is saved when changes nothing
    assert "they differ in train.learning_rate: 0.001 | 5e-05" in found.evidence


def test_what_chance_does_is_no_difference():
    wrong = [
        seed
        for seed in range(40)
        if compared(run("a", 2.0, seed=seed), run("b", 2.0, seed=seed + 100, lora__rank=4)).better
    ]
    assert len(wrong) <= 3, wrong
    found = compared(run("a", 2.0), run("b", 2.0, seed=7, lora__rank=4))
    assert found.title.startswith("no difference beyond the noise between ")
    assert any("repeat both with other seeds" in text for text in found.advice)


def test_runs_that_differ_in_seeds_alone_say_how_large_the_noise_is():
    first, again = run("first", 2.0), run("again", 2.1, seed=1)
    again.config["seed"] = 7
    other = run("other", 1.95, seed=2, lora__rank=4)
    assert compared(first, other).better == "other"
    found = compared(first, again, other)
    assert not found.better and found.noise == pytest.approx(0.1 / np.sqrt(2), rel=0.2)
    assert any("is chance" in text for text in compared(first, again).advice)


def test_losses_of_other_rows_are_not_compared():
    plain = run("plain", 2.0)
    for keys in ({"data__data_seed": 1}, {"data__eval_ratio": 0.1}, {"data__max_length": 64}, {"vocab_size": 300}):
        found = compared(plain, run("other", 3.0, **keys))
        assert not found.better and found.title.startswith("cannot be compared: "), keys
        (advice,) = found.advice
        assert "tpu-tune eval --model runs/plain --against runs/other --data FILE" in advice
    # With evaluation rows of their own, how the training rows were chosen does not matter.
    both = [run(name, floor, data__eval="eval.jsonl", **keys) for name, floor, keys in (
        ("plain", 2.0, {}), ("other", 3.0, {"data__eval_ratio": 0.1}))]  # fmt: skip
    assert compared(*both).better == "plain"


def test_runs_of_different_lengths_are_compared_where_the_shorter_ends_too():
    short, long = run("short", 2.0, steps=40), run("long", 1.9, steps=200, train__num_train_epochs=9.0)
    found = compared(short, long)
    assert found.better == "long"
    (line,) = [text for text in found.evidence if text.startswith("at step 40, where the shortest ends: ")]
    assert "short 2.5" in line and "long 2.4" in line
    assert "let short go on before it is given up: its loss still falls" in found.advice


def test_without_evaluations_the_training_losses_are_compared_with_a_warning():
    found = compared(run("a", 2.0, eval_every=0), run("b", 2.3, eval_every=0, lora__rank=4))
    assert found.better == "a" and "train loss at the end" in found.evidence[0]
    assert "a lower training loss may be overfit" in found.advice[0]


@pytest.mark.parametrize(
    ("better", "worse", "said"),
    [
        ({"train__learning_rate": 1e-4}, {"train__learning_rate": 5e-5}, "go on the same way, to 0.0002"),
        ({"lora__rank": 32}, {"lora__rank": 4}, "lora.rank=32 is better than 4: go on the same way, to 96"),
        ({"lora__use_dora": True}, {}, "lora.use_dora=True is better than False: keep it"),
        ({"lora__rank": 4, "train__weight_decay": 0.1}, {}, "2 keys differ, so which of them made good better"),
    ],
)
def test_the_advice_goes_on_from_the_better_run(better, worse, said):
    found = compared(run("good", 2.0, **better), run("bad", 2.4, seed=1, **worse))
    assert any(said in text for text in found.advice), found.advice


def test_a_rate_that_blew_up_bounds_the_next_one():
    wild = run("wild", 2.0, train__learning_rate=1e-2)
    for row in wild.metrics:
        if row["step"] > 120:
            row["loss" if "loss" in row else "eval_loss"] += 8.0
        elif "eval_loss" in row:
            row["eval_loss"] += 0.5
    found = compared(run("calm", 2.1, train__learning_rate=1e-4), wild)
    assert found.better == "calm"
    assert any("is unstable" in text or "wild unstable" in text for text in found.advice)
    assert any("try 0.001 between" in text for text in found.advice)


def test_a_runs_own_advice_knows_what_the_other_has_tried():
    runs = [
        run("slow", 2.0, constant=150, train__learning_rate=1e-4),
        run("fast", 2.6, constant=150, train__learning_rate=3e-4),
    ]
    diagnoses = [one.diagnosis() for one in runs]
    assert any("raise train.learning_rate" in text for text in diagnoses[0].advice)
    told = beside(runs, diagnoses)
    assert any("(fast has train.learning_rate=0.0003, and its loss is 0.6" in text and "higher)" in text
               for text in told[0].advice), told[0].advice  # fmt: skip
    assert told[1].advice == diagnoses[1].advice  # nobody has tried a higher one
    assert beside(runs[:1], diagnoses[:1]) == diagnoses[:1]


def test_the_command_and_the_report_say_it(capsys, tmp_path: pathlib.Path):
    for one in (run("one", 2.0), run("two", 2.3, seed=1, lora__rank=4)):
        (tmp_path / one.name).mkdir()
        (tmp_path / one.name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one.metrics))
        (tmp_path / one.name / "config.json").write_text(json.dumps(one.config))
    words = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert main(["curves", *words, "--html", str(tmp_path / "r.html")]) == 0
    out, page = capsys.readouterr().out, (tmp_path / "r.html").read_text()
    assert "comparison: better: one; eval loss" in out and "smoothed over 19 points" in out
    assert "better: one; eval loss" in page and "lora.rank: 8 | 4" in page
    assert main(["curves", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["comparison"]
    assert told["better"] == "one" and told["differences"] == {"lora.rank": [8, 4]}
    assert main(["curves", words[0]]) == 0
    assert "comparison:" not in capsys.readouterr().out
