"""A chat template is a program that came with a model: what it may take is bounded, and how it fails is one line."""

import copy
import time

import pytest
from helpers_training import write_tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpu_tune.checkpoints import template_limits
from tpu_tune.checkpoints.huggingface import load_tokenizer
from tpu_tune.checkpoints.template_limits import TooMuch, bounded, check_template
from tpu_tune.data.chat import render
from tpu_tune.data.formats import Chat, RowError
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import encode_prompt

MESSAGES = ({"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"})
CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{{ '\\n' * 2 }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny")))


def said(tokenizer, template):
    with pytest.raises((UserError, RowError)) as error:
        render(tokenizer, template, Chat(MESSAGES))
    assert str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{{ messages[0].content.encode('ascii').decode('utf-16') }}", "the chat template refuses "),
        ("{% for i in range(10**9) %}{% endfor %}x", "more than 100,000,000"),
        ("{% for i in range(10**7) %}{% endfor %}x", "Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{{ " + "[" * 3000 + "]" * 3000 + " }}", "nested too deeply"),
        ("{{ 'a' * (10**10) }}", "line 1 of the chat template makes a number or a text of more than 100,000,000"),
        ("\n{{ (10**10) * 'a' }}", "line 2 of the chat template makes"),
        ("{{ 'a' * 100000 * 100000 }}", "more than 100,000,000"),
        ("{{ 9 ** 9 ** 9 }}", "more than 100,000,000"),
        ("{{ 'a'.center(10 ** 10) }}", "more than 100,000,000"),
        ("x" * 2_000_000, "has 2,000,000 characters"),
        ("{{ messages[0].content + 5 }}", "the chat template refuses "),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ],
)
def test_a_hostile_template_is_one_line(tokenizer, template, says):
    assert says in said(tokenizer, template)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template  # and in use
    with pytest.raises(UserError) as error:
        encode_prompt(tokenizer, "the cat", chat=True)
    assert says in str(error.value)


def test_a_template_that_loops_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    start = time.monotonic()
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
    assert "takes more than 0.3 seconds for one text" in said(tokenizer, loop)
    assert time.monotonic() - start < 10
    assert render(tokenizer, CHATML, Chat(MESSAGES))  # the next one is not


def test_a_template_that_grows_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(template_limits, "BYTES", 2**26)
    grow = "{% set n = namespace(x='abcdefgh') %}{% for i in range(34) %}{% set n.x = n.x ~ n.x %}"
    slow = "{% for k in range(9999) %}{% endfor %}" * 40 + "{% endfor %}{{ n.x }}"
    assert "takes more than 0.0625 GiB of memory for one text" in said(tokenizer, grow + slow)


def test_ordinary_templates_pass(tokenizer):
    assert render(tokenizer, CHATML, Chat(MESSAGES)) == "<|user|>the cat<end>\n\n<|assistant|>sees<end>\n\n"
    for template in ("{{ 2**20 }}{{ -3 * 4 }}{{ 'ab' * 3 }}{{ 'a' + 'b' }}{{ 7 % 3 }}", "{{ 'a' ~ 1.5 * 2 }}", ""):
        check_template(template)


def test_the_bounds_leave_nothing_behind():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(KeyError), bounded():
        raise KeyError("x")
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert not issubclass(TooMuch, (ValueError, TypeError))


PIECES = ["{{ ", " }}", "{% for m in messages %}", "{% endfor %}", "{% if ", "%}", "{% endif %}", "m.content", "(", ")"]
PIECES += ["messages", "[0]", "*", "**", "/", "9", "'a'", "|length", "|tojson", "{% set x = ", "{# ", " #}", "x", "\n"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_templates_of_random_pieces(tokenizer, template):
    try:
        assert isinstance(render(tokenizer, template or "x", Chat(MESSAGES)), str)
    except (UserError, RowError) as error:
        assert "\n" not in str(error)
