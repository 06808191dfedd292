"""`tpu-tune data clean`: phrases, formats, bounds, report and command line. Duplicates and repairs are elsewhere."""

import gzip
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_tune.cli import main
from tpu_tune.data import clean
from tpu_tune.data.clean import CleanOptions, row_cleaner, rules
from tpu_tune.data.clean.language import other_language
from tpu_tune.data.clean.phrases import LISTS, compile_lists
from tpu_tune.data.formats import RowError
from tpu_tune.errors import UserError

NOISE = "Sure. As an AI language model, I cannot do that. Ask again."


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def cleaned(row, **options):
    return row_cleaner(CleanOptions(**options))(row)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


# One good and one noisy row of each format, and the noisy one cut short.
FORMATS = {
    "text": ({"text": "Fine."}, {"text": NOISE, "n": [1]}, {"text": "Sure.", "n": [1]}),
    "input-output": (
        {"input": "a", "output": "b"},
        {"input": "q", "output": NOISE},
        {"input": "q", "output": "Sure."},
    ),
    "prompt-generation": (
        {"prompt": "a", "generation": "b"},
        {"prompt": "q", "generation": NOISE},
        {"prompt": "q", "generation": "Sure."},
    ),
    "prompt-completion": (
        {"prompt": "a", "completion": "b"},
        {"prompt": [user("q")], "completion": [assistant(NOISE), user("more")]},
        {"prompt": [user("q")], "completion": [assistant("Sure.")]},
    ),
    "alpaca": (
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "q", "input": "x", "output": NOISE, "id": 7},
        {"instruction": "q", "input": "x", "output": "Sure.", "id": 7},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"id": "z", "conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": NOISE},
                                      {"from": "human", "value": "r"}, {"from": "gpt", "value": "s"}]},
        {"id": "z", "conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "Sure."}]},
    ),
    "messages": (
        {"messages": [user("a"), assistant("b")]},
        {"messages": [user("q"), assistant("r"), user("s"), assistant(NOISE[6:]), user("t"), assistant("u")],
         "k": None},
        {"messages": [user("q"), assistant("r")], "k": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("good, noisy, short", FORMATS.values(), ids=FORMATS)
def test_every_format(good, noisy, short):
    before = json.dumps([good, noisy])
    row, hits = cleaned(good)
    assert row is good and hits == []
    row, hits = cleaned(noisy)
    assert row is None and [(hit.rule, hit.effect) for hit in hits] == [("phrase: As an AI language model", "dropped")]
    row, hits = cleaned(noisy, action="truncate")
    assert row == short and list(row) == list(noisy) and hits[0].effect == "cut"
    assert json.dumps([good, noisy]) == before


@pytest.mark.parametrize(
    "text",
    [
        "As an AI language model, I",
        "AS AN AI LANGUAGE MODEL",
        "as an\n  AI\u00a0language\tmodel",
        "as an **AI language model**",
        "It may be harmful or  offensive content.",
        "I was trained by openai's people",
    ],
)
def test_the_guides_phrases(text):
    assert cleaned({"text": text})[0] is None


@pytest.mark.parametrize(
    "text",
    [
        "GPT-2 was an AI language model.",
        "trained by OpenAIs",
        "As an AI researcher I know language models",
        "I'm sorry, but I can't come to the party",  # a refusal, so not by default
        "harmful content",
        "",
    ],
)
def test_what_only_looks_like_them(text):
    row = {"text": text}
    assert cleaned(row)[0] is row


@pytest.mark.parametrize("text", ["I’m sorry, but I can’t", "I'm sorry but I can't", "I´m sorry,\nbut I can`t"])
def test_apostrophes_and_commas(text):
    assert cleaned({"text": text}, lists=("refusals",))[0] is None
    assert cleaned({"text": text}, lists=())[0] is not None


def test_single_words_are_a_list_of_their_own():
    row = {"text": "Ethical questions are old."}
    assert cleaned(row, lists=("guide", "refusals"))[0] is row
    assert cleaned(row, lists=("single-words",))[0] is None
    assert all(" " in phrase for name in ("guide", "refusals") for phrase in LISTS[name])
    assert all(" " not in phrase for phrase in LISTS["single-words"])


def test_every_phrase_of_the_lists_finds_itself():
    for phrase in compile_lists(tuple(LISTS)):
        text = f"Well: {phrase.text.upper().replace(chr(39), '’')}!"
        assert phrase.anchor in text.lower() and phrase.pattern.search(text), phrase.text


@pytest.mark.parametrize(
    "text, left",
    [
        ("One. Two! I was trained by OpenAI.", "One. Two!"),
        ("One.\n\n- Two, trained by OpenAI", "One."),
        ("He asked: “Why?” I was trained by OpenAI.", "He asked: “Why?”"),
        ("一。二 trained by OpenAI", "一。"),
        ("Version 1.5 was trained by OpenAI", None),
        ("trained by OpenAI. More.", None),
        ("One. As an AI language model. Two. trained by OpenAI", "One."),
    ],
)
def test_where_a_text_is_cut(text, left):
    assert cleaned({"text": text}, action="truncate")[0] == (left and {"text": left})


def test_a_prompt_is_looked_at_only_when_asked():
    row = {"input": "Who was trained by OpenAI?", "output": "GPT-2."}
    assert cleaned(row)[0] is row
    for action in ("drop", "truncate"):
        found, hits = cleaned(row, action=action, prompts=True)
        assert found is None and hits[0].rule == "phrase: trained by OpenAI"


def test_a_cut_message_loses_its_calls_and_parts():
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {"messages": [user("q"), assistant(NOISE, tool_calls=call), {"role": "tool", "content": "1"}, assistant("x")]}
    assert cleaned(row, action="truncate")[0] == {"messages": [user("q"), assistant("Sure.")]}
    pieces = [{"type": "text", "text": one} for one in ("One. ", NOISE[6:], "Three.")]
    row = {"messages": [user("q"), {"role": "assistant", "content": pieces}]}
    assert cleaned(row, action="truncate")[0]["messages"][1]["content"] == pieces[:1]
    row = {"messages": [user("q"), assistant(NOISE[6:])]}
    assert cleaned(row, action="truncate")[0] is None


def test_messages_written_as_json_stay_json():
    row = {"messages": json.dumps([user("q"), assistant(NOISE)])}
    found, _ = cleaned(row, action="truncate")
    assert json.loads(found["messages"]) == [user("q"), assistant("Sure.")]


def test_columns_name_the_rows_own_keys():
    row = {"question": "q", "answer": NOISE}
    found, _ = cleaned(row, action="truncate", columns={"question": "input", "answer": "output"})
    assert found == {"question": "q", "answer": "Sure."}
    with pytest.raises(RowError, match="question, answer"):
        cleaned(row)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"foo": 1}, "format of the data is not known"),
        ({"text": None}, "'text' is null"),
        ({"text": {"a": 1}}, "'text' must be text, not a dict"),
        ({"messages": "hello"}, "must be a non-empty list"),
        ({"messages": []}, "must be a non-empty list"),
        ({"messages": [{"content": "x"}]}, "has no 'role'"),
        ({"messages": [user(None)]}, "has no text"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "is from 'martian'"),
    ],
)
def test_bad_rows_say_why(row, reason):
    with pytest.raises(RowError, match=reason):
        cleaned(row)


