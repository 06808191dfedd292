"""Schedules against torch transformers at every step, and against numbers that need no torch."""

import importlib.util

import jax
import numpy as np
import pytest

from tpu_tune.errors import UserError
from tpu_tune.training.schedules import SCHEDULES, make_schedule, warmup_length

CASES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_restarts", {"num_cycles": 2.5}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 3e-6}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.05}),
    ("warmup_stable_decay", {"num_decay_steps": 20}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 20, "num_stable_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"},
    ),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 30, "warmup_type": "cosine", "decay_type": "linear", "min_lr_ratio": 0.1},
    ),
]


def at_all(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(np.arange(steps)), np.float64)


@pytest.mark.parametrize("warmup", [0, 13])
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_every_step_equals_transformers(name, kwargs, warmup):
    torch = pytest.importorskip("torch")
    from transformers.optimization import get_scheduler

    peak, total = 3e-4, 101
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    reference = get_scheduler(name, optimizer, warmup, total, dict(kwargs))
    wanted = []
    for _ in range(total + 4):
        wanted.append(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()
    got = at_all(make_schedule(name, peak, total, warmup, **kwargs), total + 4)
    np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=1e-6 * peak)


def test_all_of_transformers_pure_schedules_are_here():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("transformers.optimization needs torch")
    from transformers.trainer_utils import SchedulerType

    assert {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"} == set(SCHEDULES)


def test_goldens_without_torch():
    cosine = make_schedule("cosine", 1.0, 1000, 64)
    steps, wanted = [0, 1, 63, 64, 532, 1000], [0, 0.015625, 0.984375, 1.0, 0.5, 0]
    np.testing.assert_allclose([cosine(step) for step in steps], wanted, atol=1e-6)
    linear = make_schedule("linear", 2e-4, 30, warmup_ratio=0.1)
    np.testing.assert_allclose([linear(s) for s in (0, 3, 30, 40)], [0, 2e-4, 0, 0], atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_first_update_with_warmup_is_exactly_zero(name):
    assert float(make_schedule(name, 1e-3, 50, 5)(0)) == 0.0


def test_warmup_length():
    assert warmup_length(100, 0, 0.031) == 4  # rounded up
    assert warmup_length(100, 7, 0.5) == 7  # steps win


def test_mistakes_are_named():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        make_schedule("cosin", 1e-4, 10)
    with pytest.raises(UserError, match="'greedy' is not supported"):
        make_schedule("greedy", 1e-4, 10)
    for kwargs, says in (
        ({"pace": 1}, "'pace' is not a setting of 'reduce_lr_on_plateau'"),
        ({"mode": "max"}, "mode is 'max'; it must be min"),
        ({"factor": 1.5}, "factor is 1.5; it must be below 1"),
        ({"patience": "two"}, "patience is 'two'; it must be a number"),
    ):
        with pytest.raises(UserError, match=says):
            make_schedule("reduce_lr_on_plateau", 1e-4, 10, **kwargs)
    with pytest.raises(UserError, match="'cycles' is not a setting of 'cosine' .*num_cycles"):
        make_schedule("cosine", 1e-4, 10, cycles=2)
    with pytest.raises(UserError, match="min_lr"):
        make_schedule("cosine_with_min_lr", 1e-4, 10)
    with pytest.raises(UserError, match="num_decay_steps"):
        make_schedule("warmup_stable_decay", 1e-4, 10)
