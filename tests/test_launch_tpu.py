"""`launch/tpu.sh` and `launch/gpu.sh` against a gcloud, a tmux and a trainer that are not real."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from typing import Any

import pytest

from tpu_tune.planning import devices

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = (
    "bash", "cat", "chmod", "date", "dirname", "env", "find", "flock", "git", "grep", "gzip", "head", "hostname",
    "install", "kill", "mkdir", "mktemp", "mv", "nohup", "rm", "sed", "sh", "sleep", "sort", "tail", "tar", "tr",
)  # fmt: skip
SECRET = "-".join(["wandb", "0123456789", "secret"])  # not as it stands: this file is copied to the workers
CREATE = "ERROR: (gcloud.compute.tpus.tpu-vm.create) "
NO_ROOM = CREATE + 'There is no more capacity in the zone "{zone}"; you can try in another zone'
NO_QUOTA = CREATE + "{{ code: 8, Quota limit 'TPUV3sPodPerProjectPerZone' has been exceeded. Limit: 0 in {zone}"
TRAIN = ("--", "--config", "configs/qlora.py", "--config.data.train=gs://b/it's rows.jsonl")

# Writes down its arguments and environment, then does what $FAKE/trainer says: a status of the run, or an exit code.
TRAINER = """\
import json, os, pathlib, signal, sys
fake = pathlib.Path(os.environ["FAKE"])
names = ("WANDB_API_KEY", "HF_TOKEN", "XLA_PYTHON_CLIENT_MEM_FRACTION", "TPU_TUNE_JAX")
with open(fake / "trained.jsonl", "a") as stream:
    given = {name: os.environ[name] for name in names if name in os.environ}
    stream.write(json.dumps({"words": sys.argv[1:], "home": os.environ["HOME"], "given": given}) + "\\n")
plan = fake / "trainer"
lines = plan.read_text().split("\\n") if plan.exists() else ["finished"]
status = lines[0]
plan.write_text("\\n".join(lines[1:] or lines))
print("step 1/2 loss 1.5", file=sys.stderr, flush=True)
if status == "wait":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # one that comes before the wait is not missed
    print("waiting", file=sys.stderr, flush=True)
    signal.sigwait({signal.SIGTERM})
    print(json.dumps({"status": "interrupted", "step": 2}))
    sys.exit(143)
if status.isdigit():
    print("tpu-tune: data.train is not there", file=sys.stderr)
    sys.exit(int(status))
