"""Rows for an encoder-decoder, against transformers' T5 tokenizer, seq2seq collator and T5's shift of the labels."""

import json

import numpy as np
import pytest
from transformers import DataCollatorForSeq2Seq, T5Tokenizer

from tpu_tune import config as configuration
from tpu_tune.data import Batches, PairRows, eval_batches, load_data, num_target_tokens
from tpu_tune.errors import UserError

ROWS = [
    {"input": "say a small word", "output": "word"},
    {"input": "b", "output": "a word and a word and another"},
    {"input": "", "output": "all by itself"},
    {"input": " translate  it: two\nlines ", "output": " \u00fcber "},
    {"input": "in the midst </s> of it", "output": "x"},
]


@pytest.fixture(scope="module")
def tokenizer():
    """T5's own class over a small vocabulary: pad 0, EOS 1, unknown 2, letters and a few pieces."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(97 + i), -4.0) for i in range(26))]
    return T5Tokenizer(vocab=[*pieces, ("▁a", -3.0), ("▁word", -5.0), ("and", -5.0)], extra_ids=2)


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(rows=ROWS, start_token=0, tokenizer=tokenizer, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        data = {"train": str(path), "cache_dir": str(tmp_path / "cache"), "eval_ratio": 0.0, **data}
        return load_data(configuration.from_dict({"data": data}), tokenizer, None, start_token)

    return load


def expected(tokenizer, rows, source_max, target_max):
    """What a Hugging Face seq2seq script makes of rows: encoder ids and mask, decoder ids, labels."""
    pytest.importorskip("torch")
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    features = []
    for row in rows:
        made = tokenizer(row["input"], max_length=source_max, truncation=True)
        labels = tokenizer(text_target=row["output"], max_length=target_max, truncation=True)["input_ids"]
        features.append({**made, "labels": labels})
    batch = DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=-100)(features)
    names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
    return [np.asarray(batch[name]) for name in names]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"source_max_len": 6},
        {"target_max_len": 3},
        {"max_length": 5},
        {"source_max_len": 1, "target_max_len": 1},
        {"max_length": 7, "source_max_len": 99},
    ],
)
def test_rows_are_those_of_transformers(load, tokenizer, limits):
    rows = load(**limits).train
    assert isinstance(rows, PairRows) and len(rows) == len(ROWS)
    found = rows.take(np.arange(len(rows)))
    longest = limits.get("max_length", 2048)
    source_max, target_max = (min(limits.get(key) or longest, longest) for key in ("source_max_len", "target_max_len"))
    ids, mask, decoder_ids, labels = expected(tokenizer, ROWS, source_max, target_max)
    tokens, width = ids.shape[1], labels.shape[1]
    assert rows.encoder_width == rows.width == min(64, longest) >= max(tokens, width)
    np.testing.assert_array_equal(found["encoder_ids"][:, :tokens], ids)
    np.testing.assert_array_equal(found["encoder_segment_ids"][:, :tokens], mask)
    np.testing.assert_array_equal(found["targets"][:, :width], labels)
    real = labels != -100
    np.testing.assert_array_equal(found["input_ids"][:, :width][real], decoder_ids[real])
    np.testing.assert_array_equal(found["segment_ids"][:, :width], real)
    np.testing.assert_array_equal(found["positions"][:, :width][real], np.nonzero(real)[1])
    for name, array in found.items():
        assert array.dtype == np.int32
        rest = array[:, tokens if name.startswith("encoder") else width :]
        assert (rest == (-100 if name == "targets" else 0)).all(), name


def test_an_empty_input_leaks_nothing_of_its_answer(load, tokenizer):
    row = load([ROWS[2]]).train.take(np.array([0]))
    assert row["encoder_ids"].sum() == row["encoder_segment_ids"].sum() == tokenizer.eos_token_id == 1
    answer = tokenizer(ROWS[2]["output"])["input_ids"]
    assert row["targets"][0, : len(answer)].tolist() == answer
    assert row["input_ids"][0, : len(answer)].tolist() == [0, *answer[:-1]]


def test_sides_that_end_already_end_once(load, tokenizer):
    rows = [{"input": "say</s>", "output": "word</s>"}, {"input": "say", "output": "word"}]
    data = load(rows)
    for name, array in data.train.take(np.arange(2)).items():
        np.testing.assert_array_equal(array[0], array[1], err_msg=name)
    targets = data.train.take(np.arange(1))["targets"][0]
    assert targets[targets != -100].tolist() == tokenizer("word")["input_ids"]
    assert data.summary["train"]["truncated"] == 0


def test_each_side_may_be_as_long_as_max_length(load):
    """A decoder-only row shares max_length between prompt and answer; here each side has it."""
    long = [{"input": "a " * 90, "output": "a " * 70}]
    data = load(long, max_length=80)
    row = data.train.take(np.array([0]))
    assert (data.train.encoder_width, data.train.width) == (80, 80)
    assert row["encoder_segment_ids"].sum() == 80 and row["segment_ids"].sum() == 71
    assert data.summary["train"]["truncated"] == 1 and data.summary["train"]["eos_lost"] == 0
    assert load(long, max_length=71).summary["train"]["eos_lost"] == 0  # the answer and EOS just fit
    assert load(long, max_length=70).summary["train"]["eos_lost"] == 1


def test_another_start_token_and_the_last_batch(load, tokenizer):
    batches = Batches(load(start_token=7).train, 2, 2, 0)
    assert batches.steps_per_epoch == 2
    first, last = batches.batch(0), batches.batch(1)
    assert {name: array.shape for name, array in last.items()} == {name: (2, 2, 64) for name in first}
    assert (first["input_ids"][..., 0] == 7).all()
    empty = last["segment_ids"].sum(-1).reshape(-1) == 0
    assert empty.tolist() == [False, True, True, True]
    for name, array in last.items():
        assert (array.reshape(4, -1)[empty] == (-100 if name == "targets" else 0)).all(), name
    answers = sum(len(tokenizer(row["output"])["input_ids"]) for row in ROWS)
    assert num_target_tokens(first) + num_target_tokens(last) == answers
    assert sum(num_target_tokens(part) for part in eval_batches(batches.rows, 3)) == answers


def test_held_out_rows_counts_and_cache(load, tokenizer, caplog):
    data = load(ROWS * 4, eval_ratio=0.25)
    assert (len(data.train), len(data.eval), data.eval.width) == (15, 5, 64)
    sides = [len(tokenizer(row[side])["input_ids"]) for row in ROWS for side in ("input", "output")]
    assert data.summary["train"]["tokens"] == 4 * sum(sides)
    used = data.summary["train"]["used_tokens"] + data.summary["eval"]["used_tokens"]
    assert used == 4 * sum(sides) and 0 < data.summary["train"]["fill"] < 1
    packed = load(ROWS * 4, eval_ratio=0.25, start_token=None)  # the same file for a decoder-only model
    assert not isinstance(packed.train, PairRows) and packed.summary["train"]["tokens"] != 4 * sum(sides)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a story"}], "this is plain text"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], "this is a chat"),
        ([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}], "this is a chat"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}], "this is a chat"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(load, rows, says):
    with pytest.raises(UserError, match=rf"rows\.jsonl, row 1: {says}, and an encoder-decoder .* alpaca rows$"):
        load(rows)


def test_alpaca_rows_and_other_complaints(load, tokenizer):
    row = load([{"instruction": "say it", "output": "word"}]).train.take(np.array([0]))
    assert tokenizer.decode(row["encoder_ids"][0][row["encoder_segment_ids"][0] > 0]).endswith("</s>")
    with pytest.raises(UserError, match=r"^data\.train_on_source: an encoder-decoder has no loss on what its encoder"):
        load(train_on_source=True)
    with pytest.raises(UserError, match=r"nothing to learn in 1 row \(empty answer: 1\)"):
        load([{"input": "a", "output": ""}])


def test_a_tokenizer_without_eos_has_nothing_to_read_of_an_empty_input(load):
    from test_data_tokens import make_tokenizer

    data = load([*ROWS[:1], ROWS[2]], tokenizer=make_tokenizer(bos=None, eos=None))
    assert len(data.train) == 1 and data.summary["train"]["dropped"] == {"nothing to read": 1}
    row = data.train.take(np.array([0]))
    assert row["encoder_segment_ids"].sum() < len(ROWS[0]["input"]) and row["segment_ids"].sum() == len("word")
