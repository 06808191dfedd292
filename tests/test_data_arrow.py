"""`tpu-tune data tokenize` and training on what it writes, against Hugging Face's tokenizer, pyarrow and `datasets`."""

import gzip
import json
import shutil
import tracemalloc

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers_training import make_config, write_tiny_llama

import tpu_tune
from tpu_tune.checkpoints.tokenizers import open_tokenizer
from tpu_tune.cli import main
from tpu_tune.data import arrow, eval_batches, load_data, pretokenize, streams, training_sets
from tpu_tune.errors import UserError

PAIRS = [
    {"input": f"Question {i}? ", "output": "word " * (i % 7) + f"answer {i} \u00e9\U0001f600\n"} for i in range(40)
]
TEXTS = [{"text": f"Text {i} begins. " + "It goes on and on. " * (i % 5 * 7)} for i in range(30)]
VOCABULARY = 264


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model whose tokens are bytes, with </s> = 256 and <s> = 257."""
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return open_tokenizer(str(tiny))


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenize(capsys, tiny, source, *words, output=None):
    """Run the command with --json; return (figures, the file as rows of lists)."""
    output = output or source.parent / (source.name + ".arrow")
    status = main(
        [
            "data",
            "tokenize",
            "--json",
            "--input-file",
            str(source),
            "--output-file",
            str(output),
            "--tokenizer-path",
            str(tiny),
            *map(str, words),
        ]
    )
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out), read(output)


def read(path):
    """As the guide's training code reads it (MmappedArrowDataset)."""
    table = pa.ipc.RecordBatchFileReader(pa.memory_map(str(path), "r")).read_all()
    return [{name: table[name][i].as_py() for name in table.column_names} for i in range(len(table))]


def refusal(capsys, tiny, source, *words):
    output = source.parent / "refused" / "out.arrow"
    status = main(
        [
            "data",
            "tokenize",
            "--input-file",
            str(source),
            "--output-file",
            str(output),
            "--tokenizer-path",
            str(tiny),
            *map(str, words),
        ]
    )
    captured = capsys.readouterr()
    assert status == 1 and captured.err.count("\n") == 1, captured.err
    assert not output.parent.exists() or not list(output.parent.iterdir())
    return captured.err.removeprefix("tpu-tune: ").rstrip("\n")


# --- writing


@pytest.mark.parametrize(("keys", "num_eos"), [(("input", "output"), 1), (("prompt", "generation"), 3)])
def test_pairs_of_either_name(tiny, tokenizer, tmp_path, capsys, keys, num_eos):
    """input/output and prompt/generation need no flag; ids, labels and what is left out are PygmalionAI's."""
    source = write(tmp_path / "rows.jsonl", [dict(zip(keys, row.values(), strict=True)) for row in PAIRS])
    found, rows = tokenize(capsys, tiny, source, "--max-length", 45, "--num-eos", num_eos)
    wanted = []
    for row in PAIRS:  # _process_training_example, with the BOS that the tokenizer adds: this one adds none
        prompt = tokenizer(row["input"])["input_ids"]
        answer = tokenizer(row["output"] + tokenizer.eos_token * num_eos, add_special_tokens=False)["input_ids"]
        if len(prompt) + len(answer) <= 45:
            wanted.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    assert rows == wanted and 5 < len(wanted) < 35
    assert all(row["input_ids"][-num_eos:] == [256] * num_eos and row["input_ids"][-num_eos - 1] != 256 for row in rows)
    assert found["dropped"] == {"longer than max_length": 40 - len(wanted)} and found["examples"] == len(wanted)
    assert found["tokens"] == sum(len(row["input_ids"]) for row in wanted)