print(json.dumps({"status": status, "step": 2}))
"""


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class World:
    """A folder with fake programs; `run` starts a launch script in it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        for name in TOOLS:
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / name).symlink_to(shutil.which(name))
        fake = (ROOT / "tests" / "fake_gcloud.py").read_text().replace("/usr/bin/env python3", sys.executable)
        program(folder / "bin" / "gcloud", fake)
        program(folder / "bin" / "uv", f'#!/bin/sh\necho "$@" >>{folder}/uv\n')
        # tmux that stays until its command has ended: a test need not wait for anything.
        program(
            folder / "bin" / "tmux",
            '#!/bin/sh\n[ "$3" = new-session ] || exit 1\nfor last; do :; done\nsh -c "$last"\nexit 0\n',
        )
        program(folder / "venv" / "bin" / "tpu-tune", f"#!{sys.executable}\n{TRAINER}")
        program(folder / "venv" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')

    def rules(self, *rules: dict[str, Any]) -> None:
        (self.folder / "rules.json").write_text(json.dumps(rules))

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        given = {
            "PATH": str(self.folder / "bin"),
            "HOME": str(self.folder),
            "FAKE": str(self.folder),
            "TMPDIR": str(self.folder),
            "POLL_SECONDS": "0",
            "RETRY_SECONDS": "0",
            "ROUND_SECONDS": "0",
            "ZONES": "zone-a,zone-b,zone-c",
            "VIRTUAL_ENV": str(self.folder / "venv"),
            "TPU_TUNE_JOB": str(self.folder / "job"),
            **environment,
        }
        command = [str(self.folder / "bin" / "bash"), str(ROOT / "launch" / script), *words]
        return subprocess.run(command, env=given, cwd=self.folder, text=True, capture_output=True, timeout=120)

    def tpu(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return self.run("tpu.sh", *words, **environment)

    def calls(self, what: str = "") -> list[dict[str, Any]]:
        return [call for call in self._lines("calls.jsonl") if call["what"].startswith(what)]

    def trained(self) -> list[dict[str, Any]]:
        return self._lines("trained.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def world(tmp_path: pathlib.Path) -> World:
    return World(tmp_path)


def one_error(done: subprocess.CompletedProcess, text: str) -> None:
    assert done.returncode == 1
    assert re.findall(r"^error: .*", done.stderr, re.M)[-1:] and text in done.stderr.splitlines()[-1], done.stderr


def test_create_goes_on_to_the_zone_that_has_room(world):
    world.rules(
        {"match": "create.*zone-a", "err": NO_ROOM.format(zone="zone-a")},
        {"match": "create.*zone-b", "err": NO_QUOTA.format(zone="zone-b")},
        {"match": "create.*zone-c", "err": NO_ROOM.format(zone="zone-c"), "times": 1},
    )
    done = world.tpu("create", "--type", "v4-8", "--project=p", "--spot", "--flag=--network=mine")
    assert done.returncode == 0, done.stderr
    assert "tpu-tune is in zone-c" in done.stdout
    # A zone without quota is not asked again.
    assert [call["zone"] for call in world.calls("tpu-vm create")] == ["zone-a", "zone-b", "zone-c", "zone-a", "zone-c"]
    words = world.calls("tpu-vm create")[0]["words"]
    assert words[:5] == ["compute", "tpus", "tpu-vm", "create", "tpu-tune"]
    assert {
        "--accelerator-type=v4-8",
        "--version=tpu-ubuntu2204-base",
        "--spot",
        "--project=p",
        "--network=mine",
    } < set(words)


def test_create_gives_up_with_a_line(world):
    world.rules({"match": "create", "err": NO_ROOM.format(zone="z")})
    one_error(world.tpu("create", "--rounds", "2"), "no room for a v3-8 in zone-a, zone-b, zone-c after 2 rounds")
    assert len(world.calls("tpu-vm create")) == 6
    world.rules({"match": "create", "err": NO_QUOTA.format(zone="z")})
    one_error(world.tpu("create"), "none of zone-a, zone-b, zone-c will give a v3-8")
    world.rules({"match": "create", "err": "ERROR: (gcloud) argument --version: bad\nusage: x\n"})
    one_error(world.tpu("create"), "zone-a: ERROR: (gcloud) argument --version: bad")


def test_a_queued_resource_waits_for_its_turn_and_is_withdrawn(world):
    world.rules({"match": "queued-resources describe.*zone-a", "out": "WAITING_FOR_RESOURCES\n", "times": 3})
    done = world.tpu("create", "--queued", QUEUE_POLLS="3")
    assert done.returncode == 0 and "tpu-tune is in zone-b" in done.stdout, done.stderr
    assert [call["zone"] for call in world.calls("queued-resources delete")] == ["zone-a"]
    assert "--node-id=tpu-tune" in world.calls("queued-resources create")[0]["words"]
    assert world.tpu("delete").returncode == 0  # finds by itself that it was a queued one
    assert world.calls()[-1]["what"] == "queued-resources delete" and "--force" in world.calls()[-1]["words"]
    world.rules({"match": "queued-resources describe.*zone-c", "out": "FAILED\n", "times": 1})
    done = world.tpu("create", "--queued", "--zones", "zone-c", QUEUE_POLLS="3")
    assert done.returncode == 0 and "the queued resource is FAILED" in done.stderr


def test_the_whole_way_on_two_workers(world):
    """create, setup, start, status, logs, stop, delete; ssh fails twice on the way."""
    assert world.tpu("create").returncode == 0
    world.rules(
        {
            "match": "tpu-vm ssh",
            "err": "ssh: connect to host 1.2.3.4 port 22: Connection refused\n",
            "times": 2,
            "code": 255,
        }
    )
    done = world.tpu("setup")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Connection refused") == 2
    for number in (0, 1):
        assert (world.folder / f"home{number}" / "tpu_tune" / "tpu_tune" / "cli" / "__init__.py").is_file()
    assert "--editable" in (world.folder / "uv").read_text() and "[tpu,data]" in (world.folder / "uv").read_text()
    done = world.tpu("start", "--bucket", "gs://b/", *TRAIN)
    assert done.returncode == 0, done.stderr
    expected = ["train", "--json", *TRAIN[1:], "--config.output_dir=gs://b/tpu-tune"]
    assert [run["words"] for run in world.trained()] == [expected, expected]
    assert [pathlib.Path(run["home"]).name for run in world.trained()] == ["home0", "home1"]
    done = world.tpu("status")
    assert "tpu-tune: READY (zone-a)" in done.stdout and done.stdout.count("tpu_tune job: finished") == 2
    done = world.tpu("logs", "--worker", "1", "--lines", "20")
    assert "step 1/2 loss 1.5" in done.stdout and world.calls()[-1]["words"].count("--worker=1") == 1
    assert "no job runs here" in world.tpu("stop").stdout
    assert world.tpu("delete").returncode == 0 and world.calls()[-1]["what"] == "tpu-vm delete"
    assert "there is no tpu-tune in zone-a, zone-b, zone-c" in world.tpu("delete").stdout
    one_error(world.tpu("start", *TRAIN), "the TPU tpu-tune is absent in zone-a, zone-b, zone-c")


def test_three_failures_of_ssh_are_one_line(world):
    world.tpu("create")
    world.rules(
        {"match": "tpu-vm ssh", "err": "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) exited with return code [255].\n"}
    )
    one_error(world.tpu("start", *TRAIN), "not started on all workers: ERROR: (gcloud.compute.tpus.tpu-vm.ssh)")
    assert len(world.calls("tpu-vm ssh")) == 3


@pytest.mark.parametrize("where", ["environment", "file"])
def test_secrets_are_on_no_command_line_and_in_no_log(world, where):
    world.tpu("create")
    given, words = {"WANDB_API_KEY": SECRET, "HF_TOKEN": SECRET + "-hf"}, []
    if where == "file":
        file = world.folder / "my secrets"
        file.write_text(f"WANDB_API_KEY={SECRET}\nHF_TOKEN={SECRET}-hf")  # no end of line
        given, words = {}, ["--secrets", str(file)]
    said = [world.tpu("setup", *words, **given), world.tpu("start", *TRAIN, **given), world.tpu("logs")]
    assert all(done.returncode == 0 for done in said), said[0].stderr
    for run in world.trained():
        assert run["given"]["WANDB_API_KEY"] == SECRET and run["given"]["HF_TOKEN"] == SECRET + "-hf"
        assert SECRET not in " ".join(run["words"])
    assert SECRET not in json.dumps(world.calls()) and not any(SECRET in done.stdout + done.stderr for done in said)
    sent = [call for call in world.calls("tpu-vm scp") if "tpu-tune:.tpu_tune_secrets" in call["words"]]
    assert [call["mode"] for call in sent] == ["0o600"]
    texts = {path for path in world.folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()}
    texts -= {world.folder / "trained.jsonl", world.folder / "my secrets"}  # what the trainer was given, and ours
    assert texts == {world.folder / f"home{number}" / ".tpu_tune_secrets" for number in (0, 1)}
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in texts} == {"0o600"}


def test_a_secrets_file_that_others_can_read_is_refused(world):
    file = world.folder / "open"
    file.write_text("HF_TOKEN=x\n")
    file.chmod(0o644)
    one_error(world.run("job.sh", "run", "--config", "c.py", TPU_TUNE_SECRETS=str(file)), "chmod 600")
    assert not world.trained()


def test_babysit_books_a_preempted_tpu_again_and_goes_on_from_the_bucket(world):
    world.rules(
        {"match": "create.*zone-a", "err": NO_ROOM.format(zone="zone-a"), "skip": 1, "times": 1},
        {"match": "job.sh state", "out": "tpu_tune job: running\ntpu_tune job: running\n", "times": 2},
        {"match": "tpu-vm describe.*zone-a", "out": "PREEMPTED\n", "skip": 3, "times": 1},
    )
    done = world.tpu("babysit", "--bucket", "b", "--spot", "--delete", *TRAIN, WANDB_API_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    assert "there is no tpu-tune yet" in done.stdout and "is PREEMPTED: booking another one" in done.stdout
    assert [call["zone"] for call in world.calls("tpu-vm create")] == ["zone-a", "zone-a", "zone-b"]
    assert [call["zone"] for call in world.calls("tpu-vm delete")] == ["zone-a", "zone-b"]
    trained = world.trained()
    assert len(trained) == 4 and len({json.dumps(run["words"]) for run in trained}) == 1  # two workers, two starts
    assert trained[-1]["words"][-1] == "--config.output_dir=gs://b/tpu-tune"
    assert trained[-1]["given"]["WANDB_API_KEY"] == SECRET  # the new machine has the secrets too
    assert SECRET not in done.stdout + done.stderr + json.dumps(world.calls())
    assert "the run has ended" in done.stdout and "still booked" not in done.stdout


def test_babysit_starts_a_failed_job_again_and_not_for_ever(world):
    (world.folder / "trainer").write_text("137\n137\nfinished")
    done = world.tpu("babysit", "--bucket", "b", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "the job is failed 137: starting it (restart 1 of 3)" in done.stdout and "restart 2" not in done.stdout
    (world.folder / "trainer").write_text("1")
    world.tpu("delete")
    done = world.tpu("babysit", "--bucket", "b", *TRAIN, MAX_RESTARTS="1")
    one_error(done, "the job is failed 1 again after 1 restarts")
    assert "tpu-tune: data.train is not there" in done.stdout


def test_babysit_bears_with_google(world):
    """A describe that fails, an ssh that fails, a TPU under repair, and a delete that fails once."""
    world.tpu("create")
    world.rules(
        {"match": "tpu-vm describe", "err": "ERROR: 503 backend error\n", "times": 9},
        {"match": "tpu-vm describe.*zone-a", "out": "REPAIRING\n", "times": 1},
        {"match": "job.sh state", "err": "connection reset\n", "times": 3},
        {"match": "tpu-vm describe.*zone-a", "out": "TERMINATED\n", "skip": 1, "times": 2},
        {"match": "tpu-vm delete", "err": "ERROR: try again\n", "times": 1},
    )
    done = world.tpu("babysit", "--bucket", "b", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert len(world.calls("tpu-vm delete")) == 2 and len(world.trained()) == 2
    assert "does not answer" in done.stderr and "is REPAIRING" in done.stdout


def test_who_leaves_a_tpu_booked_says_so_and_what_ends_the_bill(world):
    again = "tpu-tune in zone-a is still booked, and is billed unless a grant covers it, until: bash launch/tpu.sh d"
    for words in (["create"], ["babysit", "--bucket", "b", *TRAIN], ["stop"], ["start", "--bucket", "b", *TRAIN]):
        done = world.tpu(*words, PROJECT_ID="p")
        assert done.returncode == 0, done.stderr
        assert again in done.stdout and "delete --name tpu-tune --zones zone-a --project p" in done.stdout, words
    assert len(world.trained()) == 4  # babysit set up what was booked only
    for words in (["logs"], ["create", "--dry-run"]):
        assert "still booked" not in world.tpu(*words).stdout, words
    world.rules({"match": "tpu-vm delete", "err": "ERROR: try again\n", "times": 1})
    one_error(failed := world.tpu("delete"), "try again")
    assert again in failed.stdout
    assert "still booked" not in world.tpu("delete").stdout
    world.tpu("create")
    world.rules({"match": "tpu-vm describe.*zone-a", "out": "PREEMPTED\n"})  # costs nothing
    assert "still booked" not in world.tpu("stop").stdout


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--config.data.train=/home/me/chats.jsonl"], "data.train=/home/me/chats.jsonl is a path of this machine"),
        (["--config.data.train", "~/chats.jsonl"], "gcloud storage cp ~/chats.jsonl gs://b/, then"),
        (["--config.data.train=chats.jsonl"], "chats.jsonl is not in the project"),
        ([], "data.train=my_data.jsonl is not in the project"),  # what the config file says
        (["--config.data.train=gs://b/a.jsonl", "--config.data.eval=eval.jsonl"], "data.eval=eval.jsonl is not in"),
        pytest.param(
            ["--config.data.train=.git"],
            "is ignored by git, so it is not copied",
            marks=pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout"),
        ),
        (["--config.data.train=a/b", "--config.model.path=/models/llama"], "model.path=/models/llama is a path of"),
        (["--config=/home/me/c.py"], "--config /home/me/c.py is a path of this machine"),
        (["--config", "mine.py"], "--config mine.py is not in the project"),
    ],
)
def test_a_local_path_for_a_tpu_is_an_error_before_anything_is_booked(world, words, error):
    (world.folder / "chats.jsonl").write_text("{}\n")
    for command in (["babysit", "--dry-run"], ["start"]) if words == [] else (["babysit", "--dry-run"],):
        done = world.tpu(*command, "--bucket", "b", "--", "--config", "configs/qlora.py", *words)
        one_error(done, error)
        assert "+ gcloud" not in done.stdout and not world.calls()


@pytest.mark.parametrize("path", ["gs://b/rows.jsonl", "tatsu-lab/alpaca", "squad", "tests/goldens", "/mnt/d/x.csv"])
def test_what_the_hosts_of_a_tpu_can_read_is_taken(world, path):
    words = ["--config=configs/qlora.py", f"--config.data.train={path}"]
    done = world.tpu("babysit", "--bucket", "b", "--dry-run", "--", *words)
    assert done.returncode == 0 and f"--config.data.train={path}" in done.stdout, done.stderr


@pytest.mark.parametrize("page", ["docs/trc.md", "docs/launch.md"])
def test_the_pages_commands_pass_a_dry_run(world, page):
    commands = re.findall(r"^bash launch/tpu\.sh (\w+(?:.*\\\n)*.*)$", (ROOT / page).read_text(), re.M)
    assert commands
    for command in commands:
        words = [word for word in shlex.split(command.replace("\\\n", " ")) if word != "--dry-run"]
        done = world.tpu(words[0], "--dry-run", *words[1:], BUCKET="my-bucket", TPU_NAME="mine", PROJECT_ID="p")
        assert done.returncode == 0 and "+ gcloud compute tpus tpu-vm create mine" in done.stdout, done.stderr


def test_dry_runs_call_nothing(world):
    done = world.tpu("babysit", "--bucket", "b", "--dry-run", *TRAIN, HF_TOKEN=SECRET)
    assert done.returncode == 0 and not world.calls() and SECRET not in done.stdout + done.stderr
    commands = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert [words[3:5] for words in commands] == [["tpu-vm", "create"]] * 3 + [
        ["tpu-vm", kind] for kind in ("scp", "ssh", "scp", "ssh", "ssh", "ssh")
    ]
    for command in ("create", "setup", "logs", "status", "stop", "delete"):
        done = world.tpu(command, "--dry-run")
        assert done.returncode == 0 and "+ gcloud compute tpus" in done.stdout, done.stderr
    assert not world.calls()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["launch"], "tpu.sh knows create, setup"),
        (["create", "--zone"], "--zone needs a value"),
        (["create", "--zones", "a b"], "write them as"),
        (["create", "--name", "My_TPU"], "TPU name 'My_TPU'"),
        (["create", "--type", "v9-8"], "give --version"),
        (["create", "--rounds", "many"], "whole numbers"),
        (["start", "--bucket", "b"], "after --"),
        (["start", "--config.seed=1"], "write it after --"),
        (["babysit", *TRAIN], "babysit needs a bucket"),
        (["setup", "--secrets", "/nowhere", "--dry-run"], "there is no such file"),
        (["stop", "--force"], "unknown option '--force'"),
    ],
)
def test_mistakes_are_one_line(world, words, error):
    done = world.tpu(*words)
    one_error(done, error)
    assert not world.calls()


