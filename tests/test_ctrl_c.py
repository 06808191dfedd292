"""Ctrl-C ends the program with one line, wherever the signal lands."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tpu_tune import ctrl_c
from tpu_tune.training.interrupt import catch_signals, time_limit

ROOT = pathlib.Path(__file__).parents[1]

# Each makes the signal land where Python drops the exception that its handler raises.
PLACES = {
    "a callback of the garbage collector": """
def collected(phase, info):
    gc.callbacks.remove(collected)
    signal.raise_signal(signal.SIGINT)
gc.callbacks.append(collected)
gc.collect()""",
    "a __del__": """
class Thing:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
Thing()""",
    "a callback of a weak reference": """
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
del thing""",
    "a callback from C": """
ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))()""",
    "code that takes any exception": """
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass""",
    "jax's search for plugins, which prints what ends a plugin's start": """
import importlib.metadata
from jax._src import xla_bridge
xla_bridge.jax_plugins = None
class Plugin:
    initialize = staticmethod(lambda: signal.raise_signal(signal.SIGINT))
xla_bridge.importlib.import_module = lambda name: Plugin
class Entry: value = "one"
importlib.metadata.entry_points = lambda group: [Entry]
xla_bridge.discover_pjrt_plugins()""",
    "code that makes another exception of it": """
try:
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
raise RuntimeError("a callback failed")""",
}


def program(body: str, restore: bool = False) -> subprocess.Popen:
    """A process that runs `body` as a command's function would."""
    lines = "\n".join("    " + line for line in body.splitlines())
    text = (
        "import atexit, ctypes, gc, hashlib, os, signal, sys, threading, time, weakref\nfrom tpu_tune import ctrl_c\n"
        f"def command():\n{lines}\n    return 0\nsys.exit(ctrl_c.run(lambda: command, restore={restore}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", text],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_that_python_drops_comes_again(place):
    status, out, err = ended(program(PLACES[place] + "\ntime.sleep(30)\nprint('went on')"))
    assert (status, out, err) == (ctrl_c.STATUS, "", "tpu-tune: interrupted\n")


def test_a_command_that_has_ended_before_it_came_again_was_interrupted_all_the_same():
    status, _, err = ended(program(PLACES["a __del__"]))
    assert (status, err) == (ctrl_c.STATUS, "tpu-tune: interrupted\n")


def test_what_is_cleaning_up_is_not_interrupted_again():
    body = """
class Lasting:
    def __enter__(self): pass
    def __exit__(self, *_): time.sleep(0.8); print("left")
try:
    with Lasting():
        signal.raise_signal(signal.SIGINT)
finally:
    time.sleep(0.8)
    print("cleaned")"""
    status, out, err = ended(program(body))
    assert (status, out, err) == (ctrl_c.STATUS, "left\ncleaned\n", "tpu-tune: interrupted\n")


def test_a_second_one_ends_at_once():
    body = """
try:
    print("ready", flush=True)
    time.sleep(30)
finally:
    print("cleaning", flush=True)
    time.sleep(30)"""
    process = program(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert status == ctrl_c.STATUS and "ending at once" in err and "Traceback" not in err


# The main thread is in C, as when it compiles: it holds no lock, and runs no handler until it comes back.
COMPILING = """
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 8_000_000)
print("compiled", flush=True)"""


def test_two_while_the_main_thread_compiles_end_at_once():
    body = "def farewell(): print('undone', flush=True)\nwith ctrl_c.before_leaving(farewell):" + COMPILING.replace(
        "\n", "\n    "
    )
    process = program(body.replace("8_000_000", "100_000_000"))
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith("tpu-tune: interrupted: it ends after what is being compiled")
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    status, out, err = ended(process)
    assert (status, out) == (ctrl_c.STATUS, "undone\n") and time.monotonic() - started < 5
    assert err == "tpu-tune: interrupted twice, ending at once\n"


def test_one_while_the_main_thread_compiles_ends_after_it():
    status, out, err = ended(program(COMPILING))
    assert (status, out) == (ctrl_c.STATUS, "") and err.splitlines()[-1] == "tpu-tune: interrupted"


def test_a_forked_workers_signal_is_not_the_programs():
    body = """
if os.fork() == 0:
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    os._exit(0)
os.wait()
time.sleep(0.3)
print("went on")"""
    assert ended(program(body)) == (0, "went on\n", "")


def test_while_python_shuts_down_it_is_no_traceback():
    status, _, err = ended(program("atexit.register(lambda: signal.raise_signal(signal.SIGINT))"))
    assert (status, err) == (0, "")


def test_a_background_job_that_ignores_it_goes_on():
    body = "signal.raise_signal(signal.SIGINT)\nprint('went on')"
    text = f"import signal\nfrom tpu_tune import ctrl_c\ndef command():\n    {body.splitlines()[0]}\n    return 7\n"
    text += "signal.signal(signal.SIGINT, signal.SIG_IGN)\nraise SystemExit(ctrl_c.run(lambda: command, restore=False))"
    done = subprocess.run([sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 7


def test_a_process_that_goes_on_has_its_handlers_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)] + [sys.unraisablehook]
    assert ctrl_c.run(lambda: lambda: 3, restore=True) == 3
    assert ctrl_c.run(lambda: lambda: signal.raise_signal(signal.SIGINT), restore=True) == ctrl_c.STATUS
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)] + [sys.unraisablehook]
    with pytest.raises(RuntimeError, match="of its own"):
        ctrl_c.run(lambda: fail, restore=True)


def fail() -> int:
    raise RuntimeError("of its own")


def test_training_is_asked_and_nothing_is_raised(capsys):
    with catch_signals() as interrupted_at:
        assert not interrupted_at(1)
        signal.raise_signal(signal.SIGINT)
        assert interrupted_at(2) == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):  # a notebook's second
            signal.raise_signal(signal.SIGINT)
    assert "SIGINT: saving after this step" in capsys.readouterr().err


def test_training_ends_by_the_clock_as_by_a_sigterm(capsys):
    now = [100.0]
    is_over = time_limit(8.5, 100.0, clock=lambda: now[0])
    with catch_signals(is_over) as interrupted_at:
        for hours, expected in ((0, 0), (8.4, 0), (8.5, signal.SIGTERM), (9, signal.SIGTERM)):
            now[0] = 100 + hours * 3600
            assert interrupted_at(1) == expected
    assert capsys.readouterr().err.count("train.max_hours are over: saving after this step") == 1
    assert not time_limit(0, 100.0, clock=lambda: 1e9)()


@pytest.mark.parametrize("seconds", [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5])
def test_during_the_imports_it_is_one_line(seconds, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tpu_tune", "inspect", str(tmp_path / "no_such_model")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    assert "Traceback" not in err and "Exception ignored" not in err
    # Python itself ends by the signal where code of a string was interrupted; a shell calls both 130.
    assert status in (1, ctrl_c.STATUS, -signal.SIGINT) and len(err.splitlines()) == 1, err


def test_the_program_has_its_handler_before_what_takes_time_is_imported():
    text = "import sys, tpu_tune.cli; print([n for n in ('jax', 'numpy', 'ml_collections') if n in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr
