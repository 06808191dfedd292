"""Rows of rated answers: TRL's forms, LLaMA-Factory's and Anthropic's, as examples with a role; and what is none.

The judge of tokens and masks is TRL's own preparation of its trainers' data, written out here as `trl_pair`, and run
where trl is installed.
"""

import json
import os
import pickle
import types

import numpy as np
import pytest
from test_data_tokens import CHATML, examples, make_tokenizer

from tpu_tune import config as configuration
from tpu_tune.cli import main
from tpu_tune.data import arrow, load_data
from tpu_tune.data.as_messages import as_messages
from tpu_tune.data.clean.texts import parts
from tpu_tune.data.formats import convert, format_of, own_format, unused_keys
from tpu_tune.data.look import look, show
from tpu_tune.data.preferences import LONG_PAIR
from tpu_tune.data.pretokenize import tokenize_file
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.data.tokenized_set import CHOSEN, REJECTED, merge
from tpu_tune.data.tokenizing import tokenize_rows
from tpu_tune.data.workers import tokenize_batches
from tpu_tune.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def bot(text, **keys):
    return {"role": "assistant", "content": text, **keys}


TEXT = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CHAT = {"prompt": [user("The sky?")], "chosen": [bot("Blue.")], "rejected": [bot("Green.")]}
LABELLED = {"prompt": "The sky is", "completion": " blue.", "label": True}
ALPACA = {"instruction": "Name it.", "input": "The sky", "chosen": "Blue.", "rejected": "Green."}
# name -> (a row, the same row as TRL writes it)
FORMS = {
    "text": (TEXT, TEXT),
    "implicit text": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, TEXT),
    "messages": (CHAT, CHAT),
    "implicit messages": (
        {name: CHAT["prompt"] + CHAT[name] for name in ("chosen", "rejected")},
        CHAT,
    ),
    "a question beside whole chats": (
        {"prompt": "The sky?", **{name: CHAT["prompt"] + CHAT[name] for name in ("chosen", "rejected")}},
        CHAT,
    ),
    "answers as text": ({**CHAT, "chosen": "Blue.", "rejected": "Green."}, CHAT),
    "a question and messages": ({**CHAT, "prompt": "The sky?"}, CHAT),
    "json in a table": ({name: json.dumps(value) for name, value in CHAT.items()}, CHAT),
    "llama-factory": (
        {
            "conversations": [{"from": "human", "value": "The sky?"}],
            "chosen": {"from": "gpt", "value": "Blue."},
            "rejected": {"from": "gpt", "value": "Green."},
        },
        CHAT,
    ),
    "system": (
        {**CHAT, "system": "Be brief."},
        {**CHAT, "prompt": [{"role": "system", "content": "Be brief."}, user("The sky?")]},
    ),
    "anthropic": (
        {name: f"\n\nHuman: The sky?\n\nAssistant: It is {name}" for name in ("chosen", "rejected")},
        {"prompt": "\n\nHuman: The sky?\n\nAssistant:", "chosen": " It is chosen", "rejected": " It is rejected"},
    ),
    "several turns": (
        {"prompt": [user("a"), bot("b"), user("c")], "chosen": [bot("d")], "rejected": [bot("e")]},
        {"prompt": [user("a"), bot("b"), user("c")], "chosen": [bot("d")], "rejected": [bot("e")]},
    ),
}  # fmt: skip


def options(objective="dpo", **keys):
    return TokenizeOptions(
        **{"format": "auto", "max_length": 400, "chat_template": CHATML, **keys}, objective=objective
    )


def trl_pair(row, tokenizer):
    """(ids, whether each is the answer's) of both answers: `DPOTrainer._prepare_dataset` and its collator, one row."""
    made = []
    for name in ("chosen", "rejected"):
        if isinstance(row["prompt"], str):
            answer = row[name] if row[name].endswith(tokenizer.eos_token) else row[name] + tokenizer.eos_token
            prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + answer))
        else:
            keys = {"chat_template": CHATML, "return_dict": False}
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **keys)
            whole = tokenizer.apply_chat_template(row["prompt"] + row[name], **keys)
        assert whole[: len(prompt)] == prompt
        made.append((whole, [False] * len(prompt) + [True] * (len(whole) - len(prompt))))
    return made