@pytest.mark.parametrize("script", ["tpu.sh", "gpu.sh", "job.sh"])
def test_help_has_an_example(world, script):
    done = world.run(script, "--help")
    assert done.returncode == 0 and f"bash launch/{script}" in done.stdout and "--config" in done.stdout
    assert "set -euo" not in done.stdout and done.stderr == ""


def gpu(world: World, gpus: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    program(world.folder / "bin" / "nvidia-smi", f"#!/bin/sh\necho '{gpus}'\n")
    return world.run("gpu.sh", *words, **environment)


@pytest.mark.parametrize(("gpus", "build"), [("580.65.06, 9.0", "cuda13"), ("535.129.03, 8.0", "cuda12")])
def test_gpu_installs_for_the_driver_and_trains_with_nearly_all_memory(world, gpus, build):
    for _ in range(2):  # the second start goes on with the run
        done = gpu(world, gpus, *TRAIN[1:], WANDB_API_KEY=SECRET)
        assert done.returncode == 0, done.stderr
    installed = (world.folder / "uv").read_text()
    assert installed.count("\n") == 1 and f"[{build},data]" in installed
    first, second = world.trained()
    assert first == second and first["words"] == ["train", "--json", *TRAIN[1:]]
    assert first["given"] == {"WANDB_API_KEY": SECRET, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TPU_TUNE_JAX": build}
    assert "tpu_tune job: finished" in gpu(world, gpus, "state").stdout
    assert "step 1/2" in gpu(world, gpus, "logs").stdout
    assert SECRET not in (world.folder / "job" / "log").read_text()
    done = gpu(world, gpus, "run", *TRAIN[1:], XLA_PYTHON_CLIENT_MEM_FRACTION="0.5", TPU_TUNE_EXTRAS="gcs")
    assert (
        '"status": "finished"' in done.stdout
        and world.trained()[-1]["given"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    )
    assert f"[{build},data,gcs]" in (world.folder / "uv").read_text()


def test_gpu_says_what_is_missing(world):
    one_error(gpu(world, "470.82.01, 7.5", "--config", "c.py"), "no usable NVIDIA GPU here (jax build: cpu)")
    one_error(gpu(world, "580.65.06, 9.0"), "nothing to do")
    one_error(gpu(world, "580.65.06, 9.0", "fly"), "not 'fly'")
    done = gpu(world, "580.65.06, 9.0", "--dry-run", "--config", "a b.py")
    assert done.returncode == 0 and "+ job.sh start --config a\\ b.py" in done.stdout and not world.trained()


def test_a_job_under_nohup_is_seen_stopped_and_started_once(world):
    """Without tmux, and with a trainer that waits for a signal."""
    (world.folder / "bin" / "tmux").unlink()
    (world.folder / "trainer").write_text("wait\nwait\nfinished")
    log = world.folder / "job" / "log"

    def until(condition: Any) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, log.read_text()
            os.sched_yield()

    def state() -> str:
        return world.run("job.sh", "state").stdout.strip().removeprefix("tpu_tune job: ")

    for count, how in ((1, []), (2, ["--now"])):
        assert world.run("job.sh", "start", "--config", "c.py").returncode == 0
        until(lambda count=count: log.exists() and log.read_text().count("waiting") == count)
        assert state() == "running"
        assert "nothing started" in world.run("job.sh", "start", "--config", "c.py").stdout
        one_error(world.run("job.sh", "run", "--config", "c.py"), "a job runs here already")
        assert world.run("job.sh", "stop", *how).returncode == 0
        until(lambda: state() != "running")
        assert state() == ("failed 137" if how else "interrupted")
    assert len(world.trained()) == 2


def test_a_job_whose_machine_went_down_is_killed_not_running(world):
    (world.folder / "job").mkdir()
    (world.folder / "job" / "lock").touch()
    (world.folder / "job" / "state").write_text("running\n")
    assert "tpu_tune job: killed" in world.run("job.sh", "state").stdout


def test_what_plan_plans_for_is_what_gcloud_books(world):
    """Every TPU of plan's catalogue, by its name there, is booked by a type and an image that Google has for it."""
    names = [name for name in devices.NAMES if devices.find_device(name).kind == "tpu"]
    for name in names:
        done = world.tpu("create", "--type", name, "--zones", "zone-a", "--name", f"a-{name}")
        if name.startswith("tpu7x"):
            one_error(done, f"Google books {name} by GKE (Google Kubernetes Engine) only")
            continue
        assert done.returncode == 0, done.stderr
        booked = next(word for word in world.calls()[-1]["words"] if word.startswith("--accelerator-type="))
        assert booked == f"--accelerator-type={name.replace('v5e', 'v5litepod')}"
    assert len(world.calls()) == len(names) - 1
    done = world.tpu("create", "--type", "v5e-8", "--zones", "zone-a", "--version", "v2-alpha-tpuv6e")
    one_error(done, 'Invalid runtime version "v2-alpha-tpuv6e" for accelerator type "v5litepod-8"')
