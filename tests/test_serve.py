"""`tpu-tune serve`, asked by the `openai` client: answers, streams, errors, limits."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import helpers_training as helpers
import numpy as np
import pytest
from helpers_eval import log_softmax, padded_logits, write_run
from helpers_serve import Door, Engine, Limits, client, openai, served
from test_taught import TEMPLATE

from tpu_tune.cli import main
from tpu_tune.errors import UserError
from tpu_tune.inference import Sampling
from tpu_tune.inference.serving.models import load_models

LIMITS = Limits(slots=4, queue=32, max_length=160, max_new_tokens=100)
# Prompts of one rounded length, 33 to 64 tokens, so that few shapes are compiled.
QUESTION = "What is AI, and what is it not?"
HELLO = [{"role": "user", "content": QUESTION}]
PLAIN = ["The first of two texts to go on from: ", "The second, which is a little longer: "]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = helpers.write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return write_run(folder, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def models(run: pathlib.Path) -> dict[str, Any]:
    return load_models(str(run), quantize="none")


@pytest.fixture(scope="module")
def engine(models: dict[str, Any]) -> Engine:
    made = Engine(models, LIMITS)
    made.start()
    return made


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine, Door(max_body=5000)) as address:
        yield address


@pytest.fixture(scope="module")
def api(address: str) -> Any:
    return client(address)


def test_a_run_is_its_base_and_itself_over_the_same_weights(api: Any, models: dict[str, Any]) -> None:
    assert [model.id for model in api.models.list()] == ["tiny", "run"] == list(models)
    assert api.models.retrieve("run").object == "model"
    base, tuned = (models[name].params["model.layers.self_attn.q_proj.weight"] for name in ("tiny", "run"))
    assert tuned.base is base


def test_who_asks_at_the_same_time_gets_what_generate_answers(api: Any, models: dict[str, Any]) -> None:
    """Twelve on four slots: answers of several lengths, of the base and of the adapter, greedy and drawn."""
    texts = ["Why? " * words for words in (4, 5, 6)]
    cases = [(name, text, count) for text in texts for count, name in zip((7, 18), models, strict=True)]
    cases += [(name, text, 12) for text in texts[:1] for name in models]
    drawn = [("run", QUESTION, seed) for seed in range(4)]

    def asked(name: str, text: str, count: int, **how: Any) -> str:
        messages = [{"role": "user", "content": text}]
        answer = api.chat.completions.create(model=name, messages=messages, max_tokens=count, **how)
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        greedy = [pool.submit(asked, *case, temperature=0) for case in cases]
        random = [pool.submit(asked, name, text, 9, temperature=0.8, top_p=0.9, seed=s) for name, text, s in drawn]
    expected = {(name, count): models[name].generate(texts, Sampling(count), chat=True) for name, _, count in cases}
    for (name, text, count), answer in zip(cases, greedy, strict=True):
        assert answer.result() == expected[name, count][texts.index(text)]
    for (name, text, seed), answer in zip(drawn, random, strict=True):
        sampling = Sampling(9, temperature=0.8, top_p=0.9, seed=seed)
        assert answer.result() == models[name].generate([text], sampling, chat=True)[0]


def test_a_stream_is_the_answer_in_pieces(api: Any, models: dict[str, Any]) -> None:
    expected = models["run"].generate([QUESTION], Sampling(20), chat=True)[0]
    how = {"model": "run", "messages": HELLO, "max_completion_tokens": 20, "temperature": 0}
    *chunks, last = api.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert len(chunks) >= 4 and len({chunk.id for chunk in chunks}) == 1
    assert last.choices == [] and last.usage.completion_tokens == 20


def test_completions_go_on_from_each_prompt(api: Any, models: dict[str, Any]) -> None:
    expected = [models["tiny"].generate([text], Sampling(8), chat=False)[0] for text in PLAIN]
    how = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    texts = [choice.text for choice in api.completions.create(prompt=PLAIN, n=2, **how).choices]
    assert texts == [expected[0], expected[0], expected[1], expected[1]]
    ids = models["tiny"].encode_prompt(PLAIN[0])
    assert api.completions.create(prompt=ids, echo=True, **how).choices[0].text == PLAIN[0] + expected[0]
    pieces: dict[int, str] = {0: "", 1: ""}
    for chunk in api.completions.create(prompt=PLAIN, stream=True, **how):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert list(pieces.values()) == expected
    drawn = [
        api.completions.create(model="tiny", prompt=PLAIN[0], n=3, seed=5, temperature=1).choices for _ in range(2)
    ]
    assert len({choice.text for choice in drawn[0]}) == 3
    assert [choice.text for choice in drawn[0]] == [choice.text for choice in drawn[1]]


def test_a_stop_ends_an_answer_before_it(api: Any, models: dict[str, Any]) -> None:
    whole = models["tiny"].generate([QUESTION], Sampling(30), chat=True)[0]
    stop = whole[11:14]
    how = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "temperature": 0}
    answer = api.chat.completions.create(**how, stop=["never this", stop], logprobs=True)
    said = answer.choices[0].message.content
    assert said == whole[: whole.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 30
    assert "".join(token.token for token in answer.choices[0].logprobs.content) == said
    chunks = api.chat.completions.create(**how, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == said


def test_log_probabilities_are_the_models(api: Any, models: dict[str, Any]) -> None:
    model = models["run"]
    how = {"model": "run", "max_tokens": 6, "temperature": 0.7, "seed": 3}
    ids = model.encode_prompt(QUESTION, chat=True)
    found = api.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **how).choices[0].logprobs
    said = [token.bytes[0] for token in found.content]  # the tiny model's tokens are bytes
    rows = log_softmax(padded_logits(model, [*ids, *said]))[len(ids) - 1 : -1]
    np.testing.assert_allclose([t.logprob for t in found.content], rows[np.arange(len(said)), said], atol=2e-4)
    for token, row in zip(found.content, rows, strict=True):
        np.testing.assert_allclose([top.logprob for top in token.top_logprobs], np.sort(row)[::-1][:3], atol=2e-4)
    # The same tokens in the other shape: plain text that is the chat's.
    text = f"[user]{QUESTION}</s>[assistant]"
    old = api.completions.create(prompt=model.tokenizer(text, add_special_tokens=False)["input_ids"], logprobs=2, **how)
    old = old.choices[0].logprobs
    np.testing.assert_allclose(old.token_logprobs, [token.logprob for token in found.content], atol=1e-5)
    assert old.text_offset[0] == 0 and len(old.tokens) == len(old.top_logprobs) == 6


BAD: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4"}, 404, "model", "there is no model 'gpt-4'; there is tiny, run"),
    ({"messages": []}, 400, "messages", "is empty"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role", "must be one of system"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", "text only"),
    ({"temperature": 3}, 400, "temperature", "at most 2"),
    ({"temperature": "hot"}, 400, "temperature", "must be a finite number"),
    ({"max_tokens": 0}, 400, "max_tokens", "a whole number from 1"),
    ({"max_tokens": 101}, 400, "max_tokens", "at most 100 tokens"),
    ({"messages": [{"role": "user", "content": "x" * 200}]}, 400, "messages", "of this server; shorten"),
    ({"n": 17}, 400, "n", "from 1 to 16"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs 'logprobs'"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "is not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "is not supported"),
    ({"extra_body": {"grammar": "x"}}, 400, "grammar", "not a parameter"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "is not supported"),
]


@pytest.mark.parametrize(("change", "status", "param", "words"), BAD)
def test_a_bad_request_gives_the_apis_error(
    api: Any, change: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        api.chat.completions.create(**{"model": "run", "messages": HELLO, "max_tokens": 4} | change)
    assert caught.value.status_code == status and caught.value.param == param
    assert words in caught.value.message and caught.value.type == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_taken(api: Any) -> None:
    nothing = {"frequency_penalty": 0, "tools": [], "response_format": {"type": "text"}, "user": "me", "store": False}
    messages = [*HELLO, {"role": "assistant", "content": "Yes.", "refusal": None}, *HELLO]
    assert api.chat.completions.create(model="run", messages=messages, max_tokens=2, seed=None, **nothing).choices


def posted(address: str, body: bytes, kind: str = "application/json", path: str = "/v1/completions") -> Any:
    """Return status, headers and object of a plain request."""
    request = urllib.request.Request(address + path, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def test_what_is_no_request_of_the_api(address: str) -> None:
    for body, kind, path, status in [
        (b"x" * 5001, "application/json", "/v1/completions", 413),
        (b"{}", "text/plain", "/v1/completions", 415),
        (b"{", "application/json", "/v1/chat/completions", 400),
        (b"[1]", "application/json", "/v1/chat/completions", 400),
        (b"{}", "application/json", "/v1/chat/completions", 400),
        (b"{}", "application/json", "/v1/embeddings", 404),
        (b"{}", "application/json", "/v1/models", 405),
    ]:
        found, _, content = posted(address, body, kind, path)
        assert found == status and content["error"]["message"]
        assert content["error"]["type"] == "invalid_request_error"


def test_without_the_key_nobody_is_answered(models: dict[str, Any]) -> None:
    with served(Engine(models, LIMITS), Door("secret", hosts=("127.0.0.1",))) as address:
        for key in ("wrong", "sécret"):
            assert ask_models(address, key) == 401
        assert ask_models(address, "secret") == 200
        assert ask_models(address, "secret", host="evil.example") == 400
        with pytest.raises(openai.AuthenticationError, match="API key is wrong"):
            client(address, "other").chat.completions.create(model="run", messages=HELLO)


def ask_models(address: str, key: str, **headers: str) -> int:
    headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1"), **headers}
    request = urllib.request.Request(f"{address}/v1/models", headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_full_queue_says_429_and_leaving_makes_room(models: dict[str, Any]) -> None:
    """Its engine does not run, so that what is asked waits."""
    engine = Engine(models, Limits(slots=1, queue=0, max_length=160, max_new_tokens=100))
    with served(engine, Door(timeout=30)) as address:
        stream = client(address).completions.with_streaming_response.create
        left = stream(model="tiny", prompt="x", stream=True)
        left.__enter__()
        assert engine.load() == (0, 1)
        status, headers, content = posted(address, b'{"model": "tiny", "prompt": "x"}')
        assert status == 429 and headers["Retry-After"] == "2"
        assert content["error"]["code"] == "rate_limit_exceeded"
        waiting = engine._waiting[0]
        left.__exit__(None, None, None)
        assert eventually(lambda: waiting.cancelled)
        with pytest.raises(openai.APITimeoutError):  # a place is free; it waits there until its client goes
            client(address, timeout=0.5).completions.create(model="tiny", prompt="y")
        second = engine._waiting[0]
        assert second is not waiting and eventually(lambda: second.cancelled)
        with pytest.raises(openai.BadRequestError, match="more than the 1 that"):
            client(address).completions.create(model="tiny", prompt=["x", "y"])


def eventually(holds: Any) -> bool:
    """Whether something comes to hold within 20 seconds."""
    ticks = threading.Event()
    return any(holds() or ticks.wait(0.02) for _ in range(1000)) or bool(holds())


def test_an_answer_in_time_or_an_error(models: dict[str, Any]) -> None:
    with served(Engine(models, LIMITS), Door(timeout=0.2)) as address:
        with pytest.raises(openai.InternalServerError) as caught:
            client(address).completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than 0.2 seconds"):
            list(client(address).completions.create(model="tiny", prompt="x", stream=True))


def test_a_failure_on_the_device_ends_its_answers_only(
    api: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with monkeypatch.context() as patched:
        patched.setattr("tpu_tune.inference.serving.batch.read_prompt", fail)
        with pytest.raises(openai.InternalServerError, match="the server failed while it wrote"):
            api.completions.create(model="tiny", prompt="x")
    assert api.completions.create(model="tiny", prompt=PLAIN[0], max_tokens=2).choices


def test_the_end_of_the_server_ends_its_answers(models: dict[str, Any]) -> None:
    engine = Engine(models, LIMITS)
    with served(engine) as address, concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client(address).completions.create, model="tiny", prompt="x")
        assert eventually(lambda: engine.load() == (0, 1))
        engine.stop()
        engine.start()
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            asked.result()
        with pytest.raises(openai.InternalServerError) as caught:
            client(address).completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503


def test_a_model_taught_in_plain_text_is_asked_so(run: pathlib.Path, models: dict[str, Any]) -> None:
    import dataclasses

    plain = {"run": dataclasses.replace(models["run"], taught="plain")}
    engine = Engine(plain, LIMITS)
    engine.start()
    with served(engine) as address:
        api = client(address)
        answer = api.chat.completions.create(model="run", messages=HELLO, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content == plain["run"].generate([QUESTION], Sampling(8))[0]
        with pytest.raises(openai.BadRequestError, match="taught in plain text"):
            api.chat.completions.create(model="run", messages=[{"role": "system", "content": "x"}, *HELLO])


def test_mistakes_on_the_command_line_are_one_line(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="two models are called 'run'"):
        load_models(str(run), [f"{run}/adapter"])
    with pytest.raises(UserError, match="give NAME=DIR"):
        load_models(str(run), ["=x"])
    for words, message in [
        (["--json"], "serve has no --json"),
        (["--api-key", ""], "--api-key is empty"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: "),
    ]:
        assert main(["serve", "--model", str(run), *words]) == 1
        assert message in capsys.readouterr().err
