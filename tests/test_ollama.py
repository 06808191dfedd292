"""Ollama's Modelfile: its Go template says what the chat template says, or there is none."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoTokenizer

from tpu_tune.checkpoints.ollama import Turns, turns_of, write_modelfile
from tpu_tune.checkpoints.source import open_source
from tpu_tune.checkpoints.weight_source import WeightSource

CHAT = [("system", "Be\nbrief."), ("user", "What is 2+2?"), ("assistant", "4 {{ four }}"), ("user", "And 3+3?")]


@pytest.fixture(scope="module")
def qwen3(npm_tokenizer: Callable[[str], pathlib.Path]) -> Any:
    return AutoTokenizer.from_pretrained(npm_tokenizer("qwen3"))


@pytest.fixture(scope="module")
def gemma3(npm_tokenizer: Callable[[str], pathlib.Path]) -> Any:
    return AutoTokenizer.from_pretrained(npm_tokenizer("gemma3"))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: pathlib.Path) -> WeightSource:
    return open_source(str(smollm2_gguf))


def messages(chat: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def jinja(tokenizer: Any, chat: Any) -> str:
    text = tokenizer.apply_chat_template(messages(chat), tokenize=False, add_generation_prompt=True)
    return text.removeprefix("<bos>")  # Gemma's, which its tokenizer puts before every text


def test_templates_as_their_makers_wrote_them(qwen3: Any, gemma3: Any, smollm2: WeightSource) -> None:
    """Gemma has no system turn and its tokenizer puts BOS; SmolLM2 has a system text of its own."""
    assert turns_of(gemma3) == Turns(
        first="<start_of_turn>user\n",
        system="<start_of_turn>user\n",
        after_system="\n\n",
        answer="<end_of_turn>\n<start_of_turn>model\n",
        user="<end_of_turn>\n<start_of_turn>user\n",
        prompt="<end_of_turn>\n<start_of_turn>model\n",
    )
    for tokenizer in (qwen3, gemma3, smollm2.load_tokenizer()):
        turns = turns_of(tokenizer)
        for chat in (CHAT, CHAT[1:], CHAT[:2]):
            assert turns.render(chat) == jinja(tokenizer, chat)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}",  # the number of the turn
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ '{{ ' + m.content }}{% endfor %}",  # would be Go
        "{{ raise_exception('no system turns') }}",
    ],
)
def test_a_template_that_does_more_than_turns_is_not_written(qwen3: Any, template: str) -> None:
    class Tokenizer:
        chat_template, bos_token_id = template, None

        def apply_chat_template(self, chat: Any, **facts: Any) -> str:
            return qwen3.apply_chat_template(chat, chat_template=template, **facts)

    assert turns_of(Tokenizer()) is None


def test_a_modelfile(smollm2: WeightSource, tmp_path: pathlib.Path) -> None:
    gguf = str(tmp_path / "m.gguf")
    assert write_modelfile(gguf, smollm2)
    content = (tmp_path / "m.Modelfile").read_text()
    assert content.startswith('FROM ./m.gguf\nTEMPLATE """{{ $first := true }}{{ range .Messages }}')
    assert content.endswith('{{ end }}<|im_end|>\n<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')
    taught = dataclasses.replace(smollm2, config={**smollm2.config, "tpu_tune": {"taught_as": "alpaca"}})
    assert write_modelfile(gguf, taught)
    content = (tmp_path / "m.Modelfile").read_text()
    assert "### Instruction:\n{{ .Prompt }}\n\n### Response:" in content and "stop" not in content


GO = """package main
import ("encoding/json"; "os"; "text/template")
func main() {
  var given struct { Template, System string; Messages []struct{ Role, Content string } }
  if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil { panic(err) }
  facts := map[string]any{"System": given.System, "Messages": given.Messages}
  if err := template.Must(template.New("").Parse(given.Template)).Execute(os.Stdout, facts); err != nil { panic(err) }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="no Go, whose templates Ollama's are")
def test_go_writes_what_jinja_writes(qwen3: Any, gemma3: Any, smollm2: WeightSource, tmp_path: pathlib.Path) -> None:
    (tmp_path / "main.go").write_text(GO)
    for tokenizer in (qwen3, gemma3, smollm2.load_tokenizer()):
        for chat in (CHAT, CHAT[1:], CHAT[:2]):
            system = chat[0][1] if chat[0][0] == "system" else ""
            template = turns_of(tokenizer).go_template()
            given = {"Template": template, "System": system, "Messages": messages(chat)}
            words = ["go", "run", "main.go"]
            ran = subprocess.run(words, cwd=tmp_path, input=json.dumps(given), text=True, capture_output=True)
            assert ran.stdout == jinja(tokenizer, chat), ran.stderr