def test_patterns(monkeypatch):
    row = {"text": "One. Call <|im_end|> now."}
    assert cleaned(row, patterns=(r"<\|.*?\|>",), action="truncate")[0] == {"text": "One."}
    assert cleaned(row, patterns=("call",))[0] is row
    assert cleaned(row, patterns=("(?i)call",))[0] is None
    # The look-behind sees the end only after the first cut.
    assert cleaned({"text": "a. b. c!"}, patterns=("c!", r"b\.$"), action="truncate")[0] == {"text": "a."}
    monkeypatch.setattr(rules, "PATTERN_SECONDS", 0.05)
    with pytest.raises(RowError, match=r"the pattern '\(a\|aa\)\+\$' takes more than 0.05 s"):
        cleaned({"text": "a" * 60 + "b"}, patterns=("(a|aa)+$",))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patterns": ("(",)}, "'(' is not a regular expression (missing )"),
        ({"patterns": ("a*",)}, "matches the empty text"),
        ({"phrases": (" ",)}, "phrase to look for is empty"),
        ({"lists": ("guid",)}, "'guid' is unknown; known: guide, refusals, single-words"),
        ({"action": "cut"}, "known: drop, truncate"),
        ({"near_duplicates": 1.2}, "not 1.2"),
        ({"shingle_size": 0}, "1 chars or more"),
        ({"min_chars": 5, "max_chars": 4}, "at least 5 and at most 4 chars"),
        ({"languages": ("english",)}, "the language 'english' is unknown; known: "),
        ({"mask_phone": True, "phone_region": "UK"}, "region 'UK' is unknown"),
        ({"format": "csv"}, "'csv' is unknown"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(UserError) as error:
        row_cleaner(CleanOptions(**options))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_library_is_named(monkeypatch):
    from tpu_tune.data.clean import language, repair

    for module in ("ftfy", "phonenumbers", "py3langid.langid", "rensa"):
        monkeypatch.setitem(sys.modules, module, None)
    language._identifier.cache_clear()
    repair._phonenumbers.cache_clear()
    for asked, package in (
        ({"fix_unicode": True}, "ftfy"),
        ({"mask_phone": True}, "phonenumbers"),
        ({"languages": ("en",)}, "py3langid"),
    ):
        with pytest.raises(UserError, match=rf"needs {package}, .*pip install 'tpu_tune\[data\]'"):
            row_cleaner(CleanOptions(**asked))
    with pytest.raises(UserError, match=r"needs rensa, .*pip install 'tpu_tune\[data\]'"):
        clean.Duplicates(CleanOptions(near_duplicates=0.8))


@pytest.mark.parametrize(
    "bound, kept, rule",
    [
        ({"min_chars": 6}, ["eight 88", "three w s"], "fewer than 6 characters"),
        ({"max_chars": 8}, ["four", "eight 88"], "more than 8 characters"),
        ({"min_words": 2}, ["eight 88", "three w s"], "fewer than 2 words"),
        ({"max_words": 0}, [], "more than 0 words"),
        ({"max_words": 2}, ["four", "eight 88"], "more than 2 words"),
    ],
)
def test_bounds(bound, kept, rule):
    rows = [{"text": text} for text in ("four", "eight 88", "three w s")]
    found = [cleaned(row, **bound) for row in rows]
    assert [row["text"] for row, _ in found if row] == kept
    assert {hit.rule for _, hits in found for hit in hits} == {rule}
    assert cleaned({"input": "four", "output": "more"}, **{"min_chars": 9})[0] is not None  # prompt and answer together


@pytest.mark.parametrize(
    "text, other",
    [
        ("Was ist die Hauptstadt von Frankreich? Paris ist die Hauptstadt.", "de"),
        ("Bonjour, comment allez-vous aujourd'hui ?", "fr"),
        ("Столица Франции — Париж, это знают все.", "ru"),
        ("こんにちは世界、お元気ですか", "ja"),
        ("The capital of France is Paris, as everybody knows.", ""),
        ("Ja, das stimmt.", ""),  # 12 letters: cannot be told
        ("Paris", ""),
        ("", ""),
        ("2 + 2 = 4, 3 * 3 = 9", ""),
        ("😀😀😀😀😀😀😀😀", ""),
        ("def f(x):\n    for i in range(10):\n        print(i + x)\n    return x", ""),
    ],
)
def test_languages(text, other):
    assert other_language(text, ("en",)) == other
    row, hits = cleaned({"text": text}, languages=("en",))
    assert (row is None) == bool(other) and [hit.rule for hit in hits] == ([f"language: {other}"] if other else [])
    assert cleaned({"text": text}, languages=("en", "de", "fr", "ru", "ja"))[0] is not None


def test_the_row_function_pickles_and_needs_no_jax():
    function = row_cleaner(CleanOptions(patterns=("x+y",), lists=("guide", "refusals"), phrases=("foo bar",)))
    copy = pickle.loads(pickle.dumps(function))
    for text in ("xxy", "Foo  bar", "fine", NOISE):
        assert copy({"text": text}) == function({"text": text})
    code = "import sys; import tpu_tune.data.clean; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# Pieces that make rules fire together and in turn.
PIECES = [
    "As an AI language model. ",
    "trained by OpenAI ",
    "Hello. ",
    "a@example.com ",
    "\n",
    "schÃ¶n ",
    "x",
    "No! ",
    "💡",
]
texts = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
any_row = st.one_of(
    texts.map(lambda text: {"text": text}),
    st.tuples(texts, texts).map(lambda pair: {"input": pair[0], "output": pair[1], "n": 1}),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
        lambda turns: {"messages": [message for q, a in turns for message in (user(q), assistant(a))]}
    ),
    st.sampled_from([{"foo": "bar"}, {"text": None}]),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(any_row, min_size=1, max_size=12),
    action=st.sampled_from(["drop", "truncate"]),
    near=st.sampled_from([None, 0.7]),
    repairs=st.booleans(),
    prompts=st.booleans(),
    min_chars=st.sampled_from([0, 3]),
)
def test_rows_in_are_rows_out_and_dropped(tmp_path_factory, rows, action, near, repairs, prompts, min_chars):
    directory = tmp_path_factory.mktemp("law")
    source = write(directory / "in.jsonl", [{**row, "id": number} for number, row in enumerate(rows)])
    options = CleanOptions(
        action=action,
        near_duplicates=near,
        fix_unicode=repairs,
        mask_email=repairs,
        prompts=prompts,
        min_chars=min_chars,
    )
    figures = clean.clean([source], directory / "out.jsonl", options, skip_bad=True)
    out = read(directory / "out.jsonl")
    assert figures["rows_in"] == len(rows) == figures["rows_out"] + figures["rows_dropped"]
    assert figures["rows_out"] == len(out)
    assert sum(rule["dropped"] for rule in figures["rules"]) == figures["rows_dropped"]
    assert all(rule["rows"] >= max(rule["dropped"], len(rule["examples"]), 1) for rule in figures["rules"])
    numbers = [row["id"] for row in out]
    assert numbers == sorted(set(numbers))
    changed = sum(row != {**rows[row["id"]], "id": row["id"]} for row in out)
    assert max(figures["rows_cut"], figures["rows_changed"]) <= changed
    assert changed <= figures["rows_cut"] + figures["rows_changed"]
    if out:  # what is clean stays as it is
        again = clean.clean([directory / "out.jsonl"], directory / "again.jsonl", options)
        assert (directory / "again.jsonl").read_bytes() == (directory / "out.jsonl").read_bytes(), again


def test_files_in_and_out(tmp_path):
    good = {"text": "Grüße 😀\n\ttab \u2028 “x”", "score": 1.5, "big": 2**70, "nested": {"b": [None, True]}}
    first = write(tmp_path / "a.jsonl", [good, {"text": NOISE}])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'\n{"text": "two"}\n{"text": "As an AI language model"}\n'))
    output, report = tmp_path / "out" / "clean.jsonl", tmp_path / "report.json"
    figures = clean.clean([first, tmp_path / "b.jsonl.gz"], output, report=report)
    assert read(output) == [good, {"text": "two"}]
    assert output.read_bytes().splitlines()[0] == first.read_bytes().splitlines()[0]
    assert json.loads(report.read_text()) == figures
    [rule] = figures["rules"]
    assert (rule["rule"], rule["rows"], rule["dropped"]) == ("phrase: As an AI language model", 2, 2)
    assert rule["examples"][0] == {"where": f"{first}:2", "effect": "dropped", "snippet": NOISE}
    assert rule["examples"][1]["where"].endswith("b.jsonl.gz:3")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl.gz", "out", "report.json"]


