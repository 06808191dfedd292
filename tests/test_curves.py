"""`curves.png` and `tpu-tune curves`: series, smoothing, what is read of a run directory, and users' mistakes."""

import json

import numpy as np
import pandas as pd
import pytest
from helpers_training import make_config, train_process, write_rows, write_tiny_llama

from tpu_tune.cli import main
from tpu_tune.curves.comparison_plot import plot_runs
from tpu_tune.curves.run_plot import plot_curves
from tpu_tune.curves.runs import read_run, read_runs
from tpu_tune.curves.series import QUANTITIES, ema, panel, series, smoothing_window
from tpu_tune.curves.statistics import smooth
from tpu_tune.curves.terminal import sparkline
from tpu_tune.errors import UserError


def rows(count):
    train = [{"step": s, "loss": 3 / s + 1, "learning_rate": 1e-4, "grad_norm": 1.0} for s in range(1, count + 1)]
    return train + [{"step": s, "eval_loss": 2.0} for s in range(10, count + 1, 10)]


@pytest.mark.parametrize("count", [0, 1, 2, 15, 200])
def test_any_number_of_points_gives_a_picture(tmp_path, count):
    metrics = rows(count) + [{"step": 5, "loss": None}, {"step": 6, "loss": float("nan")}, {"note": "no step"}]
    plot_curves(metrics, tmp_path / "curves.png", "a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]


def test_series_are_ordered_and_finite():
    steps, values = series([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 3, "loss": None}], "loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [2, 1]


def test_smoothing_follows_a_line_and_keeps_a_spike_out():
    line = np.linspace(3, 1, 100)
    np.testing.assert_allclose(smooth(line, 9), line)  # centred: no lag, ends included
    spiked = line.copy()
    spiked[50] = 90.0
    assert np.abs(smooth(spiked, 9) - line).max() < 0.05


def test_a_smoothed_loss_does_not_lag_into_seeming_overfit():
    """Training and evaluation have one and the same true loss, so neither smoothed line may leave the other's side."""
    steps = np.arange(200)
    truth = 2 + 2 * np.exp(-steps / 60)
    train = truth + 0.05 * np.random.default_rng(0).standard_normal(200)
    for place in (slice(0, 20), slice(20, 180), slice(180, 200)):
        error = (smooth(train, smoothing_window(200)) - truth)[place]
        assert abs(error.mean()) < 0.015  # a third of the noise
    fast = 2 + 4 * np.exp(-np.arange(100) / 3)  # most of the fall is in the first points
    error = smooth(fast, smoothing_window(100)) - fast
    assert np.abs(error).max() < 0.15 and abs(error[0]) < 1e-9
    lagged = ema(train, 0.9) - truth
    assert lagged[20:180].mean() > 0.08  # what it was: the average of the past is above a falling loss


@pytest.mark.parametrize(("count", "beta", "window"), [(200, 0.9, 19), (1000, 0.99, 199), (30, 0.9, 5), (200, 0.0, 1)])
def test_the_window_leaves_as_much_noise_as_an_exponential_average(count, beta, window):
    assert smoothing_window(count, beta) == window  # (1 + beta) / (1 - beta), at most a fifth of the curve
    if count > 100 and window > 1:
        noise = np.random.default_rng(0).standard_normal(20_000)
        plain = np.convolve(noise, np.full(window, 1 / window), "valid")
        assert plain.std() == pytest.approx(ema(noise, beta)[1000:].std(), rel=0.15)


# --- series ----------------------------------------------------------------------------------------------------------


def test_a_step_that_is_there_twice_has_its_last_value():
    steps, values = series([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 5.0}], "loss")
    assert steps.tolist() == [1, 2] and values.tolist() == [5, 2]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_smoothing_is_pandas_ewm(beta):
    values = np.random.default_rng(0).standard_normal(50).cumsum()
    np.testing.assert_allclose(ema(values, beta), pd.Series(values).ewm(alpha=1 - beta, adjust=True).mean())


def test_other_axes():
    metrics = [
        {"step": 10, "epoch": 0.5, "loss": 3.0, "num_tokens": 1000},
        {"step": 20, "epoch": 1.0, "loss": 2.0, "num_tokens": 3000},
        {"step": 15, "epoch": 0.75, "eval_loss": 2.5},
        {"step": 5, "epoch": 0.25, "eval_loss": 3.5},
    ]
    assert series(metrics, "loss", "tokens")[0].tolist() == [1000, 3000]
    assert series(metrics, "eval_loss", "tokens")[0].tolist() == [500, 2000]  # between rows that have a count
    assert series(metrics, "eval_loss", "epochs")[0].tolist() == [0.25, 0.75]
    with pytest.raises(UserError, match="no 'num_tokens'.*--x steps"):
        series([{"step": 1, "loss": 2.0}], "loss", "tokens")


def test_perplexity_is_the_exponential_of_the_loss():
    metrics = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0}]
    (perplexity,) = [quantity for quantity in QUANTITIES if quantity.name == "perplexity"]
    assert [panel(metrics, perplexity, side)[1].tolist() for side in ("train", "eval")] == [[np.exp(2)], [np.exp(3)]]


