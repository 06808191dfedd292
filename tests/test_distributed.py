"""Two processes of four devices are one run of eight: the same losses, killed and resumed, and none waits for ever."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import helpers_training as helpers
import numpy as np
import pytest

from tpu_tune import UserError
from tpu_tune.data import Batches, eval_batches
from tpu_tune.training import distributed
from tpu_tune.training.distributed import Cluster, find_cluster
from tpu_tune.training.roll_call import MissingProcesses, roll_call

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "head:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
POD = {"worker-network-endpoints": "w-0:8470:10.0.0.2,w-1:8470:10.0.0.3", "agent-worker-number": "1"}


def find(environ: dict[str, str], metadata: dict[str, str] | None = None) -> Cluster | None:
    return find_cluster(environ, (metadata or {}).get, lambda: metadata is not None)


def test_hosts_are_found_from_the_environment():
    assert find({}) is None
    assert find(ADDRESS) == Cluster("address", "head:1234", 4, 2)
    assert find(SLURM) == Cluster("slurm", "", 8, 3)
    assert find({**SLURM, "SLURM_NTASKS": "1"}) is None  # an interactive shell
    assert find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}) is None  # a batch script, outside of srun
    assert find({**SLURM, **ADDRESS}).kind == "address"  # what is said wins over what is found
    gke = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}
    assert find(gke) == Cluster("tpu", "a:8476", 3, 2, ("a", "b", "c"))
    assert find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    assert find({}, POD) == Cluster("tpu", "10.0.0.2:8476", 2, 1, ("10.0.0.2", "10.0.0.3"))
    assert find({}, {"worker-network-endpoints": "10.0.0.2,10.0.0.3", "agent-worker-number": "0\n"}).process_id == 0
    assert find({}, {"worker-network-endpoints": "10.0.0.2", "agent-worker-number": "0"}) is None  # a v3-8
    assert find({"TPU_SKIP_MDS_QUERY": "1"}, POD) is None
    assert find({"MEGASCALE_COORDINATOR_ADDRESS": "x"}, POD).kind == "multislice"


@pytest.mark.parametrize(
    ("environ", "metadata", "error"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "head"}, None, "has no port; write it as host:port, e.g. head:8476"),
        ({**ADDRESS, "JAX_NUM_PROCESSES": ""}, None, "JAX_NUM_PROCESSES is ''"),
        ({**ADDRESS, "JAX_PROCESS_ID": "x"}, None, "JAX_PROCESS_ID is 'x'"),
        ({**ADDRESS, "JAX_PROCESS_ID": "4"}, None, "must be below"),
        ({}, {"worker-network-endpoints": "a,b"}, "set TPU_WORKER_ID"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, None, "2 hosts"),
    ],
)
def test_an_environment_that_makes_no_sense(environ, metadata, error):
    with pytest.raises(UserError, match=re.escape(error)):
        find(environ, metadata)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def test_roll_call_names_who_is_missing():
    port, found = free_port(), {}

    def call(process: int, seconds: float) -> None:
        try:
            roll_call(f"localhost:{port}", 4, process, seconds)
            found[process] = "here"
        except MissingProcesses as error:
            found[process] = error.processes

    def run(processes: list[int], seconds: float) -> dict[int, Any]:
        found.clear()
        threads = [threading.Thread(target=call, args=(process, seconds)) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return dict(found)

    assert run([3, 0, 1, 2], 30) == dict.fromkeys(range(4), "here")
    assert run([0, 2], 0.5) == {0: [1, 3], 2: [1, 3]}
    assert run([1], 0.3) == {1: [0]}
    assert run([0, 1, 2, 3], 30) == dict.fromkeys(range(4), "here")  # the port is free again
    with socket.create_server(("", port)), pytest.raises(OSError):
        roll_call(f"localhost:{port}", 2, 0, 1)


def test_rows_of_another_process_are_not_read():
    class Rows:
        def __init__(self):
            self.read = set()

        def __len__(self):
            return 11

        def take(self, numbers):
            self.read |= set(numbers.tolist()) - {-1}
            return {"input_ids": np.asarray(numbers)[:, None]}

    rows, all_rows = Rows(), Rows()
    mine = np.array([False, True, True, False])
    kept, whole = Batches(rows, 4, 1, 0, mine), Batches(all_rows, 4, 1, 0)
    for step in range(whole.steps_per_epoch):
        one, other = kept.batch(step)["input_ids"], whole.batch(step)["input_ids"]
        np.testing.assert_array_equal(one[:, mine], other[:, mine])
        assert (one[:, ~mine] == -1).all()
    assert len(all_rows.read) == 11 and rows.read < all_rows.read
    assert [batch["input_ids"][:, 0].tolist() for batch in eval_batches(Rows(), 4, mine)] == [
        [-1, 1, 2, -1],
        [-1, 5, 6, -1],
        [-1, 9, 10, -1],
    ]


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return helpers.write_tiny_llama(tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=128)


def settings(tiny: pathlib.Path, folder: pathlib.Path, **keys: Any) -> Any:
    """Eight steps of eight rows, with dropout, evaluated and saved every two; nf4 codes sharded over all devices."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "output_dir": str(folder / "out"),
        "model__path": str(tiny),
        "model__dtype": "float32",
        "lora__rank": 4,
        "lora__dropout": 0.1,
        "lora__target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "quantize__format": "nf4",
        "quantize__group_size": 16,
        "data__train": str(helpers.write_rows(tiny / "rows.jsonl", 72)),
        "data__cache_dir": str(tiny / "cache"),
        "data__num_workers": 1,
        "data__packing": False,
        "data__max_length": 96,
        "data__eval_ratio": 0.1,
        "train__max_steps": 8,
        "train__per_device_train_batch_size": 1,
        "train__per_device_eval_batch_size": 1,
        "train__learning_rate": 1e-2,
        "train__logging_steps": 1,
        "train__eval_steps": 2,
        "train__save_steps": 2,
        "mesh__fsdp": 8,
    }
    return helpers.make_config(**{**defaults, **keys})