def test_a_row_with_two_phrases_counts_for_both_and_is_dropped_by_one(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "trained by OpenAI as an AI language model, trained by OpenAI"}])
    figures = clean.clean([source], None, dry_run=True)
    assert {rule["rule"]: (rule["rows"], rule["dropped"]) for rule in figures["rules"]} == {
        "phrase: As an AI language model": (1, 1),
        "phrase: trained by OpenAI": (1, 0),
    }


def test_bad_rows_stop_or_are_counted_and_nothing_is_half_written(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "one"}\n{"text": \n\xff\n{"foo": 1}\n{"text": "two"}\n')
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"in.jsonl:2: not valid JSON"):
        clean.clean([source], output)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    figures = clean.clean([source], output, skip_bad=True)
    assert (figures["rows_in"], figures["rows_out"], figures["rules"][-1]["dropped"]) == (5, 2, 3)
    assert [example["where"][-2:] for example in figures["rules"][-1]["examples"]] == [":2", ":3", ":4"]


def test_what_cannot_be_printed_or_walked_through(tmp_path, capsys):
    deep = "[" * 900 + "]" * 900
    rows = [
        '{"text": "trained by OpenAI \\ud83d \\u001b[31m"}',
        f'{{"messages": [], "a": {deep}}}',
        '{"text": "\\ud83d"}',
    ]
    rows.append(f'{{"prompt": "a", "completion": "b", "tools": {deep}}}')
    source, output, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    source.write_text("\n".join(rows))
    status, out, _ = run(capsys, source, "--output", output, "--report", report, "--skip-bad")
    assert status == 0 and "4 rows in = " in out and "\x1b" not in out
    out.encode("utf-8")
    assert (
        json.loads(report.read_text(encoding="utf-8"))["rules"][0]["examples"][0]["snippet"]
        == "trained by OpenAI \ufffd \ufffd[31m"
    )
    assert {"text": "\ud83d"} in read(output)


