"""The learning-rate finder and the hint: on quadratics, on synthetic losses, and on a tiny model against a sweep."""

import json
import math
import os
import pathlib
import re

import numpy as np
import pytest
from helpers_training import make_config, run_steps, write_rows, write_tiny_llama

from tpu_tune import config as configuration
from tpu_tune.cli import main
from tpu_tune.curves.learning_rate import find as finding
from tpu_tune.curves.learning_rate import plot
from tpu_tune.curves.learning_rate import trials as tr
from tpu_tune.curves.learning_rate.bracket import bracket
from tpu_tune.curves.learning_rate.hint import NewHints, hint_of, rate_hint
from tpu_tune.curves.learning_rate.range_test import ramp, range_test, suggest
from tpu_tune.curves.series import ema
from tpu_tune.errors import UserError
from tpu_tune.training.prepare_steps import prepare_steps

CURVATURE = np.geomspace(0.01, 1, 20)  # of the quadratic: gradient descent diverges above a rate of 2


def descend(rates, noise=0.4):
    """Yield the losses of noisy gradient descent on a quadratic; batches' losses differ by `noise` of the loss."""
    batches, gradients, place = np.random.RandomState(0), np.random.RandomState(1), np.ones_like(CURVATURE)
    for rate in rates:
        with np.errstate(over="ignore", invalid="ignore"):
            yield (1 + 0.5 * np.sum(CURVATURE * place**2)) * np.exp(noise * batches.randn())
            place = place - rate * (CURVATURE * place + 0.05 * gradients.randn(len(place)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The configuration of a tiny run whose output_dir does not exist."""
    directory = tmp_path_factory.mktemp("lr")
    return make_config(
        model__path=str(write_tiny_llama(directory / "model")),
        data__train=str(write_rows(directory / "rows.jsonl", 120)),
        data__cache_dir=str(directory),
        data__num_workers=1,
        data__max_length=64,
        data__eval_ratio=0.1,
        model__dtype="float32",
        model__remat="none",
        train__per_device_train_batch_size=2,
        train__max_steps=30,
        train__lr_scheduler_type="cosine",
        train__warmup_ratio=0.1,
        output_dir=str(directory / "out"),
        method="full",
    )


@pytest.fixture(scope="module")
def trials(tiny):
    return tr.open_trials(tiny)


@pytest.fixture(scope="module")
def said():
    """The lines of `found`."""
    return []


@pytest.fixture(scope="module")
def found(trials, said):
    return finding.find_with(trials, finding.FinderOptions(steps=30), said.append)


def rows_of(trials, rate, every=10):
    """Return metrics rows of a run, as training writes them."""
    rows, rates = [], tr.scheduled(trials, rate, trials.total)
    for step, (loss, state) in enumerate(tr.train(trials, rates), start=1):
        rows.append({"step": step, "loss": loss, "learning_rate": rates[step - 1]})
        if step % every == 0:
            rows.append({"step": step, "eval_loss": tr.held_out_loss(trials, state)})
    return rows


# --- the range test -------------------------------------------------------------------------------------------------
def test_smoothing_is_the_bias_corrected_mean():
    values = np.array([3.0, 1.0, 2.0])
    weights = [0.8**2, 0.8, 1]
    assert ema(values, 0.8)[-1] == pytest.approx(np.dot(weights, values) / sum(weights))
    np.testing.assert_allclose(ema(np.full(20, 2.5), 0.8), 2.5)


def test_a_quadratic_suggestion_is_near_the_best_of_a_sweep():
    rates = ramp(1e-6, 1e3, 60)
    untrained = list(descend(np.zeros(60)))
    suggestion = suggest(range_test(descend(rates), rates, untrained))
    sweep = {rate: list(descend(np.full(60, rate), noise=0))[-1] for rate in np.geomspace(1e-4, 1e2, 25)}
    best = min((loss, rate) for rate, loss in sweep.items() if math.isfinite(loss))[1]
    assert best / 10 < suggestion.rate < best * 10
    assert suggestion.low <= suggestion.rate <= suggestion.high
    for factor, verdict in ((1e3, "too high"), (1, None), (1e-3, "too low")):
        run = np.full(12, suggestion.rate * factor)
        hint = rate_hint(range(12), list(descend(run, noise=0.005)), run)
        assert (hint and hint.verdict) == verdict


def test_divergence_ends_the_test_and_no_more_is_asked_for():
    asked = []

    def losses():
        for step, loss in enumerate([2.0] * 5 + [1.0] * 5 + [50.0] * 50):
            asked.append(step)
            yield loss

    test = range_test(losses(), ramp(1e-5, 1, 60), np.full(60, 2.0))
    assert test.end == "diverged" and len(test.rates) == len(asked) < 15
    test = range_test(iter([2.0, 1.9, float("nan"), 1.0]), ramp(1e-5, 1, 60), np.full(60, 2.0))
    assert test.end == "not finite" and len(test.losses) == 3


def test_batches_that_differ_do_not_hide_the_fall():
    hard = np.random.RandomState(3).uniform(1, 6, 60)
    share = np.concatenate([np.ones(20), np.linspace(1, 0.7, 20), np.full(10, 0.7), np.linspace(0.8, 6, 10)])
    test = range_test(iter(hard * share), ramp(1e-6, 1, 60), hard)
    suggestion = suggest(test)
    np.testing.assert_allclose(test.smoothed[:20], hard.mean())
    assert test.rates[25] < suggestion.rate < test.rates[49]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (np.full(60, 2.0), "did not fall up to"),
        ([2.0, float("nan")], "diverged at once"),
        ([2.0] * 9 + [90.0], "had not fallen before"),
    ],
)
def test_losses_that_speak_for_no_rate(losses, said):
    with pytest.raises(UserError, match=said):
        suggest(range_test(iter(losses), ramp(1e-5, 1, 60), np.full(60, 2.0)))


def test_short_runs_shrink_with_the_range_test():
    assert [finding.FinderOptions(steps=steps).short_runs[0] for steps in (10, 16, 30, 60, 200)] == [4, 4, 7, 15, 15]


def test_a_bad_length_is_refused_before_anything_is_loaded(config_file, monkeypatch, capsys):
    from tpu_tune.cli import lr_find

    monkeypatch.setattr(lr_find, "join_hosts", lambda: pytest.fail("it went on to JAX"))
    assert main(["lr-find", "--config", str(config_file), "--steps", "3"]) == 1
    assert "a range test needs 10 steps at least" in capsys.readouterr().err


# --- the bracket ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("best", [1e-5, 3e-4, 1e-3, 7e-3, 0.3])
def test_the_bracket_keeps_the_best(best):
    taken = []

    def run(rate, steps):
        taken.append((rate, steps))
        off = math.log10(rate / best)
        return (1.5 + off**2 + 5 / steps if off < 1.5 else math.nan), {}

    rate, scores = bracket(run, 1e-4, 1e-2, 60)
    assert best / 1.8 <= rate <= best * 1.8
    assert [(score.learning_rate, score.steps) for score in scores] == taken
    rounds = [[score for score in scores if score.round == number] for number in (1, 2, 3)]
    assert [part[0].steps for part in rounds] == [15, 30, 60]
    assert len(rounds[0]) >= 5 and [len(part) for part in rounds[1:]] == [3, 2]


def test_a_bracket_that_only_runs_away():
    with pytest.raises(UserError, match="every rate from .* lower bracket"):
        bracket(lambda rate, steps: (math.inf, {}), 1e-4, 1e-2, 60)


# --- the hint -------------------------------------------------------------------------------------------------------
def falling(count, noise, seed, first=3.0, last=1.7, halved=0.1):
    """Return the losses of a good run: falling fast, then slower."""
    way = np.arange(count) / count
    random = np.random.RandomState(seed)
    return (last + (first - last) * 0.5 ** (way / halved)) * np.exp(noise * random.randn(count))


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15, 0.4])
@pytest.mark.parametrize("count", [12, 60, 400])
def test_good_runs_get_no_hint(count, noise):
    rates = np.minimum(1, np.arange(count) / (0.1 * count)) * 1e-3
    for seed in range(25):
        assert rate_hint(range(count), falling(count, noise, seed), rates) is None


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.15, 0.4])
def test_runs_that_explode_climb_or_swing_are_too_high(noise):
    random, rates = np.random.RandomState(1), np.full(60, 1e-2)
    wild = np.exp(noise * random.randn(60))
    exploded = np.concatenate([[2.5], np.full(59, 11.0)]) * wild
    climbed = np.concatenate([np.full(30, 2.0), np.linspace(2, 9, 30)]) * wild
    swinging = np.concatenate([np.full(20, 2.5), 2.5 + 1.5 * (-1) ** np.arange(40)]) * np.exp(0.02 * random.randn(60))
    lost = np.where(np.arange(60) > 50, np.nan, 2.0)
    for losses in (exploded, climbed, swinging, lost)[2 * (noise > 0.2) :]:  # nobody could tell the first two
        assert rate_hint(range(60), losses, rates).verdict == "too high"
    for losses in (exploded, climbed):
        assert str(rate_hint(range(60), losses, rates)).count("too low") == 0


REAL = json.loads((pathlib.Path(__file__).parent / "goldens" / "learning_rates.json").read_text())


@pytest.mark.parametrize("rate", REAL)
def test_real_runs_of_smollm2(rate):
    """Runs of benchmarks/lr_find.py, asked at each evaluation: the suggested rate, far ones, and two others."""
    rows, verdict = REAL[rate]["rows"], REAL[rate]["verdict"]
    hints = [hint_of(rows[: at + 1]) for at, row in enumerate(rows) if "eval_loss" in row]
    said = {hint.verdict for hint in hints if hint is not None}
    assert said == ({verdict} if verdict else set())


def test_a_flat_run_is_too_low_where_noise_lets_it_be_seen():
    def flat(noise, count):
        return 2.5 * np.exp(noise * np.random.RandomState(5).randn(count))

    assert rate_hint(range(60), flat(0.01, 60), np.full(60, 1e-7)).verdict == "too low"
    assert rate_hint(range(60), flat(0.4, 60), np.full(60, 1e-7)) is None  # nobody could tell
    hint = rate_hint(range(60), flat(0.4, 60), np.full(60, 1e-7), [18, 36, 54], [2.756, 2.7558, 2.7555])
    assert hint.verdict == "too low" and "2.7560 at step 18, 2.7555 at step 54" in str(hint)
    good = falling(60, 0.05, 0)
    assert rate_hint(range(60), good, np.full(60, 1e-3), [40, 50, 60], [1.71, 1.709, 1.708]) is None


def test_no_hint_during_warmup_nor_from_few_points():
    flat = np.full(60, 2.5)
    assert rate_hint(range(60), flat, np.linspace(0, 1e-7, 60)) is None
    assert rate_hint(range(5), flat[:5], np.full(5, 1e-7)) is None
    assert rate_hint([], [], []) is None


def test_a_hint_is_said_once_from_metrics_rows():
    tell = NewHints()
    rows = [{"step": step, "loss": 2.5, "learning_rate": 1e-8} for step in range(1, 21)]
    lost = [{"step": 21, "loss": None, "learning_rate": 1e-8}, {"step": 22, "loss": None, "learning_rate": None}]
    said = [tell(all_rows) for all_rows in ([*rows, {"step": 20, "eval_loss": None}], rows, [*rows, *lost])]
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [
        " the learning rate looks too low",
        "",
        " the learning rate looks too high",
    ]


# --- a model --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_tiny_models_suggestion_against_a_sweep_and_its_hints(trials, found):
    rate = found.suggestion.rate
    ends = {factor: rows_of(trials, rate * factor) for factor in (0.1, 0.3, 1, 3, 10, 1e3)}
    last = {factor: rows[-1]["eval_loss"] for factor, rows in ends.items()}
    assert 0.1 <= min(last, key=last.get) <= 10
    assert last[1] < 1.15 * min(last.values())
    assert hint_of(ends[1]) is None
    assert hint_of(ends[1e3]).verdict == "too high"
    assert not os.path.exists(trials.session.config.output_dir)


def test_it_says_beforehand_what_it_does_and_how_long_that_takes(found, said):
    assert said[0].startswith("a range test of 30 updates, then 3 runs of 7 updates (up to 3 more where the best")
    assert re.match(
        r"this takes about \d\w*, at most \d\w* with 3 more runs \(estimated from 4 forward passes", said[1]
    )
    assert [line.partition(":")[0] for line in said[2:4]] == ["range test", "range test"]


def test_the_reason_derives_the_rate(found):
    reason, rates = found.suggestion.reason, sorted(run.learning_rate for run in found.runs)
    tested = suggest(found.test).rate
    assert f"{tested:.1e}, which the range test takes. Around it, of {len(rates)} runs of 7 updates" in reason
    assert re.search(rf"the one at {found.suggestion.rate:.1e} ends with(in 1% of)? the lowest eval loss", reason)
    assert all(f"{run.learning_rate:.1e}: {run.score:.4g}" in reason for run in found.runs)
    assert rates[0] <= tested <= rates[-1]


def test_every_trial_begins_alike_and_follows_the_schedule(trials, tiny):
    first, again = ([loss for loss, _ in tr.train(trials, [0.1, 0.1, 0.1])] for _ in range(2))
    assert first == again and first[2] != first[0]
    untrained = tr.untrained_losses(trials, 3)
    assert first[0] == pytest.approx(untrained[0], rel=1e-5)
    still = [loss for loss, _ in tr.train(trials, [0.0, 0.0, 0.0])]
    np.testing.assert_allclose(still, untrained, rtol=1e-5)
    rates = tr.scheduled(trials, 2e-3, 20)  # warm-up of two, then half a cosine
    expected = [0, 1e-3, *(2e-3 * 0.5 * (1 + np.cos(np.pi * np.arange(18) / 18)))]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_losses_are_those_of_the_run_itself(trials, tiny):
    steps = prepare_steps(trials.session.config, trials.session.model, 4)
    rates = tr.scheduled(trials, trials.session.config.train.learning_rate, 4)
    state, batches = steps.initial_state, [trials.session.batches.batch(step) for step in range(4)]
    _, rows = run_steps(trials.session.model, steps, batches, state)
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in tr.train(trials, rates)], rel=1e-6)


def test_the_picture_has_the_regions(found, tmp_path):
    figure = plot.draw(found, tmp_path / "lr.png", "tiny")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    low, high = found.suggestion.low, found.suggestion.high
    for axes in figure.axes:
        left, right = axes.get_xlim()
        assert left < low <= found.suggestion.rate <= high < right
        shaded = {patch.get_label(): patch for patch in axes.patches}
        ends = {name: (patch.get_x(), patch.get_x() + patch.get_width()) for name, patch in shaded.items()}
        assert ends == {
            name: pytest.approx(pair)
            for name, pair in {"too low": (left, low), "good": (low, high), "too high": (high, right)}.items()
        }
        assert {text.get_text() for text in axes.texts} == {"too low", "good", "too high"}
        legend = axes.get_legend()
        assert {text.get_text() for text in legend.get_texts()} >= {"suggested"}
        figure.draw_without_rendering()
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())  # it hides nothing


# --- the command ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def config_file(tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("config") / "tiny.py"
    values = json.dumps(configuration.to_dict(tiny))
    file.write_text(
        "import json\nfrom tpu_tune import config\n\n"
        f"def get_config():\n    return config.from_dict(json.loads({values!r}))\n"
    )
    return file


def test_the_command_brackets_and_leaves_a_run_as_it_is(config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    (run / "config.json").write_text("{}")
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")}
    words = [
        "lr-find",
        "--config",
        str(config_file),
        f"--config.output_dir={run}",
        "--bracket",
        "1e-3,1e-1",
        "--steps",
        "16",
    ]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 1e-3 <= told["learning_rate"] <= 1e-1 and told["scored_by"] == "eval_loss"
    assert {run["steps"] for run in told["runs"]} == {4, 8, 16} and "range_test" not in told
    assert {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in run.rglob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr.png", "run"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min", "1e-2", "--max", "1e-3"], "--min 0.01, --max 0.001: the second must be the larger one"),
        (["--min", "0"], "--min 0: a learning rate must be above zero"),
        (["--steps", "9"], "a range test needs 10 steps at least"),
        (["--bracket", "1e-3"], "--bracket 1e-3: give two rates, lowest first"),
        (["--bracket", "1e-3,1e-4"], "the second must be the larger one"),
        (["--bracket", "1e-4,1e-3", "--steps", "12"], "--steps 12: "),
        (["--output", "/no/such/place/lr.png"], "there is no directory /no/such/place"),
        (["--config.model.path=/no/model"], "/no/model"),
    ],
)
def test_a_mistake_is_one_line(config_file, words, said, capsys):
    assert main(["lr-find", "--config", str(config_file), *words]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
