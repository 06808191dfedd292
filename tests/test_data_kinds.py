"""Rows of several kinds in one file: each is read in its own format by everything that reads rows, and none is lost."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_training import write_tiny_llama
from test_data_tokens import CHATML, examples, make_tokenizer

from tpu_tune import config as configuration
from tpu_tune.cli import main
from tpu_tune.data import arrow, load_data, stats
from tpu_tune.data.as_messages import as_messages
from tpu_tune.data.formats import FORMATS, NAMES, PAIRS, format_of, in_words, own_format
from tpu_tune.data.look import look
from tpu_tune.data.streams import Skipped
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenizing import tokenize_rows
from tpu_tune.errors import UserError

TURNS = [{"role": "user", "content": "Are you there?"}, {"role": "assistant", "content": "I am here."}]
KINDS = {
    "input-output": {"input": "What is a sail?", "output": " A sheet of cloth.", "id": 1},
    "messages": {"messages": TURNS, "id": 2},
    "text": {"text": "The sea is wide and the wind is cold.", "id": 3},
    "alpaca": {"instruction": "Name a sea.", "input": "It is in the north.", "output": "The North Sea.", "id": 4},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "id": 5},
    "prompt-completion": {"prompt": "Two and two are", "completion": " four", "id": 6},
    "prompt-generation": {"prompt": "Three and three are", "generation": " six", "id": 7},
}
ROWS = [{**row, "id": 10 * turn + row["id"]} for turn in range(3) for row in KINDS.values()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model whose tokenizer has a chat template."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def write(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def mixed(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "mixed.jsonl", ROWS)


def options(**keys: Any) -> TokenizeOptions:
    return TokenizeOptions(**{"format": "auto", "max_length": 512, "chat_template": CHATML, **keys})


def load(path: Any, tokenizer: Any, **data: Any) -> Any:
    data = {"train": str(path), "cache_dir": str(pathlib.Path(path).parent / "cache"), "eval_ratio": 0.0, **data}
    return load_data(configuration.from_dict({"data": data}), tokenizer)


# --- detection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_row_of_a_table_of_all_kinds_has_its_own_format(name):
    """Parquet, pandas and CSV give each row the keys of all: null, NaN or empty where it has none."""
    keys = {key for row in KINDS.values() for key in row}
    for empty in (None, float("nan"), *[""] * (name != "input-output")):  # which would be alpaca without instruction
        row = {**dict.fromkeys(keys, empty), **KINDS[name]}
        assert own_format(row) == own_format(KINDS[name]) == name
        assert examples(tokenize_rows([row], make_tokenizer(), options())) == examples(
            tokenize_rows([KINDS[name]], make_tokenizer(), options())
        )


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "a", "output": None, "text": "all of it"}, "alpaca"),  # a broken row, not a text
        ({"instruction": "a", "output": "b", "text": "all of it"}, "alpaca"),
        ({"instruction": None, "input": "a", "output": "b"}, "input-output"),
        ({"messages": None, "text": None}, "messages"),
        ({"messages": [], "text": "a"}, "text"),
        ({"input": "", "output": "b", "text": ""}, "input-output"),
        ({"instruction": "", "input": "a", "output": "b"}, "alpaca"),
        ({"instruction": "", "output": "b", "text": "all of it"}, "alpaca"),
        ({"prompt": "a", "completion": "", "generation": "b"}, "prompt-generation"),
        ({"prompt": "a", "completion": "", "text": ""}, "prompt-completion"),
        ({"title": "a"}, ""),
    ],
)
def test_what_stands_in_the_keys_decides(row, format):
    assert own_format(row) == format


def test_an_unknown_row_is_told_what_it_lacks():
    with pytest.raises(ValueError, match="no 'output', which the format 'input-output' needs; its keys: input; data.c"):
        format_of({"input": "a"})
    with pytest.raises(ValueError, match="no 'text', which the format 'text' needs; its keys: txt"):
        format_of({"txt": "a"}, usual="text")
    assert in_words({"text": 2, "messages": 1200}) == "messages 1,200, text 2" and in_words({"text": 2}) == "text"


# --- every reader -----------------------------------------------------------------------------------------------------


def test_training_reads_what_the_kinds_alone_give(mixed):
    """The same tokens and masks, in the rows' order, as if each row were read by itself in a named format."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    data = load(mixed, tokenizer)
    alone = [tokenize_rows([KINDS[name]], tokenizer, options(format=name)) for name in KINDS]
    assert examples(data.train.data) == 3 * [one for single in alone for one in examples(single)]
    summary = data.summary["train"]
    assert (summary["bad_rows"], summary["rows"], summary["formats"]) == (0, 21, dict.fromkeys(sorted(KINDS), 3))
    assert (summary["chats"], summary["pairs"]) == (6, 12) and "messages 3" in summary["format"]
    # as in a run that reads several files, whose first is of one kind
    (mixed.parent / "set").mkdir()
    write(mixed.parent / "set" / "a.jsonl", ROWS[:1])
    write(mixed.parent / "set" / "b.jsonl", ROWS[1:])
    assert examples(load(mixed.parent / "set", tokenizer).train.data) == examples(data.train.data)


