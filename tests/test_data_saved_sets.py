"""Sets that Hugging Face's `datasets` saved, and clones of hub repositories: `datasets` itself is the referee."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil

import datasets
import fsspec
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

from tpu_tune import UserError
from tpu_tune.data import arrow, stats
from tpu_tune.data.formats import Pair, RowError, convert
from tpu_tune.data.ingest import IngestOptions, ingest
from tpu_tune.data.sources import read_rows, resolve
from tpu_tune.training.tasks.task_rows import read_task_rows

TRAIN = [{"text": f"row number {number}"} for number in range(20)]
TEST = [{"text": f"held out {number}"} for number in range(4)]


def read(sources: list[str] | None) -> list[dict]:
    return [row for source in sources or [] for row in read_rows(source)[0]]


def saved(folder: pathlib.Path, **splits: list[dict]) -> str:
    """A DatasetDict on the disk, with what `map` and `shuffle` leave beside its files."""
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    for one in datasets.load_from_disk(str(folder)).values():
        one.map(lambda row: {"characters": len(row["text"])})
        one.shuffle(seed=1)
    assert list(folder.rglob("cache-*.arrow"))
    return str(folder)


def clone(folder: pathlib.Path, readme: str = "", **files: list[dict]) -> str:
    (folder / "data").mkdir(parents=True)
    for name, rows in files.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    (folder / "dataset_infos.json").write_text('{"default": {"description": "", "features": {}}}')
    (folder / "README.md").write_text(readme or "# A set\n")
    return str(folder)


def test_a_dataset_dict_is_read_by_its_index(tmp_path):
    path = saved(tmp_path / "dict", train=TRAIN, test=TEST)
    train, held_out = resolve(path)
    expected = datasets.load_from_disk(path)
    assert read(train) == expected["train"].to_list() == TRAIN
    assert read(held_out) == expected["test"].to_list() == TEST
    assert resolve(os.path.join(path, "test")) == (held_out, None)  # one of them, named outright
    assert stats.describe(path)["rows"] == 20
    assert [row for _, row in read_task_rows(path, "test")] == TEST


def test_one_set_of_several_files_in_their_order(tmp_path):
    rows = datasets.Dataset.from_list(TRAIN)
    rows.save_to_disk(tmp_path / "set", num_shards=3)
    shutil.copy(tmp_path / "set" / "data-00000-of-00003.arrow", tmp_path / "set" / "left-over.arrow")
    train, held_out = resolve(str(tmp_path / "set"))
    assert len(train) == 3 and read(train) == TRAIN and held_out is None


def test_in_a_bucket(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    saved(tmp_path / "dict", train=TRAIN, validation=TEST)
    fs.put(f"{tmp_path}/dict/", "memory://bucket/dict/", recursive=True)
    train, held_out = resolve("memory://bucket/dict")
    assert (read(train), read(held_out)) == (TRAIN, TEST)
    clone(tmp_path / "clone", "---\nconfigs:\n- config_name: default\n  data_files: data/tr*\n---\n", train=TRAIN)
    fs.put(f"{tmp_path}/clone/", "memory://bucket/clone/", recursive=True)
    assert read(resolve("memory://bucket/clone")[0]) == TRAIN
    fs.store.clear()


def test_what_load_dataset_keeps(tmp_path):
    """The cache of `load_dataset`: NAME-SPLIT.arrow beside dataset_info.json and caches of `map`."""
    for name, rows in (("train", TRAIN), ("test", TEST)):
        datasets.Dataset.from_list(rows).to_json(tmp_path / f"{name}.jsonl")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    found = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    found["train"].map(lambda row: {"characters": len(row["text"])})
    folder = pathlib.Path(found["train"].cache_files[0]["filename"]).parent
    assert list(folder.glob("cache-*.arrow"))
    train, held_out = resolve(str(folder))
    assert (read(train), read(held_out)) == (TRAIN, TEST)


def test_a_clone_of_a_hub_repository(tmp_path):
    train, held_out = resolve(clone(tmp_path / "plain", train=TRAIN, test=TEST))
    assert (read(train), read(held_out)) == (TRAIN, TEST)
    readme = (
        "---\r\nconfigs:\r\n- config_name: other\r\n  data_files: data/train*\r\n- config_name: default\r\n"
        "  data_files:\r\n  - split: train\r\n    path: data/b-*\r\n"
        "  - split: test\r\n    path:\r\n    - data/a-*\r\n---\r\n"
    )
    path = clone(tmp_path / "named", readme, a=TEST, b=TRAIN, train=[{"text": "no part of it"}])
    train, held_out = resolve(path)
    os.remove(os.path.join(path, "dataset_infos.json"))  # whose features are none, as far as `datasets` can see
    referee = datasets.load_dataset(path, "default", cache_dir=str(tmp_path / "cache"))
    assert read(train) == referee["train"].to_list() == TRAIN and read(held_out) == referee["test"].to_list()


@pytest.mark.parametrize("below", ["", "data"])
def test_a_directory_for_each_split(tmp_path, below):
    for name, rows in (("train", TRAIN), ("validation", TEST)):
        folder = tmp_path / below / name
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "0000.parquet")
    train, held_out = resolve(str(tmp_path))
    assert (read(train), read(held_out)) == (TRAIN, TEST)


def test_splits_left_out_are_said_aloud(tmp_path, caplog):
    path = saved(tmp_path / "dict", train_gen=TEST, train_sft=TRAIN, test_gen=TEST, test_sft=TRAIN)
    with caplog.at_level(logging.WARNING):
        train, held_out = resolve(path)
        resolve(path)
    assert "train_gen" in train[0] and "test_gen" in held_out[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the split 'train_gen' is trained on; left out: train_sft, test_sft"
    ]
    with pytest.raises(UserError, match="only evaluation splits \\(test\\)"):
        resolve(saved(tmp_path / "tests", test=TEST))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dataset_dict.json", "{", "dataset_dict.json: cannot be read"),
        ("dataset_dict.json", "[" * 5000 + "]" * 5000, "dataset_dict.json: cannot be read \\(nested too deeply"),
        ("dataset_dict.json", '{"splits": ["../elsewhere"]}', "no list of splits"),
        ("train/state.json", "[]", "state.json: is no index"),
        ("train/state.json", '{"_data_files": 10}', "state.json: is no index of `datasets`: it names no files"),
        ("train/state.json", '{"_data_files": {"filename": "a"}}', "is no index of `datasets`: it names no files"),
        ("train/state.json", '{"_data_files": [{"filename": "../../x.arrow"}]}', "names no files"),
        ("train/state.json", '{"_data_files": [{"filename": "gone.arrow"}]}', "names gone.arrow, which is not there"),
        ("train/state.json", '{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}', "an order of rows"),
    ],
)
def test_an_index_that_is_none(tmp_path, name, content, message):
    path = saved(tmp_path / "dict", train=TRAIN)
    (tmp_path / "dict" / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        resolve(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("configs: [1]", "no list of configurations"),
        ("configs: {{", "is no YAML"),
        ("configs:\n- data_files: ../x*", "no file of this directory"),
        ("configs:\n- data_files: https://a.b/c.parquet", "no file of this directory"),
        ("configs:\n- data_files: data/nothing-*", "which is not there"),
        (
            "configs: [{config_name: a, data_files: data/*}, {config_name: b, data_files: data/*}]",
            "several data sets",
        ),
        ("configs:\n- data_files: README.md", "unknown kind of data file"),
    ],
)
def test_a_readme_that_names_no_rows(tmp_path, metadata, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(clone(tmp_path / "clone", f"---\n{metadata}\n---\n", train=TRAIN))
    assert "\n" not in str(error.value)


def test_ingest_takes_one_split_and_no_notes(tmp_path):
    saved(tmp_path / "in" / "dict", train=TRAIN, test=TEST)
    clone(tmp_path / "in" / "clone", train=[{"text": "of a clone"}])

    def texts(split: str) -> list[str]:
        ingest([str(tmp_path / "in")], str(tmp_path / "out.jsonl"), IngestOptions(split=split), workers=1)
        return [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]

    assert texts("train") == ["of a clone", *(row["text"] for row in TRAIN)]
    assert texts("test") == ["of a clone", *(row["text"] for row in TEST)]
    with pytest.raises(UserError, match="there is no split 'dev'; --split names one that is there: train, test"):
        texts("dev")


# Tokenized rows


def tokenized(file: pathlib.Path, rows: list[dict]) -> arrow.TokenizedSet:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, 2)
    return arrow.load([str(file)], 64)


def examples(data: arrow.TokenizedSet) -> list[tuple[list[int], list[int]]]:
    bounds = zip(data.offsets[:-1], data.offsets[1:], strict=True)
    return [(data.tokens[a:b].tolist(), np.flatnonzero(data.loss_mask[a:b]).tolist()) for a, b in bounds]


@pytest.mark.parametrize("kind", [int, bool])
@pytest.mark.parametrize("name", ["completion_mask", "assistant_masks"])
def test_masks_say_what_is_predicted(tmp_path, name, kind):
    """As TRL's collator: labels[mask == 0] = -100."""
    rows = [
        {"input_ids": [5, 6, 7, 8], name: [0, 0, 1, 1]},
        {"input_ids": [9, 5, 6], name: [0, 1, 0]},
        {"input_ids": [1, 2], name: [0, 0]},
    ]
    data = tokenized(tmp_path / "a.arrow", [row | {name: list(map(kind, row[name]))} for row in rows])
    assert examples(data) == [([5, 6, 7, 8], [2, 3]), ([9, 5, 6], [1])]
    assert data.summary["dropped"] == {"nothing to predict": 1}


