"""Runs and data in a bucket: fsspec's memory:// for the parts, and gcsfs with Orbax against a fake Google."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import fake_gcs
import fsspec
import helpers_training as helpers
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from tpu_tune import UserError
from tpu_tune.checkpoints import storage
from tpu_tune.checkpoints.run_directory import MetricsFile, RunDirectory
from tpu_tune.curves.run_plot import plot_curves
from tpu_tune.curves.runs import read_run
from tpu_tune.data import streams
from tpu_tune.data.sources import read_rows, resolve
from tpu_tune.training import loggers, run_start

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture(params=["memory", "disk"])
def place(request: pytest.FixtureRequest, memory: Any, tmp_path: pathlib.Path) -> str:
    """A directory of either kind: what holds for one has to hold for the other."""
    return "memory://bucket" if request.param == "memory" else str(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_files_of_a_result_are_as_readable_as_the_umask_has_it(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with storage.whole_directory(str(tmp_path / "model")) as aside:
            save_file({"weight": np.zeros(3, np.float32)}, os.path.join(aside, "model.safetensors"))  # 0600 by itself
            pathlib.Path(aside, "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {mode}


def test_what_is_remote():
    assert [
        storage.is_remote(path) for path in ("gs://b/x", "memory://b", "C:\\x", "/a/b", "org/model", "hub:org/x:train")
    ] == [True, True, False, False, False, False]
    assert storage.absolute("gs://b/x/") == "gs://b/x" and storage.absolute("x") == os.path.abspath("x")


def test_files_are_written_whole_and_read_back(place):
    file = f"{place}/a.txt"
    assert not storage.exists(file)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(file)
    for content in (b"old", b"new"):
        storage.write_bytes(file, content)
    assert storage.exists(file) and storage.read_bytes(file) == b"new" and storage.is_dir(place)


def test_a_local_file_keeps_its_old_content_when_writing_fails(tmp_path, monkeypatch):
    storage.write_bytes(tmp_path / "a", b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_data_in_a_bucket(memory, place):
    table = pyarrow.Table.from_pylist(ROWS)
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, buffer)
    contents = {
        "train.jsonl": LINES,
        "val.jsonl": LINES,
        "other.parquet": buffer.getvalue().to_pybytes(),
        "read.me": b"x",
    }
    for name, content in contents.items():
        storage.write_bytes(f"{place}/{name}", content)
    train, held_out = resolve(place)
    assert [name.rpartition("/")[2] for name in train] == ["train.jsonl"]
    assert [name.rpartition("/")[2] for name in held_out] == ["val.jsonl"]
    assert all(storage.is_remote(name) == storage.is_remote(place) for name in train)
    for source in (*train, f"{place}/other.parquet"):
        assert resolve(source) == ([source], None) and read_rows(source) == (ROWS, [])
    for path, error in (
        (f"{place}/absent.jsonl", "there is no such file"),
        (f"{place}/read.me", "unknown kind of data file '.me'"),
    ):
        with pytest.raises(UserError, match=error):
            resolve(path)


def test_the_run_directory_in_a_bucket(place):
    out = f"{place}/run"
    config = helpers.make_config(output_dir=out, seed=-1, data__data_seed=3)
    start = run_start.open_run(config, write=False)
    assert not start.resuming and not storage.exists(f"{out}/config.json")
    run = RunDirectory(out)
    run.write_config(start.config)
    again = run_start.open_run(config)
    assert again.resuming and again.config.seed == start.config.seed
    run_start.check_shared(RunDirectory(out))
    metrics = MetricsFile(run)
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": 1.0})
    metrics.flush()
    storage.write_bytes(f"{out}/metrics.jsonl", storage.read_bytes(f"{out}/metrics.jsonl") + b'{"step": 4')
    assert run.truncate_metrics(2) == 2
    assert [row["step"] for row in run.metrics()] == [1, 2]
    plot_curves(run.metrics(), f"{out}/curves.png")
    assert storage.read_bytes(f"{out}/curves.png").startswith(b"\x89PNG")
    config.train.learning_rate = 0.5
    with pytest.raises(UserError, match="holds a run with another configuration"):
        run_start.open_run(config)


def test_metrics_go_to_a_bucket_now_and_then_and_when_they_must(memory):
    now, writes = [0.0], []
    pipe = memory.pipe_file
    file = MetricsFile(RunDirectory("memory://bucket/run"), seconds=30, clock=lambda: now[0])

    def steps() -> list[int]:
        writes.append(1)
        return [row["step"] for row in RunDirectory("memory://bucket/run").metrics()]

    pipe("memory://bucket/run/metrics.jsonl", b'{"step": 1}\n')
    for step, at, seen in (
        (2, 0, [1, 2]),
        (3, 10, [1, 2]),
        (4, 29, [1, 2]),
        (5, 31, [1, 2, 3, 4, 5]),
        (6, 32, [1, 2, 3, 4, 5]),
    ):
        now[0] = at
        file.append({"step": step})
        assert steps() == seen
    file.flush()
    assert steps() == [1, 2, 3, 4, 5, 6]
    sinks = loggers.open_sinks("none", RunDirectory("memory://bucket/other"))
    for step in (1, 2):
        loggers.log(sinks, {"step": step})
    loggers.close(sinks)
    assert [row["step"] for row in RunDirectory("memory://bucket/other").metrics()] == [1, 2]


def test_a_result_is_there_when_its_config_is(memory, place):
    target = f"{place}/adapter"
    for text in ("first", "second"):
        with storage.whole_directory(target) as aside:
            pathlib.Path(aside, "adapter_config.json").write_text("{}")
            pathlib.Path(aside, "weights").write_text(text)
            assert storage.is_complete(target) == (text == "second")
    assert storage.is_complete(target) and storage.read_bytes(f"{target}/weights") == b"second"


def test_a_broken_upload_leaves_no_result_that_looks_whole(memory, monkeypatch):
    target, put = "memory://bucket/adapter", memory.put_file

    def write() -> None:
        with storage.whole_directory(target) as aside:
            for name in ("adapter_config.json", "a_first", "weights"):
                pathlib.Path(aside, name).write_text("{}")

    def broken(local: str, path: str, **options: Any) -> None:
        if path.endswith("weights"):
            raise ValueError("503\n  backend error")  # clients raise what they like
        put(local, path, **options)

    write()
    monkeypatch.setattr(type(memory), "put_file", staticmethod(broken))
    with pytest.raises(
        UserError, match="memory://bucket/adapter cannot be written: the upload failed: 503 backend error"
    ):
        write()
    assert not storage.is_complete(target)


def test_a_file_that_is_written_in_pieces_appears_whole(place):
    file = f"{place}/a.txt"
    for text in ("old", "new"):
        with storage.whole_file(file) as aside:
            pathlib.Path(aside).write_text(text)
            assert storage.exists(file) == (text == "new")
    with pytest.raises(ZeroDivisionError), storage.whole_file(file) as aside:
        pathlib.Path(aside).write_text("half")
        1 / 0  # noqa: B018
    assert storage.read_bytes(file) == b"new" and storage.list_names(place) == ["a.txt"]


def test_a_kill_while_a_result_is_replaced_leaves_one_that_is_whole(tmp_path, monkeypatch):
    target, moved = tmp_path / "adapter", os.replace

    def write(text: str) -> None:
        with storage.whole_directory(str(target)) as aside:
            for name in "abc":
                pathlib.Path(aside, name).write_text(text)

    def killed(source: str, goal: str) -> None:
        if os.fspath(goal) == str(target):
            raise KeyboardInterrupt
        moved(source, goal)

    write("first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # between the two renames
        patch.setattr(os, "replace", killed)
        patch.setattr(storage, "_clear", lambda *_: None)  # a kill cleans nothing up
        write("second")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adapter.before", ".adapter.tmp"]
    with pytest.raises(ZeroDivisionError), storage.whole_directory(str(target)):
        1 / 0  # noqa: B018
    assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys("abc", "first")
    write("third")
    assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys("abc", "third")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_nothing_of_an_old_result_is_removed_before_the_new_one_is_there(tmp_path, monkeypatch):
    target, remove = tmp_path / "model", storage.shutil.rmtree
    seen = []

    def watched(path: str, **options: Any) -> None:
        if os.path.isdir(path):
            seen.append((os.path.basename(path), (target / "a").read_text()))
        remove(path, **options)

    for text in ("old", "new"):
        with storage.whole_directory(str(target)) as aside:
            pathlib.Path(aside, "a").write_text(text)
            monkeypatch.setattr(storage.shutil, "rmtree", watched)
    assert seen == [(".model.before", "new")]


def test_a_full_disk_names_the_file(tmp_path):
    """Writing to an open file raises an error without a name."""
    file = tmp_path / "a.txt"
    with pytest.raises(OSError) as error, storage.whole_file(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (error.value.filename, error.value.strerror) == (str(file), "No space left on device")
    with pytest.raises(OSError) as error, storage.whole_file(file):
        raise OSError(errno.ECONNRESET, "of what was read meanwhile")
    assert error.value.filename is None


def test_a_local_copy_of_what_lies_in_a_bucket(memory, place):
    for name in ("adapter/config.json", "adapter/deep/weights"):
        if not storage.is_remote(place):
            pathlib.Path(place, name).parent.mkdir(parents=True, exist_ok=True)
        storage.write_bytes(f"{place}/{name}", name.encode())
    copy = pathlib.Path(storage.local_copy(f"{place}/adapter"))
    assert copy.name == "adapter" and (copy / "deep" / "weights").read_bytes() == b"adapter/deep/weights"
    file = pathlib.Path(storage.local_copy(f"{place}/adapter/config.json"))
    assert file.name == "config.json" and file.read_bytes() == b"adapter/config.json"
    assert storage.local_copy(f"{place}/adapter") == str(copy)
    storage.write_bytes(f"{place}/adapter/config.json", b"renewed")
    assert pathlib.Path(storage.local_copy(f"{place}/adapter"), "config.json").read_bytes() == b"renewed"
    if storage.is_remote(place):
        with pytest.raises(UserError, match="memory://bucket/absent: there is no such file or directory"):
            storage.local_copy(f"{place}/absent")


def test_storage_that_cannot_be_had_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="no such kind of storage as ftpx://"):
        resolve("ftpx://a/b.jsonl")

    def missing(scheme: str) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(
        UserError, match=re.escape('gs:// needs a package that is not here: pip install "tpu_tune[gcs]"')
    ):
        resolve("gs://a/b.jsonl")
    with pytest.raises(UserError, match="tpu_tune"):
        run_start.open_run(helpers.make_config(output_dir="gs://a/run"))


def test_a_bucket_that_does_not_answer_is_one_line(memory, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("503\n  backend error")  # clients raise what they like

    for name in ("exists", "isdir", "cat_file"):
        monkeypatch.setattr(type(memory), name, broken)
    run = RunDirectory("memory://bucket/run")
    for read in (
        run.saved_steps,
        run.metrics,
        run.config,
        lambda: run.has_result("lora"),
        lambda: read_run(run.path),
    ):
        with pytest.raises(UserError, match="^memory://bucket/run.* cannot be read: .*503 backend error$"):
            read()
    assert not run.exists() and run.summary() == {}


# --- gs:// itself -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def google() -> Iterator[tuple[fake_gcs.Store, dict[str, str]]]:
    """A bucket, and the environment in which gcsfs and TensorStore find it."""
    pytest.importorskip("gcsfs")
    server, store = fake_gcs.serve()
    yield store, fake_gcs.environment(server)
    server.shutdown()


def test_a_run_in_a_bucket_is_killed_and_goes_on_to_the_same_bytes(google, tmp_path):
    """Data, config, metrics, curves, Orbax checkpoints and the adapter on gs://; beside it the same run on disk."""
    store, environment = google
    tiny = helpers.write_tiny_llama(tmp_path / "model")
    rows = helpers.write_rows(tmp_path / "rows.jsonl", 42)
    store.put("data/rows.jsonl", rows.read_bytes())
    keys = {
        "model__path": str(tiny),
        "model__dtype": "float32",
        "lora__rank": 4,
        "data__num_workers": 1,
        "data__packing": False,
        "data__max_length": 96,
        "train__max_steps": 8,
        "train__per_device_train_batch_size": 4,
        "train__learning_rate": 1e-2,
        "train__logging_steps": 1,
        "train__save_steps": 2,
        "train__save_total_limit": 2,
        "data__eval_ratio": 0.0,
    }
    local = helpers.make_config(
        **keys, output_dir=str(tmp_path / "out"), data__train=str(rows), data__cache_dir=str(tmp_path / "c")
    )
    done = helpers.train_process(local, tmp_path)
    assert done.returncode == 0, done.stderr
    bucket = helpers.make_config(
        **keys,
        output_dir="gs://bucket/runs/one",
        data__train="gs://bucket/data/rows.jsonl",
        data__cache_dir=str(tmp_path / "d"),
    )
    words, env = helpers.command(bucket, tmp_path)
    env |= environment

    def train() -> subprocess.Popen:
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process, end = train(), time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:  # killed when a checkpoint is whole and another one is not
        if "runs/one/checkpoints/2/commit_success.txt" in store.objects:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    _, err = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL, err
    assert not any(name.startswith("runs/one/adapter") for name in store.objects)
    out, err = (process := train()).communicate(timeout=200)
    assert process.returncode == 0, err
    assert re.search(r"resuming from step [246] of 8", out) and "the result is in gs://bucket/runs/one/adapter" in out
    assert "curves: gs://bucket/runs/one/curves.png" in out
    files = {
        name.removeprefix("runs/one/"): content
        for name, (content, _) in store.objects.items()
        if name.startswith("runs/one/")
    }
    adapter = "adapter/adapter_model.safetensors"
    assert files[adapter] == (tmp_path / "out" / adapter).read_bytes()
    mine = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    theirs = helpers.metric_rows(tmp_path / "out")
    assert [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in mine] == theirs
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"6", "8"}
    assert files["curves.png"].startswith(b"\x89PNG") and ".write_test" not in files
    again = train()
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0 and "this run is done: 8 of 8 steps" in out, err


