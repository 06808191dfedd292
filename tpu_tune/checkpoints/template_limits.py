"""Bounds on a chat template, which is a program that came with a model: time, memory, and the numbers in it.

Rendering is stopped after SECONDS, or once the process has grown by BYTES meanwhile. Both are looked at by a timer's
signal, between two steps of Python, and only in a process's main thread; what one single step takes is bounded by
`check_template`, which refuses constants over LARGEST, products of constants included.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext

from tpu_tune.errors import UserError

SECONDS = 5.0  # for one text; published templates take about a millisecond
BYTES = 2**30
LARGEST = 100_000_000  # of a whole number, or of the letters of a text
LONGEST = 1_000_000  # characters of a template
_EVERY = 0.1  # seconds between two looks


class TooMuch(Exception):
    """A template takes too long or too much; the message says which."""


@functools.lru_cache(maxsize=16)
def check_template(template: str) -> None:
    """Refuse a template that is too long or nested too deeply to be read, or that has a constant over LARGEST.

    Raises:
      UserError: it is one.
    """
    if len(template) > LONGEST:
        raise UserError(f"the chat template has {len(template):,} characters, more than {LONGEST:,}")
    try:
        _size(_environment().parse(template))
    except jinja2.TemplateError:
        return  # told of by who renders it, with its line
    except RecursionError:
        raise UserError("the chat template is nested too deeply to be read") from None


def _environment() -> jinja2.Environment:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # a heavy import

    return _compile_jinja_template("").environment


def _size(node: Any) -> int | str | None:
    """The value of a node that is a constant, as far as that is known; every node below is looked at.

    Raises:
      UserError: a constant is too large.
    """
    inner = [_size(child) for child in node.iter_child_nodes()]
    value = getattr(node, "value", None) if isinstance(node, jinja2.nodes.Const) else None
    if isinstance(node, jinja2.nodes.TemplateData):
        return None
    if isinstance(node, jinja2.nodes.BinExpr) and len(inner) == 2 and None not in inner:
        value = _combined(node, *inner)
    if isinstance(node, jinja2.nodes.Neg) and isinstance(inner[0], int):
        value = -inner[0]
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    if (len(value) if isinstance(value, str) else abs(value)) > LARGEST:
        raise _too_large(node)
    return value


def _combined(node: Any, left: int | str, right: int | str) -> int | str | None:
    if isinstance(node, jinja2.nodes.Pow) and isinstance(left, int) and isinstance(right, int):
        if abs(left) > 1 and right > 64:
            raise _too_large(node)
        return left**right if right >= 0 else None
    if isinstance(node, jinja2.nodes.Mul):
        if isinstance(left, str) and isinstance(right, str):
            return None
        number = right if isinstance(left, str) else left
        text = left if isinstance(left, str) else right
        if isinstance(text, str) and len(text) * number > LARGEST:
            raise _too_large(node)
        return left * right
    if isinstance(node, jinja2.nodes.Add) and type(left) is type(right):
        return left + right
    return None


def _too_large(node: Any) -> UserError:
    return UserError(f"line {node.lineno} of the chat template makes a number or a text of more than {LARGEST:,}")


@contextlib.contextmanager
def template_errors(template: str | Mapping[str, str], refused: Callable[[str], Exception]) -> Iterator[None]:
    """Check a template, bound the block that renders it, and turn every way in which that fails into one line.

    Args:
      template: Jinja text, or name -> text.
      refused: makes the error for what the template refuses, of the reason.

    Raises:
      UserError: the template is no Jinja, or takes too much.
    """
    for text in [template] if isinstance(template, str) else template.values():
        check_template(text)
    try:
        with bounded():
            yield
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message})") from error
    except TooMuch as error:  # every chat would take as long
        raise UserError(f"{error}; give another as data.chat_template") from None
    except RecursionError:
        raise UserError("the chat template calls itself without end, or is nested too deeply to be read") from None
    except MemoryError:
        raise UserError("the chat template takes more memory than there is") from None
    except UserError:
        raise
    except Exception as error:  # a template is a program: it fails in any way that Python knows
        raise refused(" ".join(str(error).split())[:500] or type(error).__name__) from error


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Stop a block that renders once it takes more than SECONDS or BYTES.

    Raises:
      TooMuch: it did; one of the block's own steps was cut short by it.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    end, most = time.monotonic() + SECONDS, _resident() + BYTES

    def look(number: int, frame: Any) -> None:
        if time.monotonic() > end:
            raise TooMuch(f"the chat template takes more than {SECONDS:g} seconds for one text")
        if _resident() > most:
            raise TooMuch(f"the chat template takes more than {BYTES / 2**30:g} GiB of memory for one text")

    before = signal.signal(signal.SIGALRM, look)
    timer = signal.setitimer(signal.ITIMER_REAL, _EVERY, _EVERY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