def test_masks_and_labels_hold_together(tmp_path):
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, -100]}
    masks = {"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 1, 1, 0, 1]}
    assert examples(tokenized(tmp_path / "a.arrow", [row | masks])) == [([5, 6, 7, 8, 9], [2])]


def test_datasets_opens_our_file(tmp_path):
    """Through its builder, which takes both forms of Arrow; `from_file` takes only the stream form."""
    offsets = np.asarray([0, 3, 5])
    mask = np.asarray([False, True, True, False, True])
    ours = arrow.TokenizedSet(np.arange(5, dtype=np.int32), mask, offsets, np.arange(2), {"formats": {"text": 2}})
    file = str(tmp_path / "a.arrow")
    schema = arrow.schema({})
    with pa.ipc.new_file(file, schema) as writer:
        arrow.write_batch(writer, ours, "text")
    rows = [{"input_ids": [0, 1, 2], "labels": [-100, 1, 2]}, {"input_ids": [3, 4], "labels": [-100, 4]}]
    found = datasets.load_dataset("arrow", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert found.to_list() == rows
    with pytest.raises(pa.ArrowInvalid):
        datasets.Dataset.from_file(file)


def test_padding_is_no_text(tmp_path):
    """Left or right of it, as a tokenizer pads; transformers' own padding is the referee."""
    rows = [
        {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [5, 6, 7, 0, 0]},
        {"input_ids": [0, 0, 8, 9, 5], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 9, 5]},
        {"input_ids": [0, 0, 0, 0, 0], "attention_mask": [0, 0, 0, 0, 0], "labels": [0, 0, 0, 0, 0]},
        {"input_ids": [1, 2, 3, 4, 5], "attention_mask": [1, 1, 1, 1, 1], "labels": [1, 2, 3, 4, 5]},
    ]
    data = tokenized(tmp_path / "a.arrow", rows)
    assert examples(data) == [([5, 6, 7], [1, 2]), ([8, 9, 5], [1, 2]), ([1, 2, 3, 4, 5], [1, 2, 3, 4])]
    assert data.summary["tokens"] == 11 and data.summary["target_tokens"] == 8


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"attention_mask": [1, 0, 1]}, "row 1: attention_mask leaves out tokens in the middle"),
        ({"completion_mask": [1, 1]}, "row 1: input_ids and completion_mask are not of the same length"),
        ({"assistant_masks": [0.5, 1.0, 1.0]}, "assistant_masks has to be lists of whole numbers"),
    ],
)
def test_masks_that_fit_no_text(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        tokenized(tmp_path / "a.arrow", [{"input_ids": [1, 2, 3], **columns}])


def test_columns_that_are_not_used_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenized(tmp_path / "a.arrow", [{"input_ids": [1, 2], "position_ids": [0, 1], "length": 2}])
    assert "columns that training does not use: position_ids" in caplog.text


# Cells that are none


def test_nan_is_no_text(tmp_path):
    file = tmp_path / "rows.parquet"
    frame = pandas.DataFrame({"instruction": ["a", "b"], "input": [np.nan, np.nan], "output": ["c", "d"]})
    pyarrow.parquet.write_table(pa.Table.from_pandas(frame).set_column(1, "input", pa.array([np.nan] * 2)), file)
    rows = read_rows(str(file))[0]
    assert np.isnan(rows[0]["input"])
    assert convert(rows[0], "alpaca") == convert({"instruction": "a", "output": "c"}, "alpaca")
    for row, format in (({"text": float("nan")}, "text"), ({"input": float("nan"), "output": "a"}, "input-output")):
        with pytest.raises(RowError, match="must be a string, not null"):
            convert(row, format)
    assert convert({"input": 1.5, "output": 2}, "input-output") == Pair("1.5", "2")


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "a \ud83d b"}, "text"),
        ({"input": "a", "output": "\udc00"}, "input-output"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages"),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": {"\ud83d": 1}}]}, "messages"),
        ({"conversations": [{"from": "human", "value": "a", "note": ["\ud83d"]}]}, "sharegpt"),
    ],
)
def test_half_a_surrogate_pair_is_no_character(row, format):
    with pytest.raises(RowError, match="half of a surrogate pair .*is no character"):
        convert(row, format)