def start_two(
    config: Any, folder: pathlib.Path, only: tuple[int, ...] = (0, 1), **environment: str
) -> list[subprocess.Popen]:
    words, env = helpers.command(config, folder, devices=4)
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2", **environment}
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(words, env={**env, "JAX_PROCESS_ID": str(number)}, stdout=pipe, stderr=pipe, text=True)
        for number in only
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    try:
        told = [process.communicate(timeout=240) for process in processes]
        return [(process.returncode, *words) for process, words in zip(processes, told, strict=True)]
    finally:
        for process in processes:
            process.kill()


def losses(folder: pathlib.Path) -> list[tuple[int, float]]:
    rows = helpers.metric_rows(folder / "out")
    return [(row["step"], row.get("loss", row.get("eval_loss"))) for row in rows]


# What compiles quickly: one adapted matrix, nothing quantized, no evaluation.
QUICK = {"lora__target_modules": ["q_proj"], "quantize__format": "none", "data__eval_ratio": 0.0}


@pytest.fixture(scope="module")
def one_process(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Function from settings to the folder of their run in one process of eight devices."""
    done: dict[str, pathlib.Path] = {}

    def run(**keys: Any) -> pathlib.Path:
        name = json.dumps(keys)
        if name not in done:
            done[name] = tmp_path_factory.mktemp("one")
            ran = helpers.train_process(settings(tiny, done[name], **keys), done[name], 8)
            assert ran.returncode == 0, ran.stderr
        return done[name]

    return run


def assert_same(folder: pathlib.Path, one: pathlib.Path) -> None:
    found, expected = losses(folder), losses(one)
    assert [step for step, _ in found] == [step for step, _ in expected] and len(found) >= 8
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in expected], rtol=1e-5)
    files = [place / "out" / "adapter" / "adapter_model.safetensors" for place in (folder, one)]
    from safetensors.numpy import load_file

    mine, theirs = map(load_file, files)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-4, err_msg=name)


def kill_after(processes: list[subprocess.Popen], folder: pathlib.Path, step: int, number: int, how: int) -> None:
    metrics = folder / "out" / "metrics.jsonl"
    end = time.monotonic() + 200
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        steps = re.findall(r'"step": (\d+)', metrics.read_text() if metrics.exists() else "")
        if steps and int(steps[-1]) >= step:
            processes[number].send_signal(how)
            return
        time.sleep(0.002)


def test_two_processes_give_the_losses_of_one_and_go_on_after_a_kill(tiny, one_process, tmp_path):
    """Killing the one that does not write; the coordinator must end too, with one line, and both go on."""
    config = settings(tiny, tmp_path, **QUICK)
    processes = start_two(config, tmp_path, TPU_TUNE_HEARTBEAT_SECONDS="20")
    kill_after(processes, tmp_path, 5, 1, signal.SIGKILL)
    (code, _, said), (killed, _, _) = ended(processes)
    assert killed == -signal.SIGKILL and code != 0
    assert "another host has gone" in said or "JAX distributed service detected fatal errors" in said, said
    assert "Traceback" not in said and not (tmp_path / "out" / "adapter").exists()
    (code, out, err), (other, silent, other_err) = ended(start_two(config, tmp_path))
    assert code == 0 and other == 0, err + other_err
    assert re.search(r"resuming from step [246] of 8", out) and "8 x cpu (fsdp=8)" in out
    assert "resuming" not in silent
    assert_same(tmp_path, one_process(**QUICK))


@pytest.mark.slow
def test_the_coordinator_may_be_killed_too(tiny, one_process, tmp_path):
    """And the codes of nf4 are sharded over both, and an adapted embedding is written whole."""
    config = settings(tiny, tmp_path)
    processes = start_two(config, tmp_path, TPU_TUNE_HEARTBEAT_SECONDS="20")
    kill_after(processes, tmp_path, 5, 0, signal.SIGKILL)
    assert all(code != 0 for code, _, _ in ended(processes))
    done = ended(start_two(config, tmp_path))
    assert [code for code, _, _ in done] == [0, 0], done
    assert "resuming from step" in done[0][1]
    assert_same(tmp_path, one_process())
    assert len(losses(tmp_path)) == 12  # four of them evaluations


@pytest.mark.slow
def test_a_signal_to_one_host_saves_on_all(tiny, tmp_path):
    """SIGTERM to process 1, as a preemption sends it; the seeds that process 0 draws are everybody's."""
    config = settings(tiny, tmp_path, train__max_steps=400, train__save_strategy="no", seed=-1, **QUICK)
    processes = start_two(config, tmp_path)
    kill_after(processes, tmp_path, 2, 1, signal.SIGTERM)
    done = ended(processes)
    assert [code for code, _, _ in done] == [128 + signal.SIGTERM] * 2, done
    saved = re.search(r"interrupted: step (\d+) of 400 is saved", done[0][1])
    assert saved and all("SIGTERM to one of the hosts" in err for _, _, err in done)
    assert os.listdir(tmp_path / "out" / "checkpoints") == [saved[1]]
    drawn = json.loads((tmp_path / "out" / "config.json").read_text())["seed"]
    config.train.max_steps = int(saved[1]) + 1
    again = ended(start_two(config, tmp_path))
    assert [code for code, _, _ in again] == [0, 0], again
    assert f"resuming from step {saved[1]}" in again[0][1] and f"seed = {drawn}" in again[0][1]


def test_a_host_that_stays_away_is_named(tiny, tmp_path):
    config = settings(tiny, tmp_path)
    for number, missing in ((0, 1), (1, 0)):
        ((code, out, err),) = ended(start_two(config, tmp_path, (number,), TPU_TUNE_BARRIER_SECONDS="1"))
        lines = [line for line in err.splitlines() if line.startswith("tpu-tune:")]
        assert code == 1 and len(lines) == 1 and "Traceback" not in err, err
        assert f"process {missing} of 2 did not come within 1 s (joining)" in lines[0]
    assert not (tmp_path / "out").exists()


BARRIER = """
import sys
from tpu_tune import UserError
from tpu_tune.training import distributed

distributed.join()
import jax

def act():
    if jax.process_index() == 1:
        raise UserError("rows.jsonl is not here")
    return "fine"

with distributed.leaving_alone():
    assert distributed.from_main([jax.process_index() + 5], "numbers") == [5]
    try:
        distributed.together("data", act)
    except UserError as error:
        print("told:", error, flush=True)
    if jax.process_index() == 0:
        distributed.barrier("the end", 1)
    sys.stdin.readline()
"""


def test_a_mistake_on_one_host_is_told_on_all_and_a_barrier_names_who_is_missing(tmp_path):
    env = {**os.environ, "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", BARRIER]
    processes = [
        subprocess.Popen(words, env={**env, "JAX_PROCESS_ID": str(i)}, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        for i in (0, 1)
    ]
    try:
        out, err = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert "told: process 1: rows.jsonl is not here" in out, err
    assert processes[0].returncode == 1
    assert "tpu-tune: process 1 of 2 did not come within 1 s (the end)" in err and "Traceback" not in err
    assert "told: rows.jsonl is not here" in processes[1].communicate()[0]


def test_one_process_neither_waits_nor_asks():
    assert distributed.together("x", lambda: 3) == 3 and distributed.from_main([4], "x") == [4]
    distributed.barrier("x")
    assert distributed.join({}) is None
    with pytest.raises(UserError, match="whole number of seconds"):
        distributed.barrier_seconds({"TPU_TUNE_BARRIER_SECONDS": "soon"})
    with pytest.raises(KeyError), distributed.leaving_alone():
        raise KeyError("is raised as it is")
