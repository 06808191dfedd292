"""Packing, the order of rows, and `load_data` from files to batches."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tpu_tune import config as configuration
from tpu_tune.data import Batches, PackedRows, eval_batches, load_data, num_target_tokens, prefetch, training_sets
from tpu_tune.data import cache as cache_module
from tpu_tune.data.packing import one_per_row, pack
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import TokenizedSet
from tpu_tune.data.training_sets import split_rows
from tpu_tune.errors import UserError


def make_set(lengths, seed=0):
    """Documents whose tokens are all different, with a random loss mask."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    mask = np.random.default_rng(seed).random(total) < 0.7
    mask[offsets[:-1]] = False
    return TokenizedSet(np.arange(1, total + 1, dtype=np.int32), mask, offsets, np.arange(len(lengths)), {})


# --- packing


def test_packing_golden_of_trl():
    # trl.pack_dataset(strategy="bfd") on lengths 5, 2, 3, 1 (tokens 1 to 11) at 4 tokens a row.
    packing = pack([5, 2, 3, 1], 4)
    rows = PackedRows(make_set([5, 2, 3, 1]), packing).take(np.arange(3))
    assert [row[row > 0].tolist() for row in rows["input_ids"]] == [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 2], [1, 1, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0]]


def slow_best_fit(lengths, width):
    """Best-fit decreasing by looking at every row each time."""
    rows, room = [], []
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[document]]
        if fitting:
            row = min(fitting, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(document)
        room[row] -= lengths[document]
    return rows


lengths_and_width = st.integers(4, 40).flatmap(
    lambda width: st.tuples(st.lists(st.integers(1, width), min_size=1, max_size=60), st.just(width))
)


@settings(deadline=None)
@given(lengths_and_width)
def test_laws_of_packing(case):
    lengths, width = case
    data, packing = make_set(lengths), pack(lengths, width)
    rows = PackedRows(data, packing)
    # As many rows, equally full, as the slow best fit (which row takes a document may differ between equal ones).
    slow = slow_best_fit(lengths, width)
    filled = np.add.reduceat(np.asarray(lengths)[packing.documents], packing.offsets[:-1]).tolist()
    assert sorted(filled) == sorted(sum(lengths[d] for d in row) for row in slow)
    batch = rows.take(np.arange(len(rows)))
    ids, targets, segments = batch["input_ids"], batch["targets"], batch["segment_ids"]
    assert ids.shape == (len(rows), width) and all(array.dtype == np.int32 for array in batch.values())
    assert sorted(ids[segments > 0].tolist()) == data.tokens.tolist()  # every token exactly once
    assert not ids[segments == 0].any() and not batch["positions"][segments == 0].any()
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for i in range(len(rows)):
        used = segments[i] > 0
        count = used.sum()
        assert used[:count].all()  # padding comes last
        steps = np.diff(segments[i, :count])
        assert segments[i, 0] == 1 and set(steps.tolist()) <= {0, 1}  # contiguous, from 1
        for t in range(count):
            own = document_of[ids[i, t] - 1]
            assert batch["positions"][i, t] == ids[i, t] - 1 - data.offsets[own]
            following = ids[i, t]  # tokens are numbered from 1, so this is the next token's index
            inside = following < data.offsets[own + 1]
            wanted = ids[i, t] + 1 if inside and data.loss_mask[following] else -100
            assert targets[i, t] == wanted
    assert (targets[segments == 0] == -100).all()
    assert num_target_tokens(batch) == data.loss_mask.sum()


def test_packing_is_tight_and_repeats():
    lengths = np.random.default_rng(0).integers(1, 2049, 200_000)
    packing = pack(lengths, 2048)
    assert lengths.sum() / (len(packing) * 2048) > 0.99
    again = pack(lengths, 2048)
    assert np.array_equal(packing.documents, again.documents) and np.array_equal(packing.offsets, again.offsets)


@pytest.mark.parametrize(
    ("lengths", "max_length", "width"), [([3, 70], 2048, 128), ([3, 64], 2048, 64), ([3, 70], 100, 100), ([], 128, 64)]
)
def test_plain_padding(lengths, max_length, width):
    packing = one_per_row(np.asarray(lengths), max_length)
    assert packing.width == width and len(packing) == len(lengths)
    rows = PackedRows(make_set(lengths), packing).take(np.arange(len(lengths)))
    assert (rows["segment_ids"].sum(1) == np.asarray(lengths, int)).all()


# --- order


def make_batches(count, batch_rows=4, accumulation=2, seed=7):
    return Batches(PackedRows(make_set([3] * count), one_per_row(np.full(count, 3), 8)), batch_rows, accumulation, seed)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 9, 16, 203])