def test_an_interruption_leaves_the_old_output(tmp_path, monkeypatch):
    source, output = write(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b"}]), tmp_path / "out.jsonl"
    output.write_text("old\n")

    def stop(self, row, where=""):
        raise KeyboardInterrupt

    monkeypatch.setattr(clean.Duplicates, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        clean.clean([source], output)
    assert output.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 2


def run(capsys, *words):
    capsys.readouterr()
    status = main(["data", "clean", *map(str, words)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("# my list\n\nkittens and puppies\n", encoding="utf-8")
    rows = [
        {"text": t} for t in ("Fine.", "I CANNOT fulfill that request", "Kittens  and puppies!", NOISE, "b0b", "Fine. ")
    ]
    source, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    words = [source, "--output", output, "--refusals", "--phrases", tmp_path / "mine.txt", "--pattern", r"b\db"]
    status, out, _ = run(capsys, *words, "--dry-run", "--report", tmp_path / "report.json")
    assert status == 0 and "6 rows in = 1 out + 5 dropped" in out and "nothing was written" in out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "mine.txt"]
    status, out, _ = run(capsys, *words, "--json", "--report", tmp_path / "report.json")
    assert status == 0 and json.loads(out) == json.loads((tmp_path / "report.json").read_text())
    assert {rule["rule"] for rule in json.loads(out)["rules"]} == {
        "phrase: I cannot fulfill that request",
        "phrase: kittens and puppies",
        "phrase: As an AI language model",
        r"pattern: b\db",
        "exact duplicate",
    }
    assert read(output) == [{"text": "Fine."}]
    _, out, _ = run(capsys, source, "--dry-run", "--no-default-phrases", "--no-exact-duplicates", "--json")
    assert json.loads(out)["rows_out"] == 6
    _, out, _ = run(capsys, source, "--dry-run", "--action", "truncate", "--json")
    assert json.loads(out)["rows_cut"] == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["in.jsonl"], "needs an output"),
        (["in.jsonl", "--output", "in.jsonl"], "in.jsonl: is also an input"),
        (["gone.jsonl", "--output", "x"], "gone.jsonl: cannot be read (No such file or directory)"),
        (["empty.jsonl", "--output", "x"], "empty.jsonl: no rows"),
        (["in.jsonl", "--output", "x", "--pattern", "[a"], "not a regular expression"),
        (["in.jsonl", "--output", "x", "--phrases", "gone.txt"], "gone.txt: cannot be read"),
        (["in.jsonl", "--output", "x", "--phrases", "empty.jsonl"], "empty.jsonl: holds no phrase"),
        (["in.jsonl", "--output", "x", "--columns", "{"], "--columns: not valid JSON"),
        (
            ["in.jsonl", "--output", "x", "--columns", '{"a": "text"}'],
            "in.jsonl: data.columns names 'a', which no row has",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "empty.jsonl").write_text("")
    status, out, err = run(capsys, *words)
    assert status == 1 and out == "" and err.count("\n") == 1 and message in err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty.jsonl", "in.jsonl"]


def test_help_has_an_example_that_parses(capsys):
    from tpu_tune.cli.program import make_parser

    with pytest.raises(SystemExit):
        main(["data", "clean", "--help"])
    example = capsys.readouterr().out.rstrip().rsplit("\n", 1)[-1].split()
    assert make_parser().parse_args(example[1:]).near_duplicates == 0.8


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        ({"input": "Q", "output": ""}, False),
        ({"input": "Q", "output": " \n\t"}, False),
        ({"text": ""}, False),
        ({"messages": [user("Q"), assistant("")]}, False),
        ({"messages": [user("Q"), assistant(""), user("And?"), assistant("Yes")]}, True),
        ({"messages": [user("Q"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])]}, True),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}]}, False),
        ({"input": "", "output": "A"}, True),
    ],
)
def test_rows_whose_answers_are_empty_are_dropped_if_asked(row, stays):
    assert cleaned(row)[0] is row
    kept, hits = cleaned(row, drop_empty=True)
    assert (kept is row) == stays and [(hit.rule, hit.effect) for hit in hits] == [("empty answer", "dropped")][stays:]


def test_drop_empty_on_the_command_line(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [{"input": "a", "output": "b"}, {"input": "q", "output": ""}])
    assert main(["data", "clean", str(source), "--output", str(tmp_path / "out.jsonl"), "--drop-empty"]) == 0
    assert read(tmp_path / "out.jsonl") == [{"input": "a", "output": "b"}]
    assert "empty answer" in capsys.readouterr().out