def test_a_parquet_table_of_all_kinds_is_trained_on(tmp_path):
    keys = {key: None for row in KINDS.values() for key in row}
    pq.write_table(pa.Table.from_pylist([{**keys, **row} for row in ROWS]), tmp_path / "rows.parquet")
    tokenizer = make_tokenizer(chat_template=CHATML)
    data = load(tmp_path / "rows.parquet", tokenizer).train.data
    assert examples(data) == examples(load(write(tmp_path / "rows.jsonl", ROWS), tokenizer).train.data)


def test_tokenize(mixed, tiny, capsys):
    output = mixed.parent / "rows.arrow"
    assert main(["data", "tokenize", "-i", str(mixed), "-o", str(output), "-t", str(tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["examples"], report["bad_rows"]) == (21, 21, 0)
    assert "input-output 3" in report["format"]
    summary = arrow.load([str(output)], 512).summary
    assert summary["formats"] == dict.fromkeys(sorted(KINDS), 3) and summary["format"].startswith("tokenized ")


def test_stats_and_look(mixed, tiny, capsys):
    assert main(["data", "stats", str(mixed), "-t", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["bad_rows"], found["formats"]) == (21, 0, dict.fromkeys(KINDS, 3))
    assert found["tokens"]["dropped"] == {}
    alone = sum(tokenize_rows([row], _open(tiny), options()).summary["tokens"] for row in ROWS)
    assert found["tokens"]["total"] == alone
    views = look(str(mixed), _open(tiny), options(), count=21)
    assert len(views) == 21 and all(view.trained.any() for view in views)


def _open(folder: pathlib.Path) -> Any:
    from tpu_tune.checkpoints.tokenizers import open_tokenizer

    return open_tokenizer(str(folder))


@pytest.mark.parametrize("first", KINDS)
def test_the_steps_lose_no_row(tmp_path, first):
    """Ingest, clean and cluster, whatever kind stands first."""
    from tpu_tune.data.cluster.row_texts import read_texts

    rows = [KINDS[first], *(row for name, row in KINDS.items() if name != first)]
    source = write(tmp_path / "in.jsonl", rows)
    ingested, cleaned = tmp_path / "ingested.jsonl", tmp_path / "cleaned.jsonl"
    assert main(["data", "ingest", str(source), "--output", str(ingested), "--keep-conversations"]) == 0
    assert [own_format(row) for row in read(ingested)] == [own_format(row) for row in rows]
    assert main(["data", "clean", str(ingested), "--output", str(cleaned)]) == 0
    assert len(read(cleaned)) == len(rows)
    texts = [text for _, text in read_texts(str(cleaned), "", Skipped())]
    assert len(texts) == len(rows) and "The North Sea." in "\n".join(texts)


def test_a_table_of_all_kinds_is_ingested(tmp_path):
    keys = {key: None for row in KINDS.values() for key in row}
    pq.write_table(pa.Table.from_pylist([{**keys, **row} for row in KINDS.values()]), tmp_path / "rows.parquet")
    output = tmp_path / "rows.jsonl"
    assert main(["data", "ingest", str(tmp_path / "rows.parquet"), "--output", str(output)]) == 0
    assert [own_format(row) for row in read(output)] == [name if name != "sharegpt" else "messages" for name in KINDS]


def test_cluster_takes_the_text_of_rows_without_the_key(tmp_path):
    from tpu_tune.data.cluster.row_texts import read_texts

    file = write(tmp_path / "rows.jsonl", [{"text": "a"}, {"body": "b", "text": "c"}, {"input": "d", "output": "e"}])
    assert [text for _, text in read_texts(str(file), "body", Skipped())] == ["a", "b", "d\ne"]
    with pytest.raises(UserError, match="no row has 'boddy'"):
        list(read_texts(str(file), "boddy", Skipped()))


def test_chunk_copies_rows_of_other_kinds(tmp_path, tiny, capsys):
    rows, output = [KINDS["text"], KINDS["messages"], KINDS["input-output"]], tmp_path / "pieces.jsonl"
    words = ["data", "chunk", str(write(tmp_path / "in.jsonl", rows)), "--output", str(output), "-t", str(tiny)]
    assert main([*words, "--tokens", "12"]) == 0
    pieces = read(output)
    assert pieces[-2:] == rows[1:] and "".join(piece["text"] for piece in pieces[:-2]) == rows[0]["text"]
    assert "of 1 text; 2 rows of other formats copied unchanged" in capsys.readouterr().out
    write(tmp_path / "in.jsonl", rows[1:])
    assert main([*words, "--tokens", "12"]) == 1 and "no text to cut" in capsys.readouterr().err


def test_exact_match_asks_what_chats_ask():
    from tpu_tune.training.tasks.exact_match import read_asked

    rows = [("a:1", KINDS["messages"]), ("a:2", KINDS["sharegpt"]), ("a:3", KINDS["input-output"])]
    assert [asked[:2] for asked in read_asked(rows)] == [
        ("Are you there?", "I am here."),
        ("Hi", "Hello"),
        ("What is a sail?", " A sheet of cloth."),
    ]
    with pytest.raises(UserError, match="a:4: a chat of other turns than one question and its answer"):
        read_asked([("a:4", {"messages": TURNS * 2})])


def test_only_text_is_cut_into_blocks_in_a_file_of_several_kinds(tmp_path, tiny):
    """A tokenized file cut shorter when it is opened: blocks of a batch of texts, the beginning of other rows."""
    rows = [{"text": "a" * 30}] * 1024 + [{"input": "b" * 20, "output": "c" * 30}]
    output = tmp_path / "rows.arrow"
    words = ["data", "tokenize", "-i", str(write(tmp_path / "in.jsonl", rows)), "-o", str(output), "-t", str(tiny)]
    assert main(words) == 0
    data = arrow.load([str(output)], 16)
    assert (data.summary["split"], data.summary["truncated"]) == (1024, 1)
    assert data.summary["formats"] == {"text": 1024, "input-output": 1}


# --- what is not read is said, and good rows are not to be skipped ----------------------------------------------------


@pytest.mark.parametrize("reader", ["train", "look", "stats", "tokenize", "clean"])
def test_a_row_that_another_format_reads_is_not_to_be_left_out(tmp_path, tiny, capsys, reader):
    source, out = str(write(tmp_path / "rows.jsonl", ROWS[:2])), str(tmp_path / "out.arrow")
    words = {
        "look": ["data", "look", source, "-t", str(tiny), "--config.data.format=input-output", "-n", "2"],
        "stats": ["data", "stats", source, "--format", "input-output"],
        "tokenize": ["data", "tokenize", "-i", source, "-o", out, "-t", str(tiny), "--format", "input-output"],
        "clean": ["data", "clean", source, "--output", out, "--format", "input-output"],
    }
    if reader == "train":
        with pytest.raises(UserError) as error:
            load(source, make_tokenizer(), format="input-output")
        said = str(error.value)
    else:
        assert main(words[reader]) == 1
        said = capsys.readouterr().err
    assert "2: no 'input', which the format 'input-output' needs; its keys: messages, id" in said
    assert "another format reads it (messages): leave the format at auto" in said and "skip" not in said
    assert said.count("\n") <= 1


def test_columns_rename_the_rows_that_have_them(tmp_path, tiny, capsys):
    rows = [{"question": "a", "answer": "b"}, KINDS["messages"]]
    columns, tokenizer = {"question": "input", "answer": "output"}, make_tokenizer(chat_template=CHATML)
    for order in (rows, rows[::-1]):
        summary = load(write(tmp_path / "rows.jsonl", order), tokenizer, columns=columns).summary["train"]
        assert (summary["formats"], summary["bad_rows"]) == ({"input-output": 1, "messages": 1}, 0)
    with pytest.raises(UserError, match="2: data.columns names 'answer' but the row has only: question"):
        load(write(tmp_path / "rows.jsonl", [rows[0], {"question": "a", "text": "b"}]), tokenizer, columns=columns)
    # names that no row has are an error, though every row can be read without
    source = str(write(tmp_path / "rows.jsonl", ROWS))
    with pytest.raises(UserError, match="data.columns names 'qestion', which no row has"):
        load(source, tokenizer, columns={"qestion": "input"})
    with pytest.raises(UserError, match="which no row has"):
        stats.describe(source, options=options(columns={"qestion": "input"}))
    with pytest.raises(UserError, match="which no row has"):
        look(source, tokenizer, options(columns={"qestion": "input"}))
    words = ["-i", source, "-o", str(tmp_path / "a.arrow"), "-t", str(tiny), "--input-key", "qestion"]
    assert main(["data", "tokenize", *words]) == 1 and "which no row has" in capsys.readouterr().err
    words = [source, "--output", str(tmp_path / "a.jsonl"), "--columns", '{"qestion": "input"}']
    assert main(["data", "clean", *words]) == 1 and "which no row has" in capsys.readouterr().err
    assert not (tmp_path / "a.arrow").exists() and not (tmp_path / "a.jsonl").exists()


def test_stats_says_what_is_unused_and_unknown(tmp_path, tiny, capsys):
    row = {**KINDS["input-output"], "system": "Be brief.", "history": [["a", "b"]]}
    file = write(tmp_path / "rows.jsonl", [row, row, KINDS["text"], {"title": "x", "system": "s"}])
    with_tokenizer = ["-t", str(tiny)]
    for words in ([], with_tokenizer):
        assert main(["data", "stats", str(file), "--json", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["unused"] == {"history": 2, "system": 2} and found["formats"]["unknown"] == 1
        said = "\n".join(found["warnings"])
        assert "'history' of 2 rows is not used: it is not in the text that is trained on" in said
        assert f"1 row is of no known format, the first {file}:4, with the keys title, system: training stops" in said
    # what a template does not read, as training says it
    chat = [*TURNS[:1], {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}]
    write(file, [{"messages": chat, "tools": [{"name": "f"}]}])
    assert main(["data", "stats", str(file), "--json", *with_tokenizer]) == 0
    assert json.loads(capsys.readouterr().out)["unused"] == {"reasoning_content": 1, "tools": 1}


@pytest.mark.parametrize("more", [[], ["--skip-bad"]])
def test_a_format_that_there_is_not_is_one_line(mixed, tiny, capsys, more):
    words = ["data", "tokenize", "-i", str(mixed), "-o", str(mixed.parent / "a.arrow"), "-t", str(tiny)]
    assert main([*words, "--format", "poem", *more]) == 1
    assert "data.format 'poem' is unknown; known: auto, messages" in capsys.readouterr().err


# --- pairs on a chat model --------------------------------------------------------------------------------------------


def turns_of(name: str) -> list[dict[str, str]]:
    """Prompt and answer of a row as turns, by hand."""
    row = KINDS[name]
    prompt, answer = {
        "alpaca": ("Name a sea.\nIt is in the north.", "The North Sea."),
        **{one: tuple(row[key] for key in FORMATS[one]) for one in PAIRS if one != "alpaca" and one == name},
    }[name]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("format", ["auto-as-chat", "-as-chat"])
@pytest.mark.parametrize("name", PAIRS)
def test_as_chat_is_what_transformers_makes_of_the_turns(name, format):
    tokenizer = make_tokenizer(chat_template=CHATML)
    format = name + format if format == "-as-chat" else format
    data = tokenize_rows([KINDS[name]], tokenizer, options(format=format))
    turns = turns_of(name)
    [(ids, mask)] = examples(data)
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)
    assert tokenizer.decode(np.asarray(ids)[mask]) == turns[1]["content"] + "<|im_end|>"
    assert data.summary["formats"] == {f"{name}-as-chat": 1} and format in NAMES


def test_as_chat_keeps_what_belongs_to_the_row():
    tokenizer = make_tokenizer(chat_template=CHATML)

    def text(row: dict[str, Any], **keys: Any) -> str:
        data = tokenize_rows([row], tokenizer, options(format="auto-as-chat", **keys))
        assert data.summary["unused"] == {}
        [(ids, mask)] = examples(data)
        return tokenizer.decode(ids) + "|" + tokenizer.decode(np.asarray(ids)[mask])

    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert text({**KINDS["input-output"], "system": "Be brief."}).startswith(system)
    alpaca = {**KINDS["alpaca"], "system": "Be brief.", "history": [["Hi", "Hello"]]}
    whole, trained = text(alpaca).split("|", 3)[0], text(alpaca).rpartition("|im_end|>\n|")[2]
    assert whole is not None and trained == "The North Sea.<|im_end|>"  # earlier answers are context
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n" in text(alpaca)
    # chats and texts stay what they are
    for name in ("messages", "sharegpt", "text"):
        row = [KINDS[name]]
        chat = examples(tokenize_rows(row, tokenizer, options(format="auto-as-chat")))
        assert chat == examples(tokenize_rows(row, tokenizer, options()))


def test_rows_past_the_template_are_said_once(mixed, tiny, capsys, caplog):
    wanted = "12 rows (alpaca, prompt-completion, prompt-generation, input-output) are trained on without the "
    wanted += "tokenizer's chat template, through which a chat model is usually asked: "
    way_out = "=auto-as-chat makes prompt and answer its turns"
    with caplog.at_level(logging.WARNING):
        load(mixed, _open(tiny))
    assert caplog.text.count(wanted + "data.format" + way_out) == 1
    assert main(["data", "stats", str(mixed), "-t", str(tiny)]) == 0
    assert capsys.readouterr().out.count("warning: " + wanted + "--format" + way_out) == 1
    words = ["data", "tokenize", "-i", str(mixed), "-o", str(mixed.parent / "a.arrow"), "-t", str(tiny)]
    assert main(words) == 0 and capsys.readouterr().out.count("note: " + wanted + "--format" + way_out) == 1
    assert main(["data", "look", str(mixed), "-t", str(tiny), "-n", "21"]) == 0
    assert capsys.readouterr().out.count(f"({wanted}data.format{way_out})") == 1
    assert main(["data", "look", str(mixed), "-t", str(tiny), "--row", "1", "--json"]) == 0
    [view] = json.loads(capsys.readouterr().out)
    assert view["notes"][0].startswith("1 row (input-output) is trained on without the tokenizer's chat template")


def test_nothing_is_said_where_no_template_is_passed_by(mixed, tiny, tmp_path, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        load(mixed, _open(tiny), format="auto-as-chat")
        load(write(tmp_path / "pairs.jsonl", [KINDS["alpaca"]]), make_tokenizer())  # a base without a template
        load(write(tmp_path / "texts.jsonl", [KINDS["text"], KINDS["messages"]]), _open(tiny))
    assert "without the tokenizer's chat template" not in caplog.text
    for words in (["stats", str(mixed), "--format", "auto-as-chat"], ["look", str(tmp_path / "texts.jsonl")]):
        assert main(["data", *words, "-t", str(tiny)]) == 0
    assert "without the tokenizer's chat template" not in capsys.readouterr().out


# --- one kind for all -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in KINDS if name != "text"])
def test_as_messages_trains_as_before(name):
    """A row and its `messages` give the same tokens and mask, prompt and answer as turns."""
    extra = {
        "alpaca": {"system": "Be brief.", "history": [["Hi", "Hello"]]},
        "messages": {"system": "Be brief.", "tools": [{"name": "f"}]},
        "sharegpt": {"tools": [{"name": "f"}], "system": "Be brief."},
        "input-output": {"system": "Be brief.", "tools": [{"name": "f"}]},
    }
    row, tokenizer = {**KINDS[name], **extra.get(name, {})}, make_tokenizer(chat_template=CHATML)
    made = as_messages(row, name)
    before = tokenize_rows([row], tokenizer, options(format="auto-as-chat"))
    after = tokenize_rows([made], tokenizer, options())
    assert examples(before) == examples(after) and before.summary["unused"] == after.summary["unused"]
    assert made["id"] == row["id"] and own_format(made) == "messages"
    assert not set(made) & {"input", "output", "instruction", "history", "prompt", "conversations"}
    assert as_messages(made, "messages") == made


def test_as_messages_of_the_rest():
    talk = {"prompt": [*TURNS, {"role": "user", "content": "And now?"}], "completion": "Still here."}
    assert as_messages(talk, "prompt-completion")["messages"] == [
        TURNS[0],
        {**TURNS[1], "weight": 0},  # an answer of the prompt is not trained on
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Still here."},
    ]
    assert as_messages(KINDS["text"], "text") == {
        "messages": [{"role": "assistant", "content": "The sea is wide and the wind is cold."}],
        "id": 3,
    }
    renamed = as_messages({"q": "a", "a": "b", "n": 1}, "input-output", {"q": "input", "a": "output"})
    assert renamed == {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "n": 1,
    }


@pytest.mark.parametrize("command", ["ingest", "clean"])
def test_the_commands_write_all_rows_as_messages(mixed, capsys, command):
    from tpu_tune.data.ingest import IngestOptions, ingest

    output, more = mixed.parent / "out.jsonl", write(mixed.parent / "more.jsonl", ROWS[:2])
    inputs, words = [str(mixed), str(more)], ["--no-exact-duplicates"] * (command == "clean")
    assert main(["data", command, *inputs, "--output", str(output), "--as", "messages", *words]) == 0
    said = capsys.readouterr().out
    rows = read(output)
    assert [own_format(row) for row in rows] == ["messages"] * 23
    assert {len(row["messages"]) for row in rows} == {1, 2}
    if command == "clean":
        assert "written as messages, from input-output" in said and "23 rows in = 23 out + 0 dropped" in said
    else:
        assert "written as messages: 4 input-output, 3 text, 3 alpaca" in said and "nobody asks" in said
        whole, options = output.read_bytes(), IngestOptions(as_format="messages")
        report = ingest(inputs, str(output), options, engine=lambda read, tasks: (read(task) for task in tasks))
        assert report.rewritten["input-output"] == 4 and output.read_bytes() == whole


def test_equal_rows_of_two_kinds_are_duplicates_once_they_are_alike(tmp_path, capsys):
    pair = {"input": TURNS[0]["content"], "output": TURNS[1]["content"]}
    source, output = write(tmp_path / "in.jsonl", [KINDS["messages"], pair]), tmp_path / "out.jsonl"
    words = ["data", "clean", str(source), "--output", str(output)]
    for more, kept in (([], 2), (["--as", "messages"], 1), (["--as", "messages", "--near-duplicates", "0.9"], 1)):
        assert main([*words, *more]) == 0
        assert len(read(output)) == kept


def test_the_recipe_takes_it_too(mixed, tmp_path):
    from tpu_tune.data import recipe
    from tpu_tune.data.recipe import settings

    values = {"inputs": [str(mixed)], "output_dir": str(tmp_path / "out"), "steps": ["ingest", "clean"]}
    for step in ("ingest", "clean"):
        recipe.run_recipe(settings.from_dict({**values, step: {"as_format": "messages"}}))
        rows = read(tmp_path / "out" / "2-clean" / "rows.jsonl")
        assert rows and all(own_format(row) == "messages" for row in rows)
    with pytest.raises(UserError, match="--as poems: rows can be written as messages only"):
        recipe.run_recipe(settings.from_dict({**values, "clean": {"as_format": "poems"}}))


def test_a_row_that_cannot_be_a_chat_is_not_lost_unsaid(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [KINDS["input-output"], {"prompt": ["x"], "completion": "y"}])
    words = ["data", "ingest", str(source), "--output", str(tmp_path / "out.jsonl"), "--as", "messages"]
    assert main(words) == 1 and "in.jsonl:2: 'prompt' message 1 is not an object" in capsys.readouterr().err
    assert main([*words, "--skip-bad"]) == 0
    assert "1 bad one skipped" in capsys.readouterr().out and len(read(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Q", "output": ""},
        {"instruction": "Q", "output": ""},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]},
    ],
)
def test_an_empty_answer_teaches_nobody_to_say_nothing_through_a_template_either(row):
    tokenizer = make_tokenizer(chat_template=CHATML)
    good = {"input": "Q", "output": "A"}
    for format in ("auto", "auto-as-chat"):
        found = tokenize_rows([row, good], tokenizer, options(format=format))
        assert found.summary["dropped"] == {"empty answer": 1} and found.source_rows.tolist() == [1]
    kept = tokenize_rows([row], tokenizer, options(format="auto-as-chat", train_on_source=True))
    assert len(kept.source_rows) == 1  # its question is learnt