@pytest.mark.parametrize("name", FORMS)
def test_a_pair_is_two_examples_with_the_tokens_and_masks_of_trl(name):
    row, same = FORMS[name]
    tokenizer = make_tokenizer(chat_template=CHATML)
    data = tokenize_rows([row], tokenizer, options())
    assert examples(data) == trl_pair(same, tokenizer)
    assert data.roles.tolist() == [CHOSEN, REJECTED] and data.source_rows.tolist() == [0, 0]
    assert data.summary["formats"] == {"preference": 1} and data.summary["unused"] == {}


@pytest.mark.parametrize("name", ["text", "implicit text", "messages", "implicit messages", "several turns"])
def test_trl_itself_prepares_the_same(name):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = make_tokenizer(chat_template=CHATML)
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    settings = types.SimpleNamespace(dataset_num_proc=None, max_length=400, truncation_mode="keep_start")
    rows = Dataset.from_list([FORMS[name][0]])
    [theirs] = trl.DPOTrainer._prepare_dataset(trainer, rows, tokenizer, settings, "train")
    ours = tokenize_rows([FORMS[name][0]], tokenizer, options())
    for (ids, mask), answer in zip(examples(ours), (theirs["chosen_ids"], theirs["rejected_ids"]), strict=True):
        assert ids == theirs["prompt_ids"] + answer
        assert np.asarray(ids)[mask].tolist() == answer


def test_alpaca_and_anthropic_rows_become_turns_where_that_is_asked_for():
    tokenizer = make_tokenizer(chat_template=CHATML)
    hh = FORMS["anthropic"][0]
    two = {name: "\n\nHuman: Hi\n\nAssistant: Yes?" + hh[name] for name in ("chosen", "rejected")}
    turns = [user("Hi"), bot("Yes?"), user("The sky?")]
    for row, same in (
        (two, {"prompt": turns, "chosen": [bot("It is chosen")], "rejected": [bot("It is rejected")]}),
        (ALPACA, {**CHAT, "prompt": [user("Name it.\nThe sky")]}),
        (TEXT, {"prompt": [user("The sky is")], "chosen": [bot(" blue.")], "rejected": [bot(" green.")]}),
    ):
        data = tokenize_rows([row], tokenizer, options(format="auto-as-chat"))
        assert examples(data) == trl_pair(same, tokenizer) and data.summary["pairs"] == 0
    bare = tokenize_rows([ALPACA], tokenizer, options(max_length=1000))
    assert tokenizer.decode(bare.tokens).count("### Instruction:\nName it.\n\n### Input:\nThe sky") == 2
    assert bare.summary["pairs"] == 1


def test_single_answers_have_their_label_and_a_pair_comes_apart_for_kto():
    tokenizer = make_tokenizer(chat_template=CHATML)
    rows = [LABELLED, {**LABELLED, "completion": " green.", "label": False}, TEXT, {**LABELLED, "label": "False"}]
    chat = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "kto_tag": False}
    rows += [chat, {"instruction": "Say b.", "input": "", "output": "b", "kto_tag": True}]
    rows += [{"prompt": [user("a")], "completion": [bot("b")], "label": 1}]
    data = tokenize_rows(rows, tokenizer, options("kto"))
    assert data.roles.tolist() == [CHOSEN, REJECTED, CHOSEN, REJECTED, REJECTED, REJECTED, CHOSEN, CHOSEN]
    assert data.source_rows.tolist() == [0, 1, 2, 2, 3, 4, 5, 6]
    ours = examples(data)
    assert ours[:2] == ours[2:4] == trl_pair(TEXT, tokenizer) and ours[0] == ours[4]
    assert (
        ours[5]
        == ours[7]
        == trl_pair({"prompt": [user("a")], "chosen": [bot("b")], "rejected": [bot("c")]}, tokenizer)[0]
    )