def test_sparklines():
    assert sparkline(np.arange(8.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.arange(1000.0), 8) == "▁▂▃▄▅▆▇█" and sparkline(np.ones(3), 5) == "▁▁▁  "


# --- run directories -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    metrics = [{**row, "epoch": row["step"] / 10, "num_tokens": 5 * row["step"]} for row in rows(60)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return place


def told(capsys, *words):
    """Run a command that a user got wrong; return the one line it prints."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


def test_a_metrics_file_cut_in_the_middle_of_a_line_loses_only_that_line(capsys, run):
    file = run / "metrics.jsonl"
    cut = file.read_bytes()[:-15]
    file.write_bytes(cut)
    assert main(["curves", str(run)]) == 0
    text = capsys.readouterr().out
    assert text.count("the last line of metrics.jsonl is cut off and was left out") == 1 and "diagnosis: " in text
    assert len(read_run(run).metrics) == len(cut.splitlines()) - 1
    assert file.read_bytes() == cut  # and nothing of the file


def test_a_broken_line_in_the_middle_is_named(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[6] = lines[6][:9]
    lines[7] = '"no object"'
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = read_run(run)
    assert found.notes == ["line 7 and 1 more of metrics.jsonl cannot be read and was left out"]
    assert len(found.metrics) == len(lines) - 2


def test_what_a_user_gets_wrong_is_one_line(capsys, tmp_path, run):
    (tmp_path / "empty").mkdir()
    assert "no metrics.jsonl in it" in told(capsys, "curves", tmp_path / "empty")
    assert "there is no such run directory" in told(capsys, "curves", tmp_path / "nothing")
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "lo')
    assert "holds no row with a loss (the last line" in told(capsys, "curves", run, tmp_path / "empty")
    assert "--smooth is 1;" in told(capsys, "curves", run, "--smooth", 1)
    assert "is a directory; name a file" in told(capsys, "curves", run, "--html", tmp_path)
    assert "cannot be written" in told(capsys, "curves", run, "--output", tmp_path / "no" / "x.png")


def test_a_broken_config_or_summary_is_a_note(run):
    (run / "config.json").write_text("{")
    (run / "summary.json").write_text("[1]")
    (run / "checkpoints" / "40").mkdir(parents=True)
    (run / "checkpoints" / "40.tmp").mkdir()
    found = read_run(run)
    assert found.notes == [f"{name}.json cannot be read and was left out" for name in ("config", "summary")]
    assert found.config == found.summary == {}
    assert found.saved_steps == [40]


def test_runs_of_one_name_are_called_by_their_paths(run, tmp_path):
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    (other / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    assert [found.name for found in read_runs([run, other])] == [str(run), str(other)]
    assert [found.name for found in read_runs([run, other / "metrics.jsonl"])] == ["run", "metrics.jsonl"]


@pytest.mark.parametrize("x", ["steps", "tokens", "epochs"])
def test_several_runs_over_each_other(capsys, run, tmp_path, x):
    words = [
        "curves",
        run,
        run / "metrics.jsonl",
        "--x",
        x,
        "--output",
        tmp_path / "c.png",
        "--html",
        tmp_path / "r.html",
    ]
    assert main([*map(str, words), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [found["run"] for found in facts["runs"]] == [str(run), str(run / "metrics.jsonl")]
    assert facts["runs"][0]["diagnosis"] == facts["runs"][1]["diagnosis"] == read_run(run).diagnosis().as_dict()
    assert facts["runs"][0]["figures"]["eval loss"]["last"] == 2.0
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "r.html").read_text()
    assert (
        "run, train" in text and "metrics.jsonl, train" in text and f">{x.rstrip('s') if x != 'tokens' else x}<" in text
    )


def test_a_picture_of_nothing_but_evaluations(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "eval_loss": 2.0}\n')
    plot_runs([read_run(tmp_path)], tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()


# --- while it trains -------------------------------------------------------------------------------------------------


def test_training_says_how_it_goes_and_leaves_a_report_with_answers(tmp_path):
    config = make_config(
        output_dir=str(tmp_path / "run"),
        model__path=str(write_tiny_llama(tmp_path / "model")),
        model__dtype="float32",
        data__train=str(write_rows(tmp_path / "rows.jsonl")),
        data__max_length=32,
        data__cache_dir=str(tmp_path / "cache"),
        data__num_workers=1,
        train__max_steps=8,
        train__eval_steps=4,
        train__logging_steps=1,
        train__learning_rate=1e-2,
        train__save_strategy="no",
        train__sample_prompts=["a tiny", "<model>"],
    )
    done = train_process(config, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("so far: not enough points (training)") == 1  # at step 4; what ends a run is said once
    assert done.stdout.count("diagnosis: ") == 1 and f"report: {tmp_path / 'run' / 'report.html'}" in done.stdout
    report = (tmp_path / "run" / "report.html").read_text()
    found = read_run(tmp_path / "run")
    assert [row["prompt"] for row in found.samples] == ["a tiny", "<model>"]
    assert all(row["before"] and row["after"] for row in found.samples)
    assert found.samples[0]["before"] != found.samples[0]["after"]
    assert "&lt;model&gt;" in report and f"{found.summary['parameters']:,}" in report
    assert found.summary["total_steps"] == 8 and found.summary["vocab_size"] == 264
    assert found.summary["data"]["train"]["format"] == "prompt-completion"
    assert 50e6 < found.summary["host_peak_bytes"] < 100e9


def test_nothing_about_curves_ends_a_run(tmp_path, caplog):
    from tpu_tune.curves import callbacks

    on_evaluate = callbacks.on_evaluate(str(tmp_path / "no" / "directory"))
    assert on_evaluate([{"step": "one", "loss": [3]}]) or caplog.records  # neither a place to draw in nor rows to judge
    assert callbacks.on_train_end(str(tmp_path)) == [] and "no report was written" in caplog.text
