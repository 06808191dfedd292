"""`tpu-tune chat`: what a model is shown, what streams, the commands, and the terminal."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import helpers_training as helpers
import pytest
from helpers_eval import write_run
from test_taught import TEMPLATE

from tpu_tune.cli import chat, main
from tpu_tune.inference import Sampling
from tpu_tune.inference.conversation import Conversation
from tpu_tune.inference.run_model import load_any

SAMPLING = Sampling(max_new_tokens=10)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run over a tiny model with a chat template; its adapter changes the answers."""
    folder = helpers.write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return write_run(folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: pathlib.Path) -> Any:
    return load_any(str(run))


def test_an_answer_in_pieces_is_what_generate_returns(model: Any) -> None:
    talk = Conversation(model, chat=True)
    pieces = list(talk.ask("What is AI?", SAMPLING))
    assert len(pieces) >= 3 and "".join(pieces) == model.generate(["What is AI?"], SAMPLING, chat=True)[0]
    assert talk.messages[0] == {"role": "user", "content": "What is AI?"}


def test_the_model_is_shown_what_was_said(model: Any) -> None:
    talk = Conversation(model, "Be brief.", chat=True)
    first = "".join(talk.ask("One?", SAMPLING)).strip()
    "".join(talk.ask("Two?", SAMPLING))
    shown = f"[system]Be brief.</s>[user]One?</s>[assistant]{first}</s>[user]Two?</s>[assistant]"
    asked = talk._encoded(talk.messages[:3])
    assert asked == model.tokenizer(shown, add_special_tokens=False)["input_ids"]
    assert talk.take_back() == "Two?" and len(talk.messages) == 2
    assert talk.take_back() == "One?" and talk.take_back() is None


def test_in_plain_text_each_question_stands_alone(model: Any) -> None:
    talk = Conversation(model, chat=False)
    for _ in range(2):
        assert "".join(talk.ask("One", SAMPLING)) == model.generate(["One"], SAMPLING, chat=False)[0]
    assert not talk.remembers


def test_what_was_said_until_ctrl_c_stays(model: Any) -> None:
    talk = Conversation(model, chat=True)
    answer = talk.ask("One?", SAMPLING)
    said = next(answer)
    with pytest.raises(KeyboardInterrupt):
        answer.throw(KeyboardInterrupt)
    assert talk.messages[-1] == {"role": "assistant", "content": said.strip()}


def test_half_of_a_character_waits_for_the_other(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    ids = list("aé€".encode())  # the tiny model's tokens are bytes
    grown = [[ids[:count]] for count in range(1, len(ids) + 1)]
    monkeypatch.setattr("tpu_tune.inference.conversation.stream_ids", lambda *args: iter(grown))
    talk = Conversation(model, chat=True)
    assert [piece for piece in talk.ask("?", SAMPLING) if piece] == ["a", "é", "€"]


def test_lines_of_standard_input(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["One?", "/retry", "/system Be brief.", '"""', "Two", 'lines"""', "/set top_k 3", "/bogus", "/set x 1"]
    lines += ["/set seed a", "/help", "", "/exit", "not asked"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    asked: list[tuple[str, Any, Any]] = []

    def ask(talk: Any, text: str, sampling: Any) -> Any:
        asked.append((talk.system, text, sampling.seed))
        talk.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        yield from ("Ye", "s.")

    monkeypatch.setattr(Conversation, "ask", ask)
    assert main(["chat", "--model", str(run), "--compare"]) == 0
    found = capsys.readouterr()
    assert asked == [
        *[("", "One?", 0)] * 2, *[("", "One?", 1)] * 2, *[("Be brief.", "Two\nlines", 1)] * 2,
    ]  # fmt: skip
    assert found.out.count("[base] Yes.\n[tuned] Yes.\n") == 3 and "top_k=3" in found.out
    assert all(name in found.out for name in chat.HELP)
    errors = [line for line in found.err.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: /bogus is no command; /help lists them",
        "error: /set x: choose max_new_tokens, temperature, top_k, top_p, seed",
        "error: /set seed a: that is no number of its kind (1)",
    ]


def test_compare_needs_something_to_compare_with(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = load_any(str(run)).source.path
    assert main(["chat", "--model", merged, "--compare"]) == 1
    assert "--model a run, or give --adapter" in capsys.readouterr().err
    assert main(["chat", "--model", merged, "--json"]) == 1


def test_the_terminal_is_prompt_toolkits() -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("One?\rbegun\x03Two\r\x04")
        assert list(chat._typed()) == ["One?", "Two"]