def test_of_an_answer_of_several_messages_the_assistants_are_marked():
    tokenizer = make_tokenizer(chat_template=CHATML)
    chosen = [bot("Look."), {"role": "tool", "content": "blue"}, bot("Blue.")]
    data = tokenize_rows([{**CHAT, "chosen": chosen, "tools": [{"name": "f"}]}], tokenizer, options())
    (ids, mask), _ = examples(data)
    assert tokenizer.decode(np.asarray(ids)[mask]) == "Look.<|im_end|>Blue.<|im_end|>"
    assert data.summary["unused"] == {"tools": 1}  # this template does not show them


@pytest.mark.parametrize(
    ("row", "objective", "reason"),
    [
        ({**TEXT, "rejected": " "}, "dpo", "rejected is empty"),
        ({**CHAT, "chosen": [bot("")]}, "dpo", "chosen is empty"),
        ({**TEXT, "rejected": " blue."}, "dpo", "'chosen' and 'rejected' are equal: there is nothing to prefer"),
        ({**CHAT, "rejected": [bot("Blue.")]}, "orpo", "'chosen' and 'rejected' are equal"),
        ({**CHAT, "chosen": [bot("a"), user("b")]}, "dpo", "chosen ends with a message of the role 'user'"),
        ({"prompt": [user("a")], "completion": [user("b")], "label": True}, "kto", "completion ends with a message"),
        ({"prompt": "a", "completion": "b"}, "kto", "'label' is missing: it must say true (desirable) or false"),
        ({**LABELLED, "label": None}, "kto", "'label' is missing"),
        ({**LABELLED, "label": "good"}, "kto", "'label' is 'good'; it must be true"),
        ({**LABELLED, "label": 0.5}, "kto", "'label' is 0.5; it must be true"),
        ({**LABELLED, "completion": ""}, "kto", "completion is empty"),
        ({"prompt": "a", "chosen": "b"}, "dpo", "no 'rejected', which the format 'preference' needs"),
        ({"chosen": "b", "rejected": "c", "query": "a"}, "dpo", "with nothing in common; data.columns can rename"),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("x"), bot("c")]}, "dpo", "no message in common"),
        ({**TEXT, "rejected": None}, "dpo", "'rejected' is null"),
        ({**CHAT, "chosen": [bot("a", weight=0)]}, "dpo", "all of chosen is marked not to be trained on"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_and_can_be_skipped(row, objective, reason):
    tokenizer = make_tokenizer(chat_template=CHATML)
    good = LABELLED if objective == "kto" else TEXT
    with pytest.raises(UserError) as error:
        tokenize_rows([good, row], tokenizer, options(objective))
    assert str(error.value).startswith("row 2: ") and reason in str(error.value) and "\n" not in str(error.value)
    data = tokenize_rows([good, row], tokenizer, options(objective, skip_bad_rows=True))
    assert data.summary["bad_rows"] == 1 and set(data.source_rows.tolist()) == {0}


def test_a_prompt_that_is_no_beginning_of_prompt_and_answer_is_an_error_with_its_row():
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = {"prompt": "xa", "chosen": "n c", "rejected": "d"}  # "an" is one token
    with pytest.raises(
        UserError, match="row 2: the prompt is no beginning of prompt and answer: its end 'xa' is tokenized"
    ):
        tokenize_rows([TEXT, row], tokenizer, options())
    kept = tokenize_rows([TEXT, row], tokenizer, options(skip_bad_rows=True))
    assert kept.summary["bad_rows"] == 1 and kept.summary["formats"] == {"preference": 1} and len(kept) == 2
    template = CHATML.replace("'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n!' }}{% endif %}")
    with pytest.raises(UserError, match="is rendered otherwise once an answer follows"):
        tokenize_rows([CHAT], tokenizer, options(chat_template=template))


@pytest.mark.parametrize(
    ("row", "objective", "named"),
    [
        (TEXT, "sft", "dpo, orpo, simpo or cpo"),
        (LABELLED, "sft", "objective.name=kto, or data.format=prompt-completion to train on every completion"),
        ({"text": "a"}, "dpo", "objective.name=sft"),
        ({"messages": [user("a"), bot("b")]}, "kto", "objective.name=sft"),
        (LABELLED, "simpo", "objective.name=kto"),
    ],
)
def test_the_objective_decides_what_rows_may_be(row, objective, named):
    with pytest.raises(UserError, match="row 1: ") as error:
        tokenize_rows([row], make_tokenizer(), options(objective, skip_bad_rows=True))
    assert f"objective.name={objective}" in str(error.value) and named in str(error.value)
    if row is LABELLED and objective == "sft":
        assert tokenize_rows([row], make_tokenizer(), options("sft", format="prompt-completion")).roles is None


def test_a_thought_that_the_prompt_opens_is_cut_where_an_answer_parts_from_it():
    """As TRL's `common_prefix_length` has it: the prompt is what both answers begin with."""
    template = CHATML.replace(
        "'<|im_start|>assistant\n' }}{% endif %}", "'<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    for chosen, rejected, begun in (
        ("<think>\nBlue.", "<think>\nGreen.", "<think>\n"),
        ("<think></think>Blue.", "<think>\nGreen.", "<think>"),
        ("Blue.", "<think>\nGreen.", ""),
    ):
        row = {**CHAT, "chosen": [bot(chosen)], "rejected": [bot(rejected)]}
        data = tokenize_rows([row], tokenizer, options(chat_template=template))
        said = [tokenizer.decode(np.asarray(ids)[mask]) for ids, mask in examples(data)]
        assert said == [f"{text.removeprefix(begun)}<|im_end|>\n" for text in (chosen, rejected)]


def test_a_pair_that_does_not_fit_whole_is_left_out_and_reported():
    tokenizer = make_tokenizer()
    whole = tokenize_rows([TEXT], tokenizer, options())
    total = len(whole.tokens)
    assert len(tokenize_rows([TEXT], tokenizer, options(max_length=total))) == 2
    short = tokenize_rows([TEXT, {**TEXT, "prompt": ""}], tokenizer, options(max_length=total - 1, skip_bad_rows=True))
    assert short.summary["dropped"] == {LONG_PAIR: 1}
    # For an objective on single answers each is cut by itself, as a chat is.
    apart = tokenize_rows([TEXT], tokenizer, options("kto", max_length=int(whole.lengths[0])))
    assert apart.lengths.tolist() == [whole.lengths[0]] * 2 and apart.summary["truncated"] == 1
    assert apart.summary["eos_lost"] == 1
    nothing = tokenize_rows([TEXT], tokenizer, options("kto", max_length=int((~whole.loss_mask).sum()) // 2))
    assert nothing.summary["dropped"] == {"no room for the answer within max_length": 2}
    # Bounds of one's own hold for both.
    bounded = tokenize_rows([TEXT], tokenizer, options(source_max_len=3, target_max_len=4))
    assert [tokenizer.decode(ids) for ids, _ in examples(bounded)] == ["The  blu", "The  gre"]
    equal = tokenize_rows([TEXT], tokenizer, options(target_max_len=1))
    assert equal.summary["dropped"] == {"the two answers are equal once they are cut": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [{**TEXT, "prompt": f"Number {i} is", "chosen": " so" + "o" * (i % 5)} for i in range(12)]


def settings(path, tmp_path, objective="dpo", **data):
    keys = {"eval_ratio": 0.25, "max_length": 64, "cache_dir": str(tmp_path / "cache"), **data}
    return configuration.from_dict({"objective": {"name": objective}, "data": {"train": str(path), **keys}})


def equal_sets(one, other):
    tokens = [
        [values[a:b].tolist() for a, b in zip(s.offsets[:-1], s.offsets[1:], strict=True)]
        for s in (one, other)
        for values in (s.tokens, s.loss_mask)
    ]
    assert tokens[:2] == tokens[2:]
    assert one.roles.tolist() == other.roles.tolist() and one.source_rows.tolist() == other.source_rows.tolist()


BATCHES = [(ROWS[:5], "row", 0), (ROWS[5:], "row", 5)]


@pytest.mark.slow
def test_processes_give_the_roles_back():
    whole = tokenize_rows(ROWS, make_tokenizer(), options(max_length=64))
    equal_sets(whole, merge(list(tokenize_batches(BATCHES, make_tokenizer(), options(max_length=64), 2))))


def test_roles_stay_through_merge_and_cache(tmp_path, caplog):
    tokenizer = make_tokenizer()
    path = write(tmp_path / "rows.jsonl", ROWS)
    whole = tokenize_rows(ROWS, tokenizer, options(max_length=64))
    sets = [tokenize_rows(*one[:1], tokenizer, options(max_length=64), *one[1:]) for one in BATCHES]
    equal_sets(whole, pickle.loads(pickle.dumps(merge(sets))))
    plain = tokenize_rows([{"text": "a"}], tokenizer, options("sft"))
    assert merge([plain, whole]).roles.tolist() == [0, *whole.roles] and merge([plain, plain]).roles is None
    fresh, cached = (load_data(settings(path, tmp_path), tokenizer) for _ in range(2))
    equal_sets(whole, fresh.train.data)
    equal_sets(whole, cached.train.data)
    # Of a row both answers are held out, or none; another objective on pairs shares the cache, kto does not.
    held = set(cached.eval.data.source_rows[cached.eval.documents])
    assert len(held) == 3 and len(cached.eval.documents) == 6
    count = len(os.listdir(tmp_path / "cache" / "tokenized"))
    load_data(settings(path, tmp_path, "orpo"), tokenizer)
    assert count == len(os.listdir(tmp_path / "cache" / "tokenized")) == 1
    load_data(settings(path, tmp_path, "kto"), tokenizer)
    assert len(os.listdir(tmp_path / "cache" / "tokenized")) == 2


def test_a_tokenized_file_keeps_the_roles(tmp_path):
    tokenizer = make_tokenizer()
    path = write(tmp_path / "rows.jsonl", ROWS)
    figures = tokenize_file(path, tmp_path / "a.arrow", tokenizer, options("", max_length=64))
    assert figures["examples"] == 24
    stored = arrow.load([str(tmp_path / "a.arrow")], 64, "dpo")
    equal_sets(tokenize_rows(ROWS, tokenizer, options(max_length=64)), stored)
    load_data(settings(tmp_path / "a.arrow", tmp_path), tokenizer)
    assert arrow.load([str(tmp_path / "a.arrow")], 64, "kto").roles.tolist() == stored.roles.tolist()
    longest = max(stored.lengths[::2] + stored.lengths[1::2])
    shorter = arrow.load([str(tmp_path / "a.arrow")], int(longest) - 1, "dpo")
    assert len(shorter) == 24 - 2 * shorter.summary["dropped"][LONG_PAIR] < 24
    assert shorter.roles.tolist() == [CHOSEN, REJECTED] * (len(shorter) // 2)
    with pytest.raises(UserError, match="a.arrow: holds rated answers, which objective.name=sft does not heed"):
        load_data(settings(tmp_path / "a.arrow", tmp_path, "sft"), tokenizer)
    tokenize_file(write(tmp_path / "k.jsonl", [LABELLED]), tmp_path / "k.arrow", tokenizer, options(""))
    with pytest.raises(UserError, match="holds single rated answers; objective.name=dpo learns from pairs, kto from"):
        load_data(settings(tmp_path / "k.arrow", tmp_path), tokenizer)
    with pytest.raises(UserError, match="holds rated answers and other rows"):
        tokenize_file(
            write(tmp_path / "m.jsonl", [LABELLED, {"text": "a"}]), tmp_path / "m.arrow", tokenizer, options("")
        )
    tokenize_file(write(tmp_path / "t.jsonl", [{"text": "abc"}]), tmp_path / "t.arrow", tokenizer, options(""))
    with pytest.raises(UserError, match="holds rows without a rating; objective.name=kto"):
        load_data(settings(tmp_path / "t.arrow", tmp_path, "kto"), tokenizer)


def test_settings_without_meaning_for_rated_answers_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="data.train_on_source: objective.name=dpo rates answers"):
        load_data(settings(path, tmp_path, train_on_source=True), make_tokenizer())
    with pytest.raises(UserError, match="objective.name=dpo: an encoder-decoder has sft alone"):
        load_data(settings(path, tmp_path), make_tokenizer(), None, 0)


def test_look_shows_the_chosen_answer_in_green_and_the_rejected_one_in_red(tmp_path):
    path = write(tmp_path / "rows.jsonl", [TEXT])
    chosen, rejected = look(path, make_tokenizer(), options(""))
    assert chosen.where == f"{path}:1, chosen" and rejected.where == f"{path}:1, rejected"
    assert "\x1b[32m blue." in show(chosen, color=True) and "\x1b[31m green." in show(rejected, color=True)
    assert "The sky is[[ blue.</s>]]" in show(chosen, color=False)
    assert rejected.notes == ["rated answers are for objective.name=dpo, orpo, simpo, cpo or kto"]
    left = look(path, make_tokenizer(), options("dpo", max_length=5))
    assert left[1].notes == [f"not trained on: {LONG_PAIR}"] and not left[0].trained.any()


def test_the_commands_know_preference_rows(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    noise = "As an AI language model, no"
    rows = [*ROWS, ROWS[0], {**ROWS[1], "chosen": noise}, {**ROWS[2], "rejected": noise}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert (
        main(["data", "stats", path, "--tokenizer", str(tmp_path / "tiny"), "--max-length", "20", "--method", "lora"])
        == 0
    )
    said = capsys.readouterr().out
    assert "15 (preference)" in said and "answers       15 chosen (" in said and ", 15 rejected (" in said
    assert "left out, since both answers have to fit together" in said
    clean = tmp_path / "clean.jsonl"
    assert main(["data", "clean", path, "--output", str(clean)]) == 0
    kept = [json.loads(line) for line in clean.read_text().splitlines()]
    assert kept == [*ROWS, rows[-1]]  # a phrase that the model is led away from stays
    assert main(["data", "split", "--input", path, "--split_ratio", "0.8,0.2", "--output-dir", str(tmp_path)]) == 0
    assert main(["data", "ingest", str(clean), "--output", str(tmp_path / "again.jsonl")]) == 0
    again = [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in TEXT} for row in again] == kept
    assert main(["data", "tokenize", "-i", path, "-o", str(tmp_path / "a.arrow"), "-t", str(tmp_path / "tiny")]) == 0
    assert "30 examples (preference) of 15 rows" in capsys.readouterr().out


def test_written_as_messages_a_preference_row_reads_the_same():
    tokenizer = make_tokenizer(chat_template=CHATML)
    for row in (CHAT, FORMS["llama-factory"][0], {**LABELLED, "tag": 1}, TEXT, FORMS["anthropic"][0]):
        format = format_of(row)
        made = as_messages(row, format)
        objective = "kto" if format == "prompt-completion-label" else "dpo"
        ours, theirs = (
            tokenize_rows([one], tokenizer, options(objective, format="auto-as-chat")) for one in (row, made)
        )
        equal_sets(ours, theirs)
        assert made.get("tag") == row.get("tag")


def test_answers_and_prompts_are_told_apart_when_rows_are_cleaned():
    for row, answers in (
        (TEXT, [" blue."]),
        (CHAT, ["Blue."]),
        (FORMS["llama-factory"][0], ["Blue."]),
        (ALPACA, ["Blue."]),
        (LABELLED, [" blue."]),
    ):
        found = parts(row, own_format(row), {})
        assert [part.text for part in found if part.answer] == answers and len(found) >= 2


def test_a_table_of_several_kinds_and_keys_that_are_not_read():
    mixed = {**dict.fromkeys([*TEXT, "messages", "completion", "label"]), "text": "a"}
    assert own_format(mixed) == "text"
    assert own_format({**mixed, "text": None, **TEXT}) == "preference"
    assert own_format({**mixed, "text": None, **LABELLED}) == "prompt-completion-label"
    assert own_format({**mixed, "text": None, **LABELLED, "label": None}) == "prompt-completion"
    assert unused_keys({**TEXT, "system": "Be brief.", "images": ["a"]}, "preference") == ["system", "images"]
    assert unused_keys({**CHAT, "system": "Be brief."}, "preference") == []
    assert len(convert({**CHAT, "system": "Be brief."}, "preference").answers[0].messages) == 3