def test_a_surrogate_pair_is_one(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    (row,) = read_rows(str(tmp_path / "a.jsonl"))[0]
    assert convert(row, "text").text == "\U0001f600"


@pytest.mark.parametrize(
    "about",
    [b"[" * 50_000, b"[]", b'{"format": [1]}', b'{"examples_per_row": "ab"}', b'{"examples_per_row": [1e99, 2]}'],
)
def test_what_a_tokenized_file_says_of_itself(tmp_path, about):
    """Right, or one line: it may be damaged, or another program's."""
    rows = pa.table({"input_ids": [[1, 2], [3, 4]]})
    batch, metadata = rows.to_batches()[0], {arrow.METADATA: about}
    file = str(tmp_path / "a.arrow")
    with pa.ipc.new_file(file, rows.schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch, metadata)
    assert isinstance(arrow.read_about(file), dict)
    if b"examples" in about:
        with pytest.raises(UserError, match="its metadata does not fit its rows"):
            arrow.load([file], 64)
    else:
        assert examples(arrow.load([file], 64)) == [([1, 2], [1]), ([3, 4], [1])]


def test_two_columns_of_one_name(tmp_path):
    rows = pa.Table.from_arrays([pa.array([[1, 2]])] * 2, names=["input_ids"] * 2)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    with pytest.raises(UserError, match="has no one column input_ids"):
        arrow.load([str(tmp_path / "a.arrow")], 64)