@pytest.mark.parametrize(("batch_rows", "accumulation"), [(4, 2), (5, 1), (1, 1), (3, 4)])
def test_every_epoch_is_a_permutation(count, batch_rows, accumulation):
    batches = make_batches(count, batch_rows, accumulation)
    steps = batches.steps_per_epoch
    assert steps == int(np.ceil(np.ceil(count / batch_rows) / accumulation))  # Hugging Face's Trainer
    orders = []
    for epoch in range(2):
        numbers = [batches.row_numbers(epoch * steps + step).reshape(-1) for step in range(steps)]
        assert all(len(part) == accumulation * batch_rows for part in numbers)
        flat = np.concatenate(numbers)
        orders.append(flat[flat >= 0])
        assert sorted(orders[-1].tolist()) == list(range(count))
        assert (np.diff((flat >= 0).astype(int)) <= 0).all()  # what is missing is missing at the end
    if count > 8:
        assert not np.array_equal(*orders)


def test_the_guides_partial_batch():
    assert make_batches(203, batch_rows=5, accumulation=1).steps_per_epoch == 41


def test_a_batch_depends_on_seed_epoch_and_step_only():
    first, second = make_batches(30), make_batches(30)
    forwards = [first.batch(step)["input_ids"] for step in range(12)]
    backwards = [second.batch(step)["input_ids"] for step in reversed(range(12))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not np.array_equal(forwards[0], make_batches(30, seed=8).batch(0)["input_ids"])


def test_order_golden():
    # Fixed for good: a resumed run must see the order that another version of this package has begun.
    batches = make_batches(10, 5, 2, seed=42)
    assert batches.row_numbers(0).tolist() == [[3, 7, 1, 5, 6], [8, 2, 4, 9, 0]]
    assert batches.row_numbers(1).tolist() == [[9, 3, 6, 4, 8], [7, 2, 1, 0, 5]]


def test_the_last_batch_is_filled_with_rows_without_weight():
    batches = make_batches(5)
    batch = batches.batch(0)
    assert {array.shape for array in batch.values()} == {(2, 4, 8)}
    assert (batch["segment_ids"].reshape(8, 8)[5:] == 0).all() and (batch["targets"].reshape(8, 8)[5:] == -100).all()
    assert (batch["input_ids"].reshape(8, 8)[5:] == 0).all()
    assert num_target_tokens(batch) == batches.rows.data.loss_mask.sum()


def test_eval_batches_are_in_order_and_full():
    rows = make_batches(5).rows
    parts = list(eval_batches(rows, 2))
    assert [part["input_ids"].shape for part in parts] == [(2, 8)] * 3
    assert np.concatenate([part["input_ids"] for part in parts])[:, 0].tolist() == [1, 4, 7, 10, 13, 0]
    assert sum(num_target_tokens(part) for part in parts) == rows.data.loss_mask.sum()


def test_prefetch():
    assert list(prefetch(lambda i: i * i, 2, 6)) == [4, 9, 16, 25]
    some = prefetch(lambda i: i, 0, 1000)
    assert next(some) == 0
    some.close()

    def fails(i):
        if i == 2:
            raise ValueError("at two")
        return i

    got = []
    with pytest.raises(ValueError, match="at two"):
        for value in prefetch(fails, 0, 5):
            got.append(value)
    assert got == [0, 1]


# --- load_data


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(100))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(words[:3])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(rows, vocab_size=None, **data):
        if not isinstance(rows, str):
            path = tmp_path / "rows.jsonl"
            path.write_text("\n".join(json.dumps(row) for row in rows))
            rows = str(path)
        data = {"train": rows, "cache_dir": str(tmp_path / "cache"), "max_length": 16, **data}
        return load_data(configuration.from_dict({"data": data}), tokenizer, vocab_size)

    return load


