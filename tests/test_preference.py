"""Objectives of answers to judge, against TRL's trainers: stored losses by `make_preference_goldens.py`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import helpers_preference as preference
import helpers_training as helpers
import jax
import numpy as np
import pytest

import tpu_tune
from tpu_tune.data import Batches, PackedRows, load_data
from tpu_tune.data.preference_rows import preference_rows
from tpu_tune.errors import UserError
from tpu_tune.training import loop, reference
from tpu_tune.training import preference_losses as losses
from tpu_tune.training.opening import check_settings
from tpu_tune.training.preference_settings import unbalanced
from tpu_tune.training.prepare_steps import prepare_evaluation, prepare_scoring

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens" / "preference.json").read_text())
IN_CI = ("dpo/lora", "kto/full")
RUNS = [case for case in GOLDEN if not case.startswith("type/")]
CASES = [case if case in IN_CI else pytest.param(case, marks=pytest.mark.slow) for case in RUNS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"))


# --- the mathematics -------------------------------------------------------------------------------------------------

CHOSEN, REJECTED, CHOSEN_0, REJECTED_0, TOKENS = -10.0, -14.0, -11.0, -12.0, (4.0, 5.0)
RATIOS = losses.Ratios(*map(np.float32, (CHOSEN - CHOSEN_0, REJECTED - REJECTED_0, *TOKENS)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "sigmoid": 0.5543552, "hinge": 0.7, "ipo": 18.9225, "sigmoid_norm": 0.6611752, "apo_zero": 0.9251868,
        "robust": 0.5168552,
    }.items(),
)  # fmt: skip
def test_losses_of_dpo_by_hand(kind: str, expected: float) -> None:
    assert float(losses.DPO[kind](RATIOS, 0.1, 0.1)) == pytest.approx(expected, rel=2e-6)


def test_losses_of_the_others_by_hand() -> None:
    means = np.float32(CHOSEN / TOKENS[0]), np.float32(REJECTED / TOKENS[1])
    odds = losses.log_odds_ratio(*means)
    assert float(odds) == pytest.approx(0.3229129, rel=1e-5)
    assert -0.1 * float(jax.nn.log_sigmoid(odds)) == pytest.approx(0.0544669, rel=1e-5)
    assert float(losses.cpo("simpo", *means, 2.0, 0.0, 0.5)) == pytest.approx(0.6443967, rel=1e-5)
    found = losses.kto("kto", np.float32([1, -2]), np.array([True, False]), np.float32(0.5), 0.1, (1.0, 1.0))
    np.testing.assert_allclose(found, [0.4875026, 0.4378235], rtol=1e-6)


@pytest.fixture(scope="module")
def against_another(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Twelve pairs measured by one model, with another's log-probabilities as the reference."""
    folder = tmp_path_factory.mktemp("other")
    other = preference.write_other(tiny, folder / "other")
    config = preference.settings(tiny, folder, "full", objective={"name": "dpo", "reference": str(other)})
    model, _ = helpers.prepare(config, 1)
    data = reference.add_reference(preference.datasets("dpo", 12), config, 4, None, model.mesh)
    score = prepare_scoring(config, model)
    batches = [data.train.take(np.arange(start, start + 4)) for start in range(0, 12, 4)]
    return model, batches, [np.asarray(score(batch)) for batch in batches]


@pytest.mark.parametrize("kind", [kind for kind in preference.TYPES if kind != "mpo"])
def test_every_loss_type_is_trl_s(against_another: Any, kind: str) -> None:
    _, batches, sums = against_another
    settings = preference.TYPES[kind]
    found = []
    for batch, log_probs in zip(batches, sums, strict=True):
        ratios = log_probs - batch["document_reference"]
        counts = np.stack([[np.sum((s == d) & (t != -100)) for d in (1, 2)] for s, t in _rows(batch)])
        pairs = losses.Ratios(ratios[:, 0], ratios[:, 1], *counts.T.astype(np.float32))
        found.append(np.mean(losses.DPO[kind](pairs, 0.1, settings.get("label_smoothing", 0.0))))
    np.testing.assert_allclose(found, GOLDEN[f"type/{kind}"]["loss"], rtol=1e-4)


