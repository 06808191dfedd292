"""`tpu-tune data look`: what it marks is what a run trains on, token by token."""

import json
import re

import numpy as np
import pytest
from helpers_training import make_config, write_tiny_llama
from test_data_tokens import CHATML, make_tokenizer

from tpu_tune.checkpoints.tokenizers import open_tokenizer
from tpu_tune.cli import main
from tpu_tune.data import load_data
from tpu_tune.data.look import look, show
from tpu_tune.data.tokenize_options import TokenizeOptions
from tpu_tune.errors import UserError

CHAT = [
    {"role": "user", "content": "Hello you\nall"},
    {"role": "assistant", "content": "An \U0001f600 answer\x1b[31m\u202e"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Well"},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def options(**keys):
    return TokenizeOptions(**{"format": "auto", "max_length": 200, **keys})


def out(capsys, *words):
    assert main(["data", "look", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_chat_shows_what_the_assistant_says(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    [view] = look(file, make_tokenizer(), options(chat_template=CHATML))
    assert "".join(view.texts) == (
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nHello you\nall<|im_end|>\n<|im_start|>assistant\n"
        "An \U0001f600 answer\x1b[31m\u202e<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nWell<|im_end|>\n"
    )
    plain = show(view, color=False)
    assert plain == (
        f"== {file}:1: {len(view.texts)} tokens, {view.trained.sum()} trained on, {(~view.trained).sum()} only read\n"
        "<|im_start|>system↵\nBe good.<|im_end|>↵\n<|im_start|>user↵\nHello you↵\nall<|im_end|>↵\n"
        "<|im_start|>assistant↵\n[[An \U0001f600 answer\\x1b[31m\\u202e<|im_end|>]]↵\n"
        "<|im_start|>user↵\nBye<|im_end|>↵\n<|im_start|>assistant↵\n[[Well<|im_end|>]]↵\n"
    )
    colored = show(view, color=True)
    assert re.findall(r"\x1b\[32m(?:\x1b\[7m)?([^\x1b]*)", colored) == [
        "An \U0001f600 answer\\x1b[31m\\u202e",
        "<|im_end|>",
        "Well",
        "<|im_end|>",
    ]
    without = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    assert without.partition("\n")[2] == plain.partition("\n")[2].replace("[[", "").replace("]]", "")


def test_a_wrong_template_is_seen(tmp_path):
    """One that forgets the end token, and one without any way to know the assistant's part."""
    file = write(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    endless = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    [view] = look(file, make_tokenizer(), options(chat_template=endless))
    assert view.notes == ["no end token after the last answer: the model will not learn to stop"]
    assert "(no end token after the last answer" in show(view, color=False)
    with pytest.raises(UserError, match="the chat template does not say which tokens are the assistant's"):
        look(file, make_tokenizer(), options(chat_template="{{ messages[-1]['content'] }}"))
    with pytest.raises(UserError, match="has no chat template"):
        look(file, make_tokenizer(), options())


ROWS = [{"input": f"Ask {i}? ", "output": f"Say {i} \u00e9\u6f22 " * (i % 4)} for i in range(30)]


@pytest.mark.parametrize("keys", [{}, {"train_on_source": True}, {"max_length": 24}, {"source_max_len": 5}])
def test_tokens_and_mask_are_the_trainers(tiny, tmp_path, capsys, keys):
    """Every row, through the command with the run's own keys, against what `load_data` packs for the run."""
    file = write(tmp_path / "rows.jsonl", ROWS)
    named = {f"data__{key}": value for key, value in keys.items()}
    config = make_config(
        model__path=str(tiny),
        data__train=file,
        data__eval_ratio=0.0,
        data__num_workers=1,
        data__cache_dir=str(tmp_path / "cache"),
        **named,
    )
    tokenizer = open_tokenizer(str(tiny))
    data = load_data(config, tokenizer).train.data
    words = [f"--config.data.{key}={json.dumps(value)}" for key, value in keys.items()]
    shown = json.loads(out(capsys, file, "--tokenizer", tiny, "-n", 30, "--json", *words))
    trained = [view for view in shown if view["trained"]]
    assert len(trained) == len(data) and len(shown) == 30
    for index, view in enumerate(trained):
        begin, end = data.offsets[index], data.offsets[index + 1]
        assert view["mask"] == data.loss_mask[begin:end].tolist()
        assert "".join(view["texts"]) == tokenizer.decode(data.tokens[begin:end].tolist())
    for view in shown:
        if not view["trained"]:
            assert view["notes"][0].startswith("not trained on: ")


def test_what_was_cut(tiny, tmp_path, capsys):
    file = write(
        tmp_path / "rows.jsonl", [{"input": "Ask. ", "output": "abcdefghij"}, {"input": "Ask. ", "output": ""}]
    )
    qlora = "--config.data.add_bos_token=always"
    said = out(capsys, file, "--tokenizer", tiny, "--row", 1, "--config.data.max_length=12", qlora)
    assert said == (
        f"== {file}:1: 12 tokens, 6 trained on, 6 only read, 5 cut off\n   (the end of an answer is cut off)\n"
        "<s>Ask. [[abcdef]]\n-- cut off: ghij</s>\n"
    )
    said = out(capsys, file, "--tokenizer", tiny, "--row", 2, qlora)
    assert (
        said == f"== {file}:2: 7 tokens, 0 trained on, 7 only read\n   (not trained on: empty answer)\n<s>Ask. </s>\n"
    )
    long = write(tmp_path / "text.jsonl", [{"text": "abcdefghij"}])
    said = out(capsys, long, "--tokenizer", tiny, "--config.data.max_length=4")
    assert [line for line in said.splitlines() if line] == [
        f"== {long}:1, part 1 of 3: 4 tokens, 3 trained on, 1 only read",
        "a[[bcd]]",
        f"== {long}:1, part 2 of 3: 4 tokens, 3 trained on, 1 only read",
        "e[[fgh]]",
        f"== {long}:1, part 3 of 3: 3 tokens, 2 trained on, 1 only read",
        "i[[j</s>]]",
    ]


def test_the_draw(tiny, tmp_path, capsys):
    """Seeded, in the file's order, every row equally likely; `--row N` is the Nth."""
    file = write(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(20)])
    tokenizer = open_tokenizer(str(tiny))

    def drawn(**keys):
        return [int("".join(view.texts).removesuffix("</s>")) for view in look(file, tokenizer, options(), **keys)]

    assert drawn(seed=1) == drawn(seed=1) == sorted(drawn(seed=1)) and len(set(drawn(seed=1))) == 3
    counts = np.bincount([row for seed in range(200) for row in drawn(seed=seed, count=2)], minlength=20)
    assert counts.min() > 5 and counts.max() < 40  # 20 each on average, with a deviation of 4.2
    assert drawn(count=50) == list(range(20)) and drawn(row=7) == [6]
    assert out(capsys, file, "-t", tiny, "-n", 2) == out(capsys, file, "-t", tiny, "-n", 2, "--seed", 0)


def test_tokenized_files_and_directories(tiny, tmp_path, capsys):
    file = write(tmp_path / "train.jsonl", ROWS)
    assert main(["data", "tokenize", "-i", file, "-o", str(tmp_path / "a" / "rows.arrow"), "-t", str(tiny)]) == 0
    capsys.readouterr()
    rows = out(capsys, file, "-t", tiny, "--row", 2).partition("\n")[2]
    assert out(capsys, tmp_path / "a" / "rows.arrow", "-t", tiny, "--row", 1).partition("\n")[2] == rows
    write(tmp_path / "val.jsonl", [{"text": "not this"}])
    assert out(capsys, tmp_path, "-t", tiny, "--row", 2).partition("\n")[2] == rows


def test_colors_and_the_runs_config(tiny, tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "rows.jsonl", [{"question": "ab", "reply": "cd"}])
    config = tmp_path / "config.py"
    config.write_text(
        "def get_config():\n    return {"
        f"'model': {{'path': {str(tiny)!r}, 'add_special_tokens': ['cd']}}, "
        f"'data': {{'train': {file!r}, 'add_bos_token': 'always', "
        "'columns': {'question': 'input', 'reply': 'output'}}}\n"
    )
    said = out(capsys, "--config", config)
    assert said == f"== {file}:1: 5 tokens, 2 trained on, 3 only read\n<s>ab[[cd</s>]]\n"  # `cd` is one token now
    assert "\x1b[32m\x1b[7mcd</s>" in out(capsys, "--config", config, "--color", "always")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b" in out(capsys, "--config", config)
    assert "\x1b" not in out(capsys, "--config", config, "--no-color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in out(capsys, "--config", config)


def test_complaints(tiny, tmp_path, capsys):
    def refusal(*words):
        assert main(["data", "look", *map(str, words)]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    file = write(tmp_path / "rows.jsonl", [{"title": "a"}])
    assert "give INPUT and --tokenizer, or a --config" in refusal(file)
    assert "rows.jsonl: the format of the data is not known from its keys: title" in refusal(file, "-t", tiny)
    write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": None}])
    assert "has no row 3; it has 2" in refusal(file, "-t", tiny, "--row", 3)
    assert "rows.jsonl:2: 'text' must be a string, not null" in refusal(file, "-t", tiny)
    assert "-n and --row must be at least 1" in refusal(file, "-t", tiny, "-n", 0)
    assert "nowhere.jsonl: cannot be read" in refusal("nowhere.jsonl", "-t", tiny)


def test_a_format_may_be_named(capsys, tmp_path, tiny):
    file = write(tmp_path / "rows.jsonl", [{"text": "Plain.", "input": "Ask ", "output": "Say"}])
    assert "[[Say</s>]]" in out(capsys, file, "-t", tiny, "--format", "input-output", "--no-color")
    assert "P[[lain.</s>]]" in out(capsys, file, "-t", tiny, "--format", "text", "--no-color")