ROWS = [{"input": f"w{i}", "output": " ".join(["w1"] * (i % 5 + 1))} for i in range(40)]


def firsts(rows):
    """The first word of every document of some rows."""
    batch = rows.take(np.arange(len(rows)))
    return sorted(batch["input_ids"][(batch["positions"] == 1) & (batch["segment_ids"] > 0)].tolist())


@pytest.mark.parametrize("packing", [True, False])
def test_held_out_rows_are_never_trained_on(load, packing):
    data = load(ROWS, eval_ratio=0.1, packing=packing)
    train, held_out = firsts(data.train), firsts(data.eval)
    assert len(held_out) == 4 and sorted(train + held_out) == [3 + i for i in range(40)]
    assert firsts(load(ROWS, eval_ratio=0.1).eval) == held_out  # the same with another packing
    assert firsts(load(ROWS, eval_ratio=0.1, data_seed=1).eval) != held_out
    assert data.train.width == data.eval.width == 16
    summary = data.summary
    assert summary["train"]["used_examples"] == 36 and summary["eval"]["used_examples"] == 4
    batches = Batches(data.train, 4, 1, 0)
    targets = sum(num_target_tokens(batches.batch(step)) for step in range(batches.steps_per_epoch))
    assert targets == summary["train"]["used_target_tokens"]
    assert targets + summary["eval"]["used_target_tokens"] == summary["train"]["target_tokens"]


def test_size_of_the_split(load):
    assert len(load(ROWS[:2], eval_ratio=0.001, packing=False).eval) == 1
    assert len(load(ROWS[:2], eval_ratio=0.999, packing=False).train) == 1
    assert load(ROWS, eval_ratio=0.0).eval is None
    assert load(ROWS[:1]).eval is None
    # Blocks of one long text stay on one side.
    train, held_out = split_rows(np.repeat(np.arange(10), 3), 0.3, 0)
    assert len(held_out) == 9 and not set(train // 3) & set(held_out // 3)


def test_a_number_of_rows_is_held_out_and_the_first_are_used(load):
    data = load(ROWS, eval_dataset_size=8, packing=False)
    train, held_out = firsts(data.train), firsts(data.eval)
    assert len(held_out) == 8 and sorted(train + held_out) == [3 + i for i in range(40)]
    fewer = load(ROWS, eval_dataset_size=8, max_train_samples=5, max_eval_samples=3, packing=False)
    assert (firsts(fewer.train), firsts(fewer.eval)) == (train[:5], held_out[:3])
    with pytest.raises(UserError, match="eval_dataset_size: .* has 40 rows, and 40 .* left to train on"):
        load(ROWS, eval_dataset_size=40)


def test_evaluation_file(load, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"input": "w99", "output": "w1"}))
    data = load(ROWS, eval=str(tmp_path / "held.jsonl"))
    assert len(firsts(data.train)) == 40 and firsts(data.eval) == [102]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "set" / "val.jsonl").write_text(json.dumps({"input": "w98", "output": "w1"}))
    data = load(str(tmp_path / "set"))
    assert len(firsts(data.train)) == 40 and firsts(data.eval) == [101]


