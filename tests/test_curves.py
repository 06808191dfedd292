"""`curves.png`: drawn from many rows, few, and none."""

import numpy as np
import pytest

from tpu_tune.curves.plot import plot_curves, smooth
from tpu_tune.curves.series import series


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