def test_a_bucket_that_is_not_there_is_one_line(google, tmp_path):
    store, environment = google
    config = helpers.make_config(
        output_dir="gs://absent/run",
        model__path=str(helpers.write_tiny_llama(tmp_path / "model")),
        data__train=str(helpers.write_rows(tmp_path / "rows.jsonl")),
        mesh__fsdp=1,
    )
    words, env = helpers.command(config, tmp_path)
    done = subprocess.run(words, env=env | environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^tpu-tune: output_dir gs://absent/run cannot be written: .*", done.stderr, re.M), done.stderr


def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE) as reader:
        storage.write_bytes(tmp_path / "pipe", b"content")
        assert reader.stdout.read() == b"content"
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_device_is_written_to_and_stays():
    with streams.writing(os.devnull) as out:
        out.write({"text": "a"})
    storage.write_bytes(os.devnull, b"content")
    assert pathlib.Path(os.devnull).is_char_device()


def test_standard_output_as_a_path(tmp_path):
    """Into a pipe and into a file, whose writer keeps it open."""
    code = "from tpu_tune.checkpoints import storage; storage.write_bytes('/dev/stdout', b'content')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"content"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_bytes() == b"content"


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    for content in (b"new", b"newer"):  # the first time it leads to nothing
        storage.write_bytes(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_a_socket_and_a_disk_are_refused(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.fspath(tmp_path / "s"))
        with pytest.raises(UserError, match="s: cannot be written \\(it is a socket and no file"):
            with streams.writing(tmp_path / "s"):
                pass
    monkeypatch.setattr(storage.stat, "S_ISBLK", lambda mode: True)
    (tmp_path / "disk").write_bytes(b"everything")
    with pytest.raises(OSError, match="it is a disk and no file"):
        storage.write_bytes(tmp_path / "disk", b"")
    assert (tmp_path / "disk").read_bytes() == b"everything"