def test_several_files_are_one_set(load, tmp_path):
    (tmp_path / "set").mkdir()
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:5])):
        (tmp_path / "set" / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = load(str(tmp_path / "set"), eval_ratio=0.0)
    assert data.train.data.source_rows.tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "set" / "b.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"input": "w1"}')
    with pytest.raises(UserError, match=r"b\.jsonl, row 2: no 'output'"):
        load(str(tmp_path / "set"))


@pytest.fixture
def count_calls(monkeypatch):
    calls = []
    inner = training_sets.tokenize_parallel
    monkeypatch.setattr(training_sets, "tokenize_parallel", lambda *a, **k: calls.append(1) or inner(*a, **k))
    return calls


def test_tokens_are_cached(load, count_calls, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = load(ROWS)
    second = load(ROWS)
    assert len(count_calls) == 1 and "using the tokenized data" in caplog.text
    assert isinstance(second.train.data.tokens, np.memmap)
    assert first.summary == second.summary
    for step in range(3):
        left, right = (Batches(data.train, 2, 2, 0).batch(step) for data in (first, second))
        assert all(np.array_equal(left[name], right[name]) for name in left)
    load(ROWS, eval_ratio=0.5, packing=False, data_seed=9)  # decide nothing about tokens
    assert len(count_calls) == 1
    load(ROWS, train_on_source=True)
    load(ROWS, max_length=32)
    load(ROWS[1:])
    assert len(count_calls) == 4
    stored = tmp_path / "cache" / "tokenized"
    assert not [path for path in stored.iterdir() if path.name.startswith(".")]
    assert {path.stat().st_mode for path in stored.iterdir()} == {stored.stat().st_mode}  # others may share a cache


def test_another_tokenizer_is_another_cache_entry(tokenizer):
    options = TokenizeOptions("text", 8)
    key = cache_module.fingerprint([], None, tokenizer, options)
    tokenizer(["w1 w2", "w3"], truncation=True, max_length=1)  # leaves its mark in the serialized tokenizer
    assert cache_module.fingerprint([], None, tokenizer, options) == key
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="w1")
    assert cache_module.fingerprint([], None, other, options) != key


def test_a_damaged_cache_is_made_anew(load, count_calls, tmp_path, caplog):
    load(ROWS)
    [folder] = (tmp_path / "cache" / "tokenized").iterdir()
    (folder / "tokens.npy").write_bytes(b"x")
    load(ROWS)
    assert len(count_calls) == 2 and "is damaged" in caplog.text
    load(ROWS)
    assert len(count_calls) == 2


def test_a_cache_that_cannot_be_written_is_only_a_warning(load, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert len(load(ROWS, cache_dir=str(tmp_path / "file")).train)
    assert "could not be cached" in caplog.text


def test_bad_rows_are_counted(load, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(ROWS[0]), "{", '{"input": "w1"}', json.dumps(ROWS[1])]))
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not valid JSON"):
        load(str(path))
    summary = load(str(path), skip_bad_rows=True).summary["train"]
    assert summary["bad_rows"] == 2 and summary["rows"] == 4 and summary["examples"] == 2
    assert "bad.jsonl:2" in summary["bad_examples"][0]


def test_complaints(load):
    with pytest.raises(UserError, match=r"rows\.jsonl: the format of the data is not known from its keys: foo"):
        load([{"foo": 1}])
    with pytest.raises(UserError, match=r"nothing to learn in 1 row \(empty answer: 1\)"):
        load([{"input": "w1", "output": ""}])
    with pytest.raises(UserError, match="token id 42 is outside the model's vocabulary of 42; the tokenizer does not"):
        load(ROWS, vocab_size=42)
    load(ROWS, vocab_size=43)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        load([{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}])


def test_what_is_left_out_is_said(load, caplog):
    load([*ROWS, {"input": "w1", "output": ""}, {"input": "w1", "output": "w2 " * 30}])
    assert "1 row left out: empty answer" in caplog.text
    assert "1 row cut to length, 1 of them lost the end of an answer" in caplog.text
