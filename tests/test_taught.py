"""A model is asked in the form that it was taught in: by generate, by the samples of a run, and on its card."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
from helpers_eval import write_run
from helpers_training import write_tiny_llama

from tpu_tune.checkpoints.prompts import taught_as
from tpu_tune.cli import main
from tpu_tune.data.formats import STANFORD_ALPACA_WITHOUT_INPUT, convert
from tpu_tune.inference.run_model import load_any

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"
ASKED = "[user]What is AI?</s>[assistant]"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def run(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_run(tiny, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    ("counts", "form"),
    [
        ({"formats": {"messages": 5}, "chats": 5, "pairs": 0}, "chat"),
        ({"formats": {"input-output-as-chat": 5}, "chats": 5, "pairs": 0}, "chat"),
        ({"formats": {"prompt-completion": 5}, "chats": 5, "pairs": 0}, "chat"),  # whose prompts are messages
        ({"formats": {"input-output": 5, "text": 9}, "chats": 0, "pairs": 5}, "plain"),
        ({"formats": {"input-output": 5, "messages": 4}, "chats": 4, "pairs": 5}, "plain"),
        ({"formats": {"input-output": 1, "alpaca": 5}, "chats": 0, "pairs": 6}, "alpaca"),
        ({"formats": {"text": 5}, "chats": 0, "pairs": 0}, "plain"),
        ({"format": "sharegpt"}, "chat"),  # of runs from before rows were counted by format
        ({"format": "alpaca"}, "alpaca"),
        ({"format": "tokenized messages", "formats": {"messages": 3}}, "chat"),
        ({"format": "tokenized"}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_the_form_follows_from_the_rows(counts, form):
    assert taught_as(counts) == form


def teach(run: pathlib.Path, **counts: object) -> None:
    (run / "summary.json").write_text(json.dumps({"data": {"train": counts}} if counts else {}))


ALPACA = convert({"instruction": "What is AI?", "output": ""}, "alpaca").source


@pytest.mark.parametrize(
    ("counts", "text", "said"),
    [
        ({"formats": {"input-output": 5}, "chats": 0, "pairs": 5}, "What is AI?", "note: asked in plain text"),
        ({"formats": {"alpaca": 5}, "chats": 0, "pairs": 5}, ALPACA, "note: asked with Stanford Alpaca's prompt"),
        ({"formats": {"messages": 5}, "chats": 5, "pairs": 0}, ASKED, ""),
        ({}, ASKED, ""),
    ],
)
def test_generate_asks_as_the_rows_did(run, tiny, monkeypatch, capsys, counts, text, said):
    from tpu_tune.inference import model as model_module

    teach(run, **counts)
    asked = []
    monkeypatch.setattr(model_module, "generate", lambda *args: asked.extend(args[4]) or ["An answer"])
    for words in (["--model", run], ["--model", tiny, "--adapter", run / "adapter"]):  # the run, or its adapter
        asked.clear()
        assert main(["generate", *map(str, words), "--prompt", "What is AI?"]) == 0
        tokenizer = load_any(str(tiny)).tokenizer
        assert tokenizer.decode(asked[0]) == text
        assert capsys.readouterr().err.startswith(said) if said else capsys.readouterr().err == ""
        for option, other in (("--chat", ASKED), ("--no-chat", "What is AI?")):  # asked for outright
            asked.clear()
            assert main(["generate", *map(str, words), "--prompt", "What is AI?", option]) == 0
            assert tokenizer.decode(asked[0]) == other and capsys.readouterr().err == ""


def test_exact_match_asks_as_the_rows_did(run, tmp_path, monkeypatch, capsys):
    from tpu_tune.training.tasks import exact_match

    teach(run, formats={"alpaca": 5}, chats=0, pairs=5)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": "What is AI?", "output": "A word"}) + "\n")
    asked = []
    monkeypatch.setattr(exact_match, "answer_all", lambda model, prompts, _: asked.extend(prompts) or ["A word"])
    words = ["eval", "--model", str(run), "--task", "exact-match", "--data", str(tmp_path / "rows.jsonl"), "--json"]
    tokenizer = load_any(str(run)).tokenizer
    for option, text in (([], "Question: What is AI?\nAnswer:"), (["--chat"], ASKED), (["--as-taught"], ALPACA)):
        asked.clear()
        assert main([*words, *option]) == 0 and json.loads(capsys.readouterr().out)["exact_match"] == 1.0
        assert tokenizer.decode(asked[0]) == text
    assert main([*words, "--as-taught", "--shots", "1"]) == 1
    assert "solved examples go with neither the chat template nor --as-taught" in capsys.readouterr().err


def test_which_models_know_how_they_were_taught(run, tiny, tmp_path):
    teach(run, formats={"input-output": 5}, chats=0, pairs=5)
    assert load_any(str(run)).taught == "plain"
    assert load_any(str(run), before=True).taught == "plain"  # so that both are asked alike where they are compared
    shutil.copytree(run / "adapter", tmp_path / "adapter")  # where no run says how it was taught
    assert load_any(str(tiny), adapter=str(tmp_path / "adapter")).taught == ""


def test_a_merged_model_and_a_gguf_file_know_how_they_were_taught(run, tmp_path):
    from tpu_tune.inference.export import export_gguf, export_merged

    teach(run, formats={"alpaca": 5}, chats=0, pairs=5)
    export_merged(str(run), str(tmp_path / "merged"))
    export_gguf(str(run), str(tmp_path / "m.gguf"))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tpu_tune"] == {"taught_as": "alpaca"}
    assert [load_any(str(tmp_path / name)).taught for name in ("merged", "m.gguf")] == ["alpaca", "alpaca"]
    # What is trained further on is not asked as its base was, unless its own rows asked so.
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert load_any(str(tmp_path / "merged"), adapter=str(tmp_path / "adapter")).taught == ""
    teach(run)
    export_merged(str(run), str(tmp_path / "unknown"))
    assert "tpu_tune" not in json.loads((tmp_path / "unknown" / "config.json").read_text())


def test_the_card_asks_as_the_rows_did(tiny):
    from tpu_tune import config as configuration
    from tpu_tune.inference.card import CardFacts, _torch_use, _use

    def snippets(**counts: object) -> str:
        fields = {name: None for name in CardFacts.__dataclass_fields__}
        facts = CardFacts(**{**fields, "config": configuration.default(), "summary": {"data": {"train": counts}}})
        return _use(facts) + _torch_use(facts)

    assert "chat=False" not in snippets(formats={"alpaca-as-chat": 2}, chats=2, pairs=0)
    assert "generate(['What is AI?'], chat=False)" in snippets(formats={"text": 2}, chats=0, pairs=0)
    asked = repr(STANFORD_ALPACA_WITHOUT_INPUT.format(instruction="What is AI?"))
    assert snippets(formats={"alpaca": 2}, chats=0, pairs=2).count(asked) == 2