def test_it_writes_an_arrow_file_with_two_lists_of_int64(tiny, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", PAIRS)
    _, rows = tokenize(capsys, tiny, source, "--max-length", 100)
    file = tmp_path / "rows.jsonl.arrow"
    assert file.read_bytes()[:8] == b"ARROW1\0\0"
    schema = pa.ipc.open_file(pa.memory_map(str(file))).schema
    assert [(field.name, field.type) for field in schema] == [
        ("input_ids", pa.list_(pa.int64())),
        ("labels", pa.list_(pa.int64())),
    ]
    about = arrow.read_about(str(file))
    assert (about["max_length"], about["format"]) == (100, "input-output") and len(about["tokenizer"]) == 32

    import datasets

    loaded = datasets.load_dataset("arrow", data_files=str(file), split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded.to_list() == rows


def test_long_text_is_cut_into_blocks(tiny, tokenizer, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", TEXTS)
    found, rows = tokenize(capsys, tiny, source, "--max-length", 64)
    flat = [token for row in rows for token in row["input_ids"]]
    assert flat == [token for row in TEXTS for token in [*tokenizer(row["text"])["input_ids"], 256]]
    assert all(len(row["input_ids"]) <= 64 for row in rows) and found["split"] == 24
    for row in rows:  # a block's first token has nothing before it; all others are predicted
        assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_chats_and_train_on_source(tiny, tokenizer, tmp_path, capsys):
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]
    source = write(tmp_path / "rows.jsonl", chats)
    assert "has no chat template" in refusal(capsys, tiny, source)
    template = (
        "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    _, rows = tokenize(capsys, tiny, source, "--chat-template", template)
    ids = tokenizer("u:Hi</s>a:Hello</s>", add_special_tokens=False)["input_ids"]
    assert rows == [{"input_ids": ids, "labels": [-100] * 7 + ids[7:]}]
    _, rows = tokenize(capsys, tiny, source, "--chat-template", template, "--train_on_source")
    assert rows[0]["labels"] == [-100, *ids[1:]]
    assert "nothing to learn in 1 row (longer than max_length: 1)" in refusal(
        capsys, tiny, source, "--chat-template", template, "--max-length", 8
    )


def test_other_keys_are_named_or_told(tiny, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{"question": "a", "reply": "b", "id": 1}])
    said = refusal(capsys, tiny, source)
    assert said.startswith(f"{source}: the format of the data is not known from its keys: question, reply, id; known")
    _, rows = tokenize(capsys, tiny, source, "--input-key", "question", "--output-key", "reply")
    assert rows == [{"input_ids": [97, 98, 256], "labels": [-100, 98, 256]}]
    _, rows = tokenize(capsys, tiny, source, "--text-key", "reply")
    assert rows == [{"input_ids": [98, 256], "labels": [-100, 256]}]


def test_other_files_and_tokenizers_give_the_same_rows(tiny, tmp_path, capsys):
    _, rows = tokenize(capsys, tiny, write(tmp_path / "rows.jsonl", PAIRS))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    frame = pd.DataFrame(PAIRS)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl.gz", "rows.csv", "rows.parquet"):
        assert tokenize(capsys, tiny, tmp_path / name)[1] == rows, name
    assert tokenize(capsys, tiny / "tokenizer.json", tmp_path / "rows.csv")[1] == rows
    shutil.copy(tiny / "tokenizer.json", tmp_path / "alone.json")  # which token ends a text is guessed
    assert tokenize(capsys, tmp_path / "alone.json", tmp_path / "rows.csv")[1] == rows


def test_bad_rows(tiny, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b'{"text": "a"}\n\n{"text": 7}\n{"text": null}\n{\n{"text": "\xff"}\n{"text": ""}\n')
    said = refusal(capsys, tiny, source)
    assert said == (
        f"{source}:5: not valid JSON (Expecting property name enclosed in double quotes); "
        "fix it, or give --skip-bad to go on without it"
    )
    found, rows = tokenize(capsys, tiny, source, "--skip-bad")
    assert [row["input_ids"] for row in rows] == [[97, 256], [55, 256]]
    assert (found["rows"], found["bad_rows"], found["dropped"]) == (6, 3, {"empty text": 1})
    assert sorted(found["bad_examples"])[0] == f"{source}:4: 'text' must be a string, not null"
    write(source, [{"text": "a"}, {"text": None}])
    assert refusal(capsys, tiny, source).startswith(
        f"{source}:2: 'text' must be a string, not null; fix it, or give --s"
    )
    write(source, [{"text": ""}])
    assert "nothing to learn in 1 row (empty text: 1)" in refusal(capsys, tiny, source)
    write(source, [])
    assert f"{source}: no rows" in refusal(capsys, tiny, source)
    write(source, PAIRS)
    assert "--max-length is 1" in refusal(capsys, tiny, source, "--max-length", 1)
    assert "nowhere: there is no such file" in refusal(capsys, "./nowhere", source)
    assert "is the input itself" in refusal_of_same(capsys, tiny, source)


def refusal_of_same(capsys, tiny, source):
    assert main(["data", "tokenize", "-i", str(source), "-o", str(source), "-t", str(tiny)]) == 1
    return capsys.readouterr().err


def test_the_number_of_processes_and_the_batches_change_nothing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretokenize, "_BATCH_ROWS", 7)
    source = write(tmp_path / "rows.jsonl", TEXTS)
    files = [tmp_path / "1.arrow", tmp_path / "2.arrow"]
    rows = [tokenize(capsys, tiny, source, "--workers", n, output=file)[1] for n, file in enumerate(files, start=1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr(pretokenize, "_BATCH_ROWS", 1000)
    assert tokenize(capsys, tiny, source)[1] == rows[0]


SHAPES = {
    "few": [{"input": "a", "output": "b"}] * 3,
    "pairs": PAIRS * 50,
    "first short, then long": [{"text": "short"}] * 3000 + [{"text": "long " * 300}] * 150,
    "half of it too long": ([{"input": "a" * 90, "output": "b"}] * 9 + [{"input": "a" * 900, "output": "b"}]) * 200,
    "one text": [{"text": "on and on " * 10_000}],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_is_predicted_before_writing(tiny, tmp_path, capsys, caplog, monkeypatch, shape):
    monkeypatch.setattr(pretokenize, "_SAMPLE_BYTES", 2**15)  # so that most of these files are more than a sample
    source = write(tmp_path / "rows.jsonl", SHAPES[shape])
    said = []
    monkeypatch.setattr(
        arrow, "write_batch", lambda *a, inner=arrow.write_batch: said.append(list(caplog.messages)) or inner(*a)
    )
    found, _ = tokenize(capsys, tiny, source, "--max-length", 512)
    assert abs(found["predicted_bytes"] / found["bytes"] - 1) < 0.2
    assert found["bytes"] == (tmp_path / "rows.jsonl.arrow").stat().st_size
    assert any("rows.jsonl.arrow will take about " in line and "are free there" in line for line in said[0])


def test_a_full_disk_is_said_first(tiny, tmp_path, capsys, monkeypatch):
    source = write(tmp_path / "rows.jsonl", PAIRS)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "and only 1.00 kB are free there; name an --output-file on another disk" in refusal(capsys, tiny, source)


# --- training on it


def config_for(path, tmp_path, **keys):
    return make_config(
        data__train=str(path),
        data__cache_dir=str(tmp_path / "cache"),
        data__num_workers=1,
        **{"data__max_length": 64, **keys},
    )


def all_batches(data):
    return [batch for rows in (data.train, data.eval) if rows is not None for batch in eval_batches(rows, batch_rows=4)]


def same_batches(ours, theirs):
    ours, theirs = all_batches(ours), all_batches(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
            assert one[name].dtype == other[name].dtype


@pytest.mark.parametrize("rows", [PAIRS, TEXTS], ids=["pairs", "texts"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("eval_ratio", [0.0, 0.2])
def test_the_same_batches_as_from_the_rows(tiny, tokenizer, tmp_path, capsys, monkeypatch, rows, packing, eval_ratio):
    """Also where long texts make several examples, and where the held-out split has to take them together."""
    monkeypatch.setattr(pretokenize, "_BATCH_ROWS", 11)
    rows = [row for row in rows if len(" ".join(row.values()).encode()) < 62 or "text" in row]
    source = write(tmp_path / "rows.jsonl", rows)
    tokenize(capsys, tiny, source, "--max-length", 64)
    keys = {"data__packing": packing, "data__eval_ratio": eval_ratio}
    ours = load_data(config_for(tmp_path / "rows.jsonl.arrow", tmp_path, **keys), tokenizer, VOCABULARY)
    theirs = load_data(config_for(source, tmp_path, **keys), tokenizer, VOCABULARY)
    same_batches(ours, theirs)
    for name in ours.summary:
        different = {key for key in ours.summary[name] if ours.summary[name][key] != theirs.summary[name][key]}
        assert different <= {"format", "split", "rows", "dropped"}


def test_a_run_on_it_tokenizes_nothing(tiny, tmp_path, capsys, monkeypatch):
    """Training from an .arrow, and starting again from the cache: neither goes to the tokenizer."""
    source = write(tmp_path / "rows.jsonl", PAIRS)
    tokenize(capsys, tiny, source, "--max-length", 64)
    tokenizer = open_tokenizer(str(tiny))
    load_data(config_for(source, tmp_path), tokenizer, VOCABULARY)

    def refuse(*_, **__):
        raise AssertionError("tokenizes again")

    monkeypatch.setattr(training_sets, "tokenize_parallel", refuse)
    monkeypatch.setattr(training_sets, "read_rows", refuse)
    load_data(config_for(tmp_path / "rows.jsonl.arrow", tmp_path), tokenizer, VOCABULARY)
    load_data(config_for(source, tmp_path), tokenizer, VOCABULARY)


@pytest.mark.slow
def test_train_and_eval_on_arrow_files(tiny, tmp_path, capsys):
    """A whole run gives the losses of the run on the rows."""
    source, held_out = write(tmp_path / "train.jsonl", PAIRS[:16]), write(tmp_path / "val.jsonl", PAIRS[16:22])
    losses = []
    for file in (source, held_out):
        tokenize(capsys, tiny, file, "--max-length", 128, output=tmp_path / "arrow" / f"{file.stem}.arrow")
    for train, held in ((source, held_out), (tmp_path / "arrow", "")):  # of a directory, both by their names
        config = config_for(
            train,
            tmp_path,
            data__max_length=128,
            data__eval=str(held),
            model__path=str(tiny),
            model__dtype="float32",
            output_dir=str(tmp_path / f"out{len(losses)}"),
            lora__rank=2,
            train__max_steps=2,
            train__per_device_train_batch_size=1,
            train__eval_strategy="steps",
            train__eval_steps=2,
        )
        metrics = tpu_tune.train(config).metrics
        losses.append([row.get("loss", row.get("eval_loss")) for row in metrics])
    assert losses[0] == losses[1] and len(losses[0]) >= 2 and None not in losses[0]


def test_reads_files_of_pygmalions_training_code(tokenizer, tmp_path):
    """Its files as its own scripts write them: filtered with pandas, and blocks of plain text without labels."""
    frame = pd.DataFrame({"input_ids": [[1, 2, 3], [9] * 99, [4, 5], [6, 7]]})
    frame["labels"] = [[-100, 2, 3], [9] * 99, [-100, 5], [6, 7]]
    frame = frame.loc[frame["input_ids"].map(len) <= 10]
    table = pa.Table.from_pandas(frame)
    assert "__index_level_0__" in table.column_names
    file = tmp_path / "sft.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)
    config = config_for(file, tmp_path, data__packing=False, data__eval_ratio=0.0)
    batch = next(eval_batches(load_data(config, tokenizer, VOCABULARY).train, 3))
    assert batch["input_ids"][:, :3].tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0]]
    assert batch["targets"][:, :3].tolist() == [[2, 3, -100], [5, -100, -100], [7, -100, -100]]

    schema = pa.schema([("input_ids", pa.int64())])
    with pa.OSFile(str(file), "wb") as sink, pa.RecordBatchFileWriter(sink, schema) as writer:
        for block in ([7, 8, 9], list(range(1, 6))):
            writer.write_batch(pa.record_batch([pa.array(block)], schema=schema))
    config.data.max_length = 4  # blocks that are longer than a row are cut into several
    data = arrow.load([str(file)], 4)
    assert [data.tokens[a:b].tolist() for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)] == [
        [7, 8, 9],
        [1, 2, 3, 4],
    ]
    assert data.summary["split"] == 1 and data.summary["dropped"] == {"nothing to predict": 1}  # the fifth is alone


def test_reads_what_datasets_saves(tokenizer, tmp_path):
    """The stream format, int32 and several chunks; and a data set of plain rows."""
    import datasets

    rows = {"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[1, 1, 1], [1, 1]]}
    types = datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in rows})
    datasets.Dataset.from_dict(rows, features=types).save_to_disk(tmp_path / "saved", num_shards=2)
    config = config_for(tmp_path / "saved", tmp_path, data__packing=False, data__eval_ratio=0.0)
    batch = next(eval_batches(load_data(config, tokenizer, VOCABULARY).train, 2))
    assert batch["targets"][:, :3].tolist() == [[2, 3, -100], [5, -100, -100]]
    datasets.Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows")
    source = write(tmp_path / "rows.jsonl", PAIRS)
    ours, theirs = (load_data(config_for(path, tmp_path), tokenizer) for path in (tmp_path / "rows", source))
    same_batches(ours, theirs)


def test_rows_longer_than_max_length_are_cut_and_counted(tiny, tokenizer, tmp_path, capsys, caplog):
    source = write(tmp_path / "rows.jsonl", PAIRS)
    tokenize(capsys, tiny, source, "--max-length", 200)
    keys = {"data__max_length": 24, "data__eval_ratio": 0.0, "data__packing": False}
    ours = load_data(config_for(tmp_path / "rows.jsonl.arrow", tmp_path, **keys), tokenizer, VOCABULARY)
    theirs = load_data(config_for(source, tmp_path, **keys), tokenizer, VOCABULARY)
    same_batches(ours, theirs)
    assert ours.summary["train"]["truncated"] == theirs.summary["train"]["truncated"] > 0
    assert ours.summary["train"]["eos_lost"] == theirs.summary["train"]["eos_lost"] > 0
    assert any("rows cut to length" in line for line in caplog.messages)
    keys["data__max_length"] = 10
    with pytest.raises(UserError, match=r"nothing to learn in 40 rows \(no room for the answer"):
        load_data(config_for(tmp_path / "rows.jsonl.arrow", tmp_path, **keys), tokenizer, VOCABULARY)


def arrow_file(path, ids, labels, kind=None):
    kind = kind or pa.list_(pa.int64())
    table = pa.table({"input_ids": pa.array(ids, kind), "labels": pa.array(labels, kind)})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([[1, 2], [3, 999]], [[1, 2], [3, 999]], r"token id 999 is outside the model's vocabulary of 264"),
        ([[1, 2], [3, 4]], [[1, 2], [3, 5]], r"a\.arrow, row 2: input_ids 4 with the label 5; a label must be"),
        ([[1, 2], [3, -4]], [[1, 2], [3, -4]], r"a\.arrow, row 2: input_ids -4 with"),
        ([[1, 2], [3, 4]], [[1, 2, 2], [3, 4]], r"a\.arrow, row 1: input_ids and labels are not of the same length"),
        ([[1, None]], [[1, 2]], r"a\.arrow: input_ids and labels have to be lists of whole numbers \(some are missing"),
        ([[1, 2], None], [[1, 2], None], r"lists of whole numbers \(some are missing"),
        ([[1, 2], [3]], [[-100, -100], [3]], r"nothing to learn in 2 rows \(nothing to predict: 2\)"),
        ([], [], r"nothing to learn in 0 rows"),
    ],
)
def test_files_that_cannot_be_trained_on(tokenizer, tmp_path, ids, labels, message):
    config = config_for(arrow_file(tmp_path / "a.arrow", ids, labels), tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_data(config, tokenizer, VOCABULARY)
    assert "\n" not in str(error.value)


def test_complaints(tiny, tokenizer, tmp_path, capsys, caplog):
    def refused(path, message, start_token=None):
        with pytest.raises(UserError, match=message):
            load_data(config_for(path, tmp_path), tokenizer, VOCABULARY, start_token)

    good = arrow_file(tmp_path / "train.arrow", [[1, 2, 3]] * 3, [[-100, 2, 3]] * 3)
    whole = good.read_bytes()
    refused(good, "an encoder-decoder reads rows with an input and an output, not tokenized ones", 0)
    bad = tmp_path / "bad.arrow"
    for content in (whole[: len(whole) // 2], b"", b"not arrow at all, but some text"):
        bad.write_bytes(content)
        refused(bad, r"bad\.arrow: cannot be read as Arrow")
    refused(arrow_file(bad, [["a"]], [["a"]], pa.list_(pa.string())), "have to be lists of whole numbers")
    bad.unlink()
    write(tmp_path / "train.jsonl", PAIRS)
    refused(
        tmp_path, r"holds tokenized rows \(.+train.arrow\) and others \(.+train.jsonl\), perhaps the same ones twice"
    )
    source = tmp_path / "train.jsonl"
    tokenize(capsys, tiny, source)
    tokenizer = open_tokenizer(str(tiny))
    tokenizer.add_tokens(["new"])
    load_data(config_for(tmp_path / "train.jsonl.arrow", tmp_path, data__max_length=128), tokenizer, VOCABULARY)
    assert any("was tokenized with another tokenizer" in line for line in caplog.messages)


def test_nothing_is_copied_into_memory(tmp_path):
    """A file of 32 MB, mapped: what is allocated, at any time, is a fraction of it."""
    rows, length = 2000, 1000
    ids = pa.array(np.arange(rows * length) % 250)
    lists = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * length), ids)
    file = tmp_path / "big.arrow"
    table = pa.table({"input_ids": lists, "labels": lists})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    del table, lists, ids
    size, before = file.stat().st_size, pa.total_allocated_bytes()
    assert size > 32e6
    tracemalloc.start()
    data = arrow.load([str(file)], 2048)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 1e5 and kept < size / 100 and peak < size / 4
    assert data.summary["target_tokens"] == rows * (length - 1) and data.tokens[5000:5003].tolist() == [0, 1, 2]
    with pytest.raises(IndexError, match="within one example"):
        data.tokens[999:1001]


# --- what the guide asks of training data


@pytest.mark.parametrize("keys", [("input", "output"), ("prompt", "generation")])
def test_trains_on_either_pair_of_names(tokenizer, tmp_path, keys):
    source = write(tmp_path / "rows.jsonl", [dict(zip(keys, row.values(), strict=True)) for row in PAIRS])
    data = load_data(config_for(source, tmp_path, data__eval_ratio=0.0), tokenizer, VOCABULARY)
    ids, labels = (tokenizer(PAIRS[1][key], add_special_tokens=False)["input_ids"] for key in ("input", "output"))
    start, end = data.train.data.offsets[1:3]
    assert data.train.data.tokens[start:end].tolist() == [*ids, *labels, 256]
    assert data.train.data.loss_mask[start:end].tolist() == [False] * len(ids) + [True] * (len(labels) + 1)


def test_json_lines_keep_every_character(tmp_path):
    """UTF-8, one object a line: line breaks, quotes, emoji and half a surrogate pair come back as they were."""
    rows = [{"text": 'a\nb\r\n"c"\\ \u2028 \U0001f600 \ud83d'}, {"input": "", "output": "\t", "n": 1.5, "more": [None]}]
    with streams.writing(tmp_path / "rows.jsonl") as out:
        for row in rows:
            out.write(row)
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 2
    assert [row for _, row in streams.read_json_lines(tmp_path / "rows.jsonl", streams.Skipped())] == rows


@pytest.mark.parametrize("from_arrow", [False, True])
def test_a_held_out_split_is_made_and_never_trained_on(tiny, tokenizer, tmp_path, capsys, from_arrow):
    source = write(tmp_path / "rows.jsonl", TEXTS)
    if from_arrow:
        tokenize(capsys, tiny, source, "--max-length", 64)
        source = tmp_path / "rows.jsonl.arrow"
    data = load_data(config_for(source, tmp_path, data__eval_ratio=0.2), tokenizer, VOCABULARY)
    rows = [set(part.data.source_rows[part.documents].tolist()) for part in (data.train, data.eval)]
    assert len(rows[1]) == 6 and not rows[0] & rows[1] and rows[0] | rows[1] == set(range(30))
