"""Several sources in `data.train`: how many rows of each an epoch shows, which ones, and the loss of each.

`datasets.interleave_datasets` is the judge of the stopping rules.
"""

import json
import types
from collections import Counter

import datasets
import numpy as np
import pytest
from test_data_tokens import make_tokenizer

from tpu_tune import config as configuration
from tpu_tune.data import Batches, eval_batches, load_data, num_target_tokens
from tpu_tune.data.mixture import MixedRows, Source, check, rows_per_epoch, sources_of
from tpu_tune.data.pretokenize import tokenize_file
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.errors import UserError
from tpu_tune.training.evaluation import evaluate
from tpu_tune.training.opening import check_settings

NAMES = ("ash", "birch", "cedar")
SIZES = (40, 60, 200)
STOPS = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files; every answer names its file and its row."""
    folder = tmp_path_factory.mktemp("sources")
    for name, size in zip(NAMES, SIZES, strict=True):
        rows = [{"input": "Say", "output": f" {name} {number} {'x' * (number % 7)}"} for number in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(folder, entries, strategy="concat", **data):
    entries = [{**entry, "path": str(folder / f"{name}.jsonl")} for name, entry in zip(NAMES, entries, strict=False)]
    keys = {"max_length": 48, "packing": True, "eval_ratio": 0.0, "cache_dir": str(folder / "cache"), **data}
    config = configuration.from_dict({"data": {"train": entries, "mix_strategy": strategy, **keys}})
    return load_data(config, make_tokenizer())


def shown(tokenizer, batches, epoch):
    """What is said in each row of an epoch, as (file, row)."""
    said = []
    first = batches.steps(epoch)
    for step in range(first, batches.steps(epoch + 1)):
        batch = batches.batch(step)
        for ids, segments in zip(*(batch[key].reshape(-1, 48) for key in ("input_ids", "segment_ids")), strict=True):
            for segment in range(1, segments.max() + 1):
                said.append(tuple(tokenizer.decode(ids[segments == segment]).removesuffix("</s>").split()[1:3]))
    return said


def counts_of(said):
    return [Counter(name for name, _ in said)[name] for name in NAMES]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("weights", [(0.2, 0.2, 0.6), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("strategy", STOPS)
def test_shares_and_stopping_rules(folder, strategy, weights, packing):
    entries = [{"weight": weight} for weight in weights]
    data = load(folder, entries, strategy, packing=packing, max_length=48)
    batches = Batches(data.train, 2, 2, 7)
    said = shown(make_tokenizer(), batches, 0) if packing else None
    counts = counts_of(said) if packing else list(data.summary["train"].get("sources").values())
    assert counts == list(data.summary["train"]["sources"].values())
    judge = datasets.interleave_datasets(
        [datasets.Dataset.from_dict({"s": [name] * size}) for name, size in zip(NAMES, SIZES, strict=True)],
        probabilities=list(weights),
        seed=3,
        stopping_strategy=STOPS[strategy],
    )
    theirs = [Counter(judge["s"])[name] for name in NAMES]
    if strategy == "interleave_once":
        assert counts == theirs == list(SIZES)
        return
    total = sum(counts)
    assert all(abs(count / total - weight) < 0.01 for count, weight in zip(counts, weights, strict=True))
    # The source whose end ends the epoch is shown whole; no other is under, and every other is over.
    ended = [n for n in range(3) if counts[n] == SIZES[n]]
    assert len(ended) == 1
    is_right = np.less_equal if strategy == "interleave_under" else np.greater_equal
    assert is_right(counts, SIZES).all() and is_right(theirs, SIZES).all()
    assert abs(sum(theirs) / total - 1) < 0.35  # theirs are drawn, and end where the draw says
    for epoch in range(3 if packing else 0):
        most = Counter(shown(make_tokenizer(), batches, epoch))
        for name, count, size in zip(NAMES, counts, SIZES, strict=True):
            times = [most[name, str(row)] for row in range(size)]
            assert min(times) == count // size and max(times) == -(-count // size)


def test_without_weights_sources_take_turns(folder):
    for strategy, stop in STOPS.items():
        judge = datasets.interleave_datasets(
            [datasets.Dataset.from_dict({"s": [name] * size}) for name, size in zip(NAMES, SIZES, strict=True)],
            stopping_strategy=stop,
        )
        theirs = [Counter(judge["s"])[name] for name in NAMES]
        assert rows_per_epoch([Source("a", "a")] * 3, SIZES, strategy) == theirs


def test_counts_are_exact_and_every_epoch_draws_anew(folder):
    tokenizer = make_tokenizer()
    data = load(folder, [{}, {"count": 25}, {"count": 250}])
    assert isinstance(data.train, MixedRows)
    batches = Batches(data.train, 2, 2, 7)
    epochs = [shown(tokenizer, batches, epoch) for epoch in range(4)]
    for said in epochs:
        assert counts_of(said) == [40, 25, 250]
        assert {row for row in said if row[0] == "ash"} == {("ash", str(row)) for row in range(40)}
    of_birch = [{row for name, row in said if name == "birch"} for said in epochs]
    assert all(len(rows) == 25 for rows in of_birch)  # none twice in an epoch, also where the source begins again
    of_cedar = [Counter(row for name, row in said if name == "cedar") for said in epochs]
    assert all(len(times) == 200 and max(times.values()) == 2 for times in of_cedar)
    assert len(of_birch[0] | of_birch[1]) == 50  # none twice before all were shown
    assert len(set.union(*of_birch)) == 60


def test_a_step_is_a_pure_function_of_seed_and_step(folder):
    one, other = (Batches(load(folder, [{}, {"count": 25}, {"count": 30}]).train, 2, 1, 7) for _ in range(2))
    last = one.steps(3) - 1
    before = {step: one.batch(step) for step in range(last + 1)}
    for step in (last, 3, 0, one.steps(1), one.steps(2) - 1):  # in any order, by a process that has seen nothing
        for name, array in other.batch(step).items():
            np.testing.assert_array_equal(array, before[step][name])
    seeded = Batches(load(folder, [{}, {"count": 25}, {"count": 30}], data_seed=8).train, 2, 1, 8)
    assert any((seeded.batch(step)["input_ids"] != before[step]["input_ids"]).any() for step in range(3))
    assert one.steps(2.5) == one.steps(2) + -(-(one.steps(3) - one.steps(2)) // 2)


def test_all_rows_of_several_sources_are_those_of_one_folder(folder):
    plain = load(folder, [{}, {}, {}])
    assert not isinstance(plain.train, MixedRows)
    keys = {"max_length": 48, "eval_ratio": 0.0, "cache_dir": str(folder / "cache")}
    whole = configuration.from_dict({"data": {"train": str(folder), **keys}})
    one, other = (Batches(data.train, 2, 2, 7).batch(3) for data in (plain, load_data(whole, make_tokenizer())))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_every_source_is_held_out_of_and_has_its_loss(folder):
    data = load(folder, [{}, {"name": "trees"}, {"count": 10}], eval_ratio=0.2)
    assert {name: len(rows.documents) for name, rows in data.eval_parts.items()} == {"ash": 8, "trees": 12, "cedar": 40}
    assert len(data.eval.documents) == 60
    held = {int(row) for rows in data.eval_parts.values() for row in rows.data.source_rows[rows.documents]}
    trained = {int(row) for epoch in range(3) for row in data.train.data.source_rows[data.train.epoch(epoch).documents]}
    assert not held & trained
    worth = {"ash": 1.0, "trees": 2.0, "cedar": 4.0}  # a loss that is the source's own

    def batches(name=""):
        for batch in eval_batches(data.eval_part(name), 4):
            yield {**batch, "name": name}

    steps = types.SimpleNamespace(
        objective=types.SimpleNamespace(is_likelihood=True, unit="tokens"),
        put_batch=lambda batch, leading: batch,
        evaluate=lambda trainable, frozen, batch: {
            "loss": (worth[batch["name"]] * num_target_tokens(batch), num_target_tokens(batch))
        },
    )
    session = types.SimpleNamespace(data=data, model=types.SimpleNamespace(frozen={}), eval_batches=batches)
    found = evaluate(steps, {}, session)
    assert {name: found[f"eval_{name}_loss"] for name in worth} == worth
    tokens = {name: sum(map(num_target_tokens, eval_batches(rows, 4))) for name, rows in data.eval_parts.items()}
    assert found["eval_num_tokens"] == sum(tokens.values())
    assert found["eval_loss"] == pytest.approx(sum(worth[n] * tokens[n] for n in worth) / sum(tokens.values()))
    named = load(folder, [{}], eval=[str(folder / "birch.jsonl"), {"path": str(folder / "cedar.jsonl"), "name": "c"}])
    assert list(named.eval_parts) == ["birch", "c"]


def test_tokenized_files_mix_too(folder, tmp_path):
    tokenizer = make_tokenizer()
    options = TokenizeOptions(format="auto", max_length=48)
    for name in NAMES[:2]:
        tokenize_file(folder / f"{name}.jsonl", tmp_path / f"{name}.arrow", tokenizer, options)
    entries = [str(tmp_path / "ash.arrow"), {"path": str(tmp_path / "birch.arrow"), "count": 7}]
    config = configuration.from_dict({"data": {"train": entries, "max_length": 48, "eval_ratio": 0.0}})
    said = shown(tokenizer, Batches(load_data(config, tokenizer).train, 2, 2, 7), 1)
    assert counts_of(said) == [40, 7, 0]


def test_pairs_mix_with_the_same_rows_in_every_epoch(tmp_path):
    for name in NAMES[:2]:
        rows = [{"prompt": f"{name} {n}", "chosen": " yes", "rejected": " no"} for n in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": [str(tmp_path / "ash.jsonl"), {"path": str(tmp_path / "birch.jsonl"), "count": 4}]}
    config = {"objective": {"name": "dpo"}, "data": {**data, "max_length": 64, "cache_dir": str(tmp_path)}}
    found = load_data(configuration.from_dict(config), make_tokenizer())
    assert found.train.data.roles[found.train.documents].tolist() == [1, 2] * (len(found.train.documents) // 2)
    assert found.summary["train"]["sources"] == {"ash": 8, "birch": 4} and set(found.eval_parts) == {"ash", "birch"}


@pytest.mark.parametrize(
    ("train", "strategy", "says"),
    [
        ([], "concat", "data.train is an empty list"),
        ([{"weight": 1}], "concat", "data.train entry 1 has no path"),
        (["a", {"path": "b", "wieght": 1}], "concat", "data.train entry 2 has the unknown key 'wieght'; known: path"),
        ([{"path": "b", "weight": -1}], "interleave_under", "the weight is -1; it must be a number"),
        ([{"path": "b", "count": 0.5}], "concat", "the count is 0.5; it must be a whole number"),
        ([{"path": "b", "count": 1, "weight": 1}], "concat", "has a weight and a count; give one of them"),
        ([{"path": "b", "weight": 1}], "concat", "set data.mix_strategy=interleave_under or interleave_over"),
        ([{"path": "b", "count": 1}], "interleave_over", "gives counts, which data.mix_strategy=interleave_over"),
        ([{"path": "b", "weight": 1}, "a"], "interleave_over", "gives some sources a weight, and a none"),
        ([{"path": "b", "weight": 0}], "interleave_under", "all weights are 0"),
        ([{"path": "b", "weight": 0}, {"path": "a", "weight": 1}], "interleave_over", "a weight of 0 never does"),
        ([{"path": "b", "name": "x"}, {"path": "a", "name": "x"}], "concat", "two sources have the name 'x'"),
    ],
)
def test_what_makes_no_mixture_is_one_line(train, strategy, says):
    with pytest.raises(UserError, match=says):
        check_settings({"data": {"train": train, "mix_strategy": strategy}})


def test_a_list_on_the_command_line_is_json_and_a_path_stays_a_path(folder):
    config = configuration.default()
    for path in ("rows.jsonl", "a,b.jsonl", "rows"):
        configuration.assign(config, "data.train", path)
        assert config.data.train == path and sources_of(path)[0].path == path
    configuration.assign(config, "data.train", '["a.jsonl", {"path": "b.jsonl", "weight": 0.5}]')
    assert configuration.source_paths(config.data.train) == ["a.jsonl", "b.jsonl"]
    assert [source.name for source in sources_of(["x/train.jsonl", "y/train.jsonl"])] == ["train", "train_2"]
    check(sources_of(str(folder)), "concat")
    with pytest.raises(UserError, match="data.max_train_samples is of one source; give each of several a count"):
        load(folder, [{}, {}], max_train_samples=3)