def _rows(batch: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(batch["segment_ids"], batch["targets"], strict=True)


def test_a_list_of_loss_types_adds_up_as_in_trl(
    against_another: Any, tiny: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, batches, _ = against_another
    config = preference.settings(tiny, tmp_path, "full", objective={"name": "dpo", **preference.TYPES["mpo"]})
    steps = prepare_evaluation(config, model)
    for batch, expected in zip(batches, GOLDEN["type/mpo"]["loss"], strict=True):
        total, weight = steps.evaluate(model.trainable, model.frozen, steps.put_batch(batch, 0))["loss"]
        assert float(np.sum(np.asarray(total) / np.asarray(weight))) == pytest.approx(expected, rel=1e-4)
        assert weight[0] == 4


@pytest.mark.parametrize("case", CASES)
def test_thirty_steps_follow_trl(tiny: pathlib.Path, tmp_path: pathlib.Path, case: str) -> None:
    name, method = case.split("/")
    rows = preference.run(name, method, tiny, tmp_path)
    for key, expected in GOLDEN[case].items():
        found = np.array([row[key] for row in rows])
        if name == "simpo" and key == "nll_loss":  # TRL writes 0, having no use for it; here it is what it is
            assert not any(expected) and found.min() > 0
            continue
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.nanmax(np.abs(expected)), err_msg=key)
    assert rows[-1]["loss"] < rows[0]["loss"]


# --- rows, accumulation, devices -------------------------------------------------------------------------------------


def test_packed_pairs_equal_pairs_alone(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Also on eight devices, with the tokens cut over two of them, and accumulated in two parts of different weight."""
    objective = {"name": "orpo"}
    alone = preference.datasets("orpo", 16).train
    packed = preference.datasets("orpo", 16, packing=True).train
    assert len(packed) < 8 and packed.slots >= 6
    keys = {"train__per_device_train_batch_size": 16, "lora__rank": 2}
    config = preference.settings(tiny, tmp_path, objective=objective, **keys)
    initial = {k: v + 0.02 for k, v in preference.initial_adapter(helpers.prepare(config, 1)[0].trainable).items()}
    model, steps = helpers.prepare(config, 1, initial=initial)
    _, (expected,) = helpers.run_steps(model, steps, [helpers.window(alone.take(np.arange(16)), 1)])
    keys |= {"mesh__data": 2, "mesh__fsdp": 2, "mesh__sequence": 2, "train__per_device_train_batch_size": 1}
    config = preference.settings(tiny, tmp_path, objective=objective, train__gradient_accumulation_steps=2, **keys)
    model, steps = helpers.prepare(config, 1, devices=8, initial=initial)
    numbers = np.concatenate([np.arange(len(packed)), np.full(8 - len(packed), -1)])
    _, (found,) = helpers.run_steps(model, steps, [helpers.window(packed.take(numbers), 2)])
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_mismatched_answers_are_trl_s(tmp_path: pathlib.Path) -> None:
    """Each prompt has the answer of the row before it in its group; what a row has no room for is cut."""
    data = preference.answers(5)
    rows = preference_rows(data, np.arange(5), preference.WIDTH, packing=False, group=2)
    texts = preference.single(5)
    for row, other in enumerate((1, 0, 3, 2, 4)):
        batch = rows.take(np.array([row]))
        second = batch["input_ids"][0, batch["segment_ids"][0] == 2]
        assert bytes(second[:-1].astype(np.uint8)).decode() == texts[row]["prompt"] + texts[other]["completion"]
        assert list(batch["document_roles"][0]) == [1 if texts[row]["label"] else 2, 3]
    assert list(rows.documents) == [0, 1, 2, 3, 4]
    width = int(data.lengths.max()) + 12
    short = preference_rows(data, np.arange(5), width, packing=True, group=2)
    assert short.width == width and set(short.documents) == {0, 1, 2, 3, 4}


def test_groups_stay_together_in_every_order() -> None:
    rows = preference.datasets("kto", 11, group=4).train
    batches = Batches(rows, 8, 1, data_seed=3, block=4)
    for step in range(4):
        for group in batches.row_numbers(step).reshape(2, 4):
            if len(there := group[group >= 0]):
                assert there[0] % 4 == 0 and list(there) == list(range(there[0], there[0] + len(there)))
    epoch = np.concatenate([batches.row_numbers(step).reshape(-1) for step in range(batches.steps_per_epoch)])
    assert sorted(epoch[epoch >= 0]) == list(range(11))


# --- the reference ---------------------------------------------------------------------------------------------------


def test_a_reference_pass_that_was_killed_goes_on(
    tiny: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "PIECE_SECONDS", 0.0)
    config = preference.settings(tiny, tmp_path, objective={"name": "dpo"})
    model, _ = helpers.prepare(config, 1)
    data = preference.datasets("dpo", 12)

    def values(folder: str) -> np.ndarray:
        config.data.cache_dir = str(tmp_path / folder)
        return reference.add_reference(data, config, 4, model, model.mesh).train.reference

    whole = values("whole")
    write, written = reference._Store.write, []

    def killed(self: Any, examples: np.ndarray, values: np.ndarray) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(self, examples, values)
        written.append(len(examples))

    monkeypatch.setattr(reference._Store, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        values("killed")
    monkeypatch.setattr(reference._Store, "write", lambda self, examples, values: written.append(len(examples)))
    np.testing.assert_array_equal(values("killed"), whole)
    assert written == [8, 8, 8]  # a third was left to compute
    monkeypatch.setattr(reference._Store, "write", write)
    assert not np.isnan(values("killed")).any()
    damaged = next((tmp_path / "whole").rglob("*.npz"))
    damaged.write_bytes(b"half a file")
    np.testing.assert_array_equal(values("whole"), whole)


def test_train_writes_what_users_watch(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """From a file of rows to metrics and a cached reference, which a second run of the same data does not compute."""
    lines = [json.dumps(row) + "\n" for row in preference.texts(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    keys = {
        "data__train": str(tmp_path / "pairs.jsonl"), "data__eval_ratio": 0.25, "data__num_workers": 1,
        "train__max_steps": 3, "train__logging_steps": 1, "data__packing": True, "train__save_strategy": "no",
        "train__per_device_train_batch_size": 1, "mesh__fsdp": -1,
    }  # fmt: skip
    config = preference.settings(tiny, tmp_path, objective={"name": "dpo"}, **keys)
    said: list[str] = []
    run = loop.train(config, said.append)
    assert any(line.startswith("reference: log-probabilities of") for line in said)
    train = [row for row in run.metrics if "loss" in row]
    assert {*preference.METRICS} <= train[0].keys() and train[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert train[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    held_out = next(row for row in run.metrics if "eval_loss" in row)
    assert held_out["eval_num_pairs"] == 6 and held_out["eval_rewards/margins"] > 0
    assert "eval_perplexity" not in held_out
    said.clear()
    config = preference.settings(tiny, tmp_path, objective={"name": "dpo"}, **keys)
    data = load_data(config, tpu_tune.load(str(tiny)).tokenizer, 264)
    found = reference.add_reference(data, config, 4, None, None, said.append)  # no model, no devices
    assert not said and not np.isnan(found.train.reference[found.train.documents]).any()


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "dpo", "loss_type": "sigmiod"}, "unknown objective.loss_type 'sigmiod' of dpo; did you mean 'sigm"),
        ({"name": "simpo", "cpo_alpha": 0.5}, "for CPO-SimPO set objective.name=cpo with objective.loss_type=simpo"),
        ({"name": "sft", "beta": 0.2}, "objective.beta is not read by objective.name=sft; it belongs to dpo, orpo"),
        ({"name": "orpo", "reference": "x"}, "objective.reference is not read by objective.name=orpo"),
        ({"name": "dpo", "loss_type": "exo_pair"}, "needs an objective.label_smoothing above 0"),
        ({"name": "dpo", "label_smoothing": 0.1}, "not read by loss type sigmoid of dpo; it belongs to robust and exo"),
        ({"name": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 loss types"),
        ({"name": "cpo", "loss_type": ["sigmoid", "ipo"]}, "cpo has one loss type, not 2; only dpo adds several"),
        ({"name": "cpo", "simpo_gamma": 1.0}, "belongs to objective.loss_type=simpo"),
        ({"name": "kto"}, "set train.per_device_train_batch_size to 2 or more"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(objective: dict[str, Any], message: str) -> None:
    keys = {f"objective__{key}": value for key, value in objective.items()}
    config = helpers.make_config(train__per_device_train_batch_size=1, **keys)
    with pytest.raises(UserError, match=message):
        check_settings(config, with_data=False)


def test_answers_that_weigh_too_much_are_said() -> None:
    roles = np.array([1] * 30 + [2] * 10)
    config = helpers.make_config(objective__name="kto")
    (line,) = unbalanced(config, roles)
    assert "30 desirable and 10 undesirable" in line and "desirable_weight between 0.33 and 0.44" in line
    config.objective.undesirable_weight = 2.5
    assert not unbalanced(config, roles) and not unbalanced(config, np.array([1, 2]))


def test_plain_rows_carry_nothing_of_pairs() -> None:
    data = preference.pairs(2)
    data.roles = None
    rows = PackedRows(data, preference.datasets("dpo", 2).train.packing)
    assert not any(name.startswith("document_") for name in rows.take(np.arange(2)))
