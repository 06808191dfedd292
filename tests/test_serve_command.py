"""The command `tpu-tune serve` as a process: two minutes of many who ask at once, its page in a browser, its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import helpers_training as helpers
import pytest
from helpers_eval import write_run
from helpers_serve import client
from test_taught import TEMPLATE

from tpu_tune.inference import Sampling
from tpu_tune.inference.run_model import load_any

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
QUESTIONS = (
    "What is the capital of France?", "Name three fruits.", "Why is the sky blue?", "Write a line about the sea.",
    "What is 2 + 2?", "Who wrote Hamlet?", "Say hello in Spanish.", "What do bees make?",
)  # fmt: skip
COUNT = 24  # tokens of an answer


@contextlib.contextmanager
def command(*words: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run `tpu-tune serve` at any free port; the value is its address, once it serves, and the process."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    line = [sys.executable, "-m", "tpu_tune", "serve", "--port", "0", *words]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        told = []
        for row in process.stderr:
            told.append(row)
            if found := re.search(r"at (http://\S+)/v1,", row):
                break
        else:
            pytest.fail("".join(told))
        yield found[1], process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_two_minutes_of_many_lose_nothing(smollm2_gguf: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """One streams chats of the adapter while sixteen others ask, of it and of its base: all get generate's answers."""
    adapter = f"{write_run(smollm2_gguf, tmp_path, scale=0.03)}/adapter"
    answers: list[tuple[str, str, str]] = []
    failures: list[Exception] = []

    def ask(api: Any, model: str, question: str, stream: bool) -> None:
        how = {"model": model, "max_tokens": COUNT, "temperature": 0, "stream": stream}
        try:
            answer = api.chat.completions.create(messages=[{"role": "user", "content": question}], **how)
            if stream:
                text = "".join(chunk.choices[0].delta.content for chunk in answer)
            else:
                text = answer.choices[0].message.content
            answers.append((model, question, text))
        except Exception as error:
            failures.append(error)

    words = ["--model", str(smollm2_gguf), "--name", "smol", "--adapter", f"tuned={adapter}"]
    with command(*words) as (address, process):
        end = time.monotonic() + 120

        def keep_asking(place: int) -> int:
            api, count = client(address, timeout=600), 0
            while time.monotonic() < end:
                model = "tuned" if place == 0 or (place + count) % 3 else "smol"
                ask(api, model, QUESTIONS[(place + count) % len(QUESTIONS)], stream=place == 0)
                count += 1
            return count

        with concurrent.futures.ThreadPoolExecutor(17) as pool:
            asked = list(pool.map(keep_asking, range(17)))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert not failures and len(answers) == sum(asked) and min(asked) >= 1
    for name, its_adapter in (("smol", None), ("tuned", adapter)):
        model = load_any(str(smollm2_gguf), adapter=its_adapter)
        expected = dict(zip(QUESTIONS, model.generate(QUESTIONS, Sampling(COUNT), chat=True), strict=True))
        given = [(question, text) for other, question, text in answers if other == name]
        assert given and all(text == expected[question] for question, text in given)
    print(f"\n{len(answers)} answers, {asked[0]} of them streamed")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = helpers.write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return write_run(folder, tmp_path_factory.mktemp("run"))


def test_ctrl_c_ends_it_while_it_answers(tiny_run: pathlib.Path) -> None:
    with command("--model", str(tiny_run)) as (address, process):
        stream = client(address).completions.create(model="run", prompt="x", max_tokens=200, n=16, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        rest = process.stderr.read()
        assert "tpu-tune: interrupted" in rest and "Traceback" not in rest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not tried")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium): the page is not tried")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_the_page_chats_and_compares(browser: Any, tiny_run: pathlib.Path) -> None:
    models = {"tiny": load_any(str(tiny_run), before=True), "run": load_any(str(tiny_run))}
    with command("--model", str(tiny_run), "--api-key", "secret") as (address, _):
        page = browser.new_page()
        page.set_default_timeout(120_000)
        asked: list[str] = []
        troubles: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(address)
        page.wait_for_selector("text=the API key is missing")
        unnamed = "[...document.querySelectorAll('input,select,textarea')].filter(e => !e.labels.length).length"
        assert page.evaluate(unnamed) == 0 and page.get_attribute("html", "lang") == "en"
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#second option[value=run]", state="attached")
        assert not page.is_visible("#problem")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("12")
        page.get_by_label("Your message").fill("What is <b>AI</b>?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#stop:disabled")
        for place, name in enumerate(("tiny", "run")):
            expected = models[name].generate(["What is <b>AI</b>?"], Sampling(12), chat=True)[0]
            *_, said = page.locator("section").nth(place).locator(".said p").all()
            texts = [span.text_content() for span in said.locator("span").all()]
            assert texts == [name, expected]
        assert page.locator(".said b").count() == 0  # what is said is text
        page.get_by_role("button", name="Ask again").click()
        page.wait_for_selector("#stop:disabled")
        assert page.locator(".said p").count() == 4
        assert page.evaluate("talks.map(talk => talk.length)") == [2, 2]
        page.get_by_role("button", name="Forget the chat").click()
        assert page.locator(".said p").count() == 0
        page.get_by_label("Temperature").fill("3")  # which the server refuses
        page.get_by_label("Your message").fill("x")
        page.get_by_role("button", name="Send").click()
        page.wait_for_selector("text='temperature' is 3")
        assert page.evaluate("talks.map(talk => talk.length)") == [0, 0]
        assert not troubles and all(url.startswith(address) for url in asked)
