"""Commands that are killed, interrupted, or out of disk. A part of `faults.py`, which see.

Every command is a process of its own, as a user starts it, on a tiny model. It is run once to its end; that is what
every later run is held against, byte by byte (of metrics.jsonl without what depends on the clock).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
SECONDS = 300  # that a command may take on a busy machine
STARTED = 0.3  # seconds until Python itself has started; before that, a signal is Python's own
_CLOCK = ("tokens_per_second", "eval_runtime")


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
      name: for the table.
      words: the command line, given the folder that it writes to.
      results: patterns of the files in that folder that have to be equal in the end.
      trains: whether it is a run, which goes on where it was stopped and whose metrics.jsonl grows; whatever else
        is there is whole.
    """

    name: str
    words: Callable[[pathlib.Path], list[str]]
    results: tuple[str, ...]
    trains: bool = False


@dataclass
class Ended:
    """A process that has ended: its status (negative: the signal that ended it), and what it wrote."""

    status: int
    out: str
    err: str
    seconds: float
    events: dict[str, float] = field(default_factory=dict)  # when it said its first line, made its first step


class Campaign:
    """A folder with the model, the data and every job's whole result; and the counts."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.seed = folder, seed
        self.found: dict[str, Counter] = {}
        self._whole: dict[str, tuple[pathlib.Path, Ended]] = {}
        _make_inputs(folder)
        self.jobs = {job.name: job for job in _jobs(folder, self)}

    def draw(self, *names: Any) -> random.Random:
        """Return a random generator for a case."""
        return random.Random("/".join(map(str, (self.seed, *names))))

    def whole(self, job: Job) -> tuple[pathlib.Path, Ended]:
        """Return the folder of an undisturbed run of a job, and how it ended."""
        if job.name not in self._whole:
            place = self.fresh(f"whole {job.name}")
            if not job.name.startswith("data"):
                self.start_and_end(job, self.fresh("warm up"))  # compiled functions are kept
            ended = self.start_and_end(job, place)
            assert ended.status == 0, ended.err
            self._whole[job.name] = place, ended
        return self._whole[job.name]

    def fresh(self, name: str) -> pathlib.Path:
        """Return an empty folder."""
        place = self.folder / name.replace(" ", "-")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def start(self, job: Job, place: pathlib.Path, **options: Any) -> subprocess.Popen:
        """Start a job's process."""
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "TMPDIR": str(place),
        }
        words = [sys.executable, "-m", "tpu_tune", *job.words(place)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        return subprocess.Popen(words, env=env, cwd=self.folder, **pipes, **options)

    def start_and_end(self, job: Job, place: pathlib.Path, **options: Any) -> Ended:
        """Run a job to its end."""
        began = time.monotonic()
        process, events = self.start(job, place, **options), {}
        while process.poll() is None and time.monotonic() - began < SECONDS and len(events) < 2:
            for name, there in _EVENTS.items():
                if name not in events and there(place):
                    events[name] = time.monotonic() - began
            time.sleep(0.01)
        return self.end(process, began, events)

    def end(self, process: subprocess.Popen, began: float, events: dict[str, float] | None = None) -> Ended:
        """Wait for a process."""
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += "\nstuck"
        return Ended(process.returncode, out, err, time.monotonic() - began, events or {})

    def count(self, name: str, outcome: str, about: str = "") -> None:
        """Add a case to the table; print what went wrong."""
        self.found.setdefault(name, Counter())[outcome] += 1
        good = outcome in ("right", "one line")
        print(f"{name}: {outcome}" + ("" if good else f": {about.strip()[-1500:]}"), flush=True)

    def difference(self, job: Job, place: pathlib.Path, complete: bool = True) -> str:
        """Return what of a job's results is not as in its whole run; "" if nothing is."""
        expected, found = (_results(job, one) for one in (self.whole(job)[0], place))
        for name, content in found.items():
            if name not in expected:
                return f"{name} is too much"
            if content != expected[name] and (complete or not name.endswith("metrics.jsonl")):
                return f"{name} differs"
        missing = expected.keys() - found.keys()
        return f"{min(missing)} is missing" if complete and missing else ""


_EVENTS = {
    "loading": lambda place: (place / "out" / "run.lock").exists() or any(place.glob("[!.]*")),
    "training": lambda place: (place / "out" / "metrics.jsonl").exists(),
}


# --- jobs -----------------------------------------------------------------------------------------------------------


def _make_inputs(folder: pathlib.Path) -> None:
    from helpers_training import make_config, write_rows, write_tiny_llama

    from tpu_tune import config as configuration

    write_tiny_llama(folder / "tiny")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)]
    (folder / "pages").mkdir()
    for number in range(200):
        text = " ".join(draw.choices(words, k=80))
        (folder / "pages" / f"{number:03}.html").write_text(
            f"<title>{number}</title><p>{text} &amp; <b>{number}</b></p>"
        )
    rows = [{"text": " ".join(draw.choices(words, k=60))} for _ in range(400)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model__path": str(folder / "tiny"), "model__dtype": "float32", "lora__rank": 4, "lora__dropout": 0.1,
        "data__train": str(write_rows(folder / "rows.jsonl", 84)), "data__cache_dir": str(folder / "cache"),
        "data__num_workers": 1, "data__packing": False, "data__max_length": 96, "data__eval_ratio": 0.05,
        "train__num_train_epochs": 3.0, "train__per_device_train_batch_size": 4, "train__learning_rate": 1e-2,
        "train__logging_steps": 1, "train__eval_steps": 7, "train__save_steps": 2, "train__save_total_limit": 2,
    }  # fmt: skip
    for method in ("lora", "full"):
        values = json.dumps(configuration.to_dict(make_config(**settings, method=method)))
        (folder / f"{method}.py").write_text(
            f"import json\nfrom tpu_tune import config\n\ndef get_config():\n"
            f"    return config.from_dict(json.loads({values!r}))\n"
        )
    (folder / "recipe.py").write_text(
        "from tpu_tune.data.recipe import default\n\ndef get_config():\n    recipe = default()\n"
        f"    recipe.inputs = [{str(folder / 'pages')!r}]\n    recipe.clean.near_duplicates = 0.8\n"
        "    recipe.cluster.k = 3\n    recipe.split.ratio = '0.9,0.1'\n"
        f"    recipe.tokenize.tokenizer_path = {str(folder / 'tiny')!r}\n    recipe.tokenize.max_length = 256\n"
        "    return recipe\n"
    )


def _jobs(folder: pathlib.Path, campaign: Campaign) -> Iterator[Job]:
    for method, result in (("lora", "adapter"), ("full", "model")):
        words = ["train", "--config", str(folder / f"{method}.py")]
        yield Job(
            f"train, {method}",
            lambda place, words=words: [*words, f"--config.output_dir={place / 'out'}"],
            ("out/metrics.jsonl", f"out/{result}/*.safetensors", f"out/{result}/*.json"),
            trains=True,
        )
    yield Job(
        "data run",
        lambda place: ["data", "run", "--config", str(folder / "recipe.py"), f"--config.output_dir={place / 'out'}"],
        ("out/*/*.jsonl", "out/*/*.arrow"),
    )
    yield from _data_jobs(folder)
    yield from _run_jobs(lambda: str(campaign.whole(campaign.jobs["train, lora"])[0] / "out"), str(folder / "lora.py"))


def _data_jobs(folder: pathlib.Path) -> Iterator[Job]:
    texts, tiny = str(folder / "texts.jsonl"), str(folder / "tiny")
    for name, words, results in (
        ("ingest", [str(folder / "pages"), "--output", "{}/raw.jsonl"], ["raw.jsonl"]),
        ("clean", [texts, "--output", "{}/c.jsonl", "--report", "{}/c.json", "--near-duplicates", "0.8"], ["c.jsonl"]),
        ("split", [texts, "--split-ratio", "0.8,0.2", "--output-dir", "{}/split"], ["split/*.jsonl"]),
        ("chunk", [texts, "-o", "{}/chunks.jsonl", "-t", tiny, "--tokens", "64"], ["chunks.jsonl"]),
        ("tokenize", ["-i", texts, "-o", "{}/t.arrow", "-t", tiny, "-l", "512"], ["t.arrow"]),
        ("cluster", [texts, "--output", "{}/k.jsonl", "--k", "3", "--map", "{}/map.html"], ["k.jsonl"]),
    ):
        yield Job(
            f"data {name}",
            lambda place, name=name, words=words: ["data", name, *(word.format(place) for word in words)],
            tuple(results),
        )


def _run_jobs(run: Callable[[], str], config: str) -> Iterator[Job]:
    for name, words, results in (
        ("export --merge", ["--merge", "--output", "{}/merged"], ["merged/*.safetensors", "merged/*.json"]),
        ("export --gguf", ["--gguf", "--output", "{}/m.gguf"], ["m.gguf"]),
        ("export", ["--output", "{}/adapter"], ["adapter/*.safetensors", "adapter/*.json"]),
    ):
        yield Job(
            name,
            lambda place, words=words: ["export", run(), *(word.format(place) for word in words)],
            tuple(results),
        )
    yield Job(
        "eval",
        lambda place: ["eval", "--model", run(), "--output", str(place / "eval")],
        ("eval/predictions.jsonl",),
    )
    yield Job(
        "curves",
        lambda place: ["curves", run(), "--output", f"{place}/c.png", "--html", f"{place}/c.html"],
        ("c.png",),
    )
    yield Job(
        "lr-find",
        lambda place: ["lr-find", "--config", config, "--steps", "12", "--output", str(place / "lr.png")],
        ("lr.png",),
    )


def _results(job: Job, place: pathlib.Path) -> dict[str, bytes]:
    found = {}
    for pattern in job.results:
        for path in place.glob(pattern):
            if any(part.startswith(".") for part in path.relative_to(place).parts):
                continue  # written aside, and not there under its name yet
            content = path.read_bytes()
            if path.name == "metrics.jsonl":
                with contextlib.suppress(ValueError):  # a row that a kill has cut short
                    rows = [json.loads(line) for line in content.splitlines()]
                    rows = [{key: value for key, value in row.items() if key not in _CLOCK} for row in rows]
                    content = json.dumps(rows).encode()
            found[str(path.relative_to(place))] = content
    return found


# --- kills and signals ----------------------------------------------------------------------------------------------


def _wait(campaign: Campaign, job: Job, place: pathlib.Path, process: subprocess.Popen, draw: random.Random) -> str:
    """Wait until a random moment of a process; return which kind of moment it was."""
    whole = campaign.whole(job)[1]
    loading, training = (whole.events.get(name, 0.0) for name in ("loading", "training"))
    kind = draw.choice(
        ["any", "loading", "training", "training", "saving", "saving"] if job.trains else ["any", "saving"]
    )
    began, before = time.time(), {path.name for path in (place / "out" / "checkpoints").glob("*")}
    if kind == "any":
        delay = STARTED + draw.random() * (whole.seconds - STARTED)
    elif kind == "loading":
        delay = loading + draw.random() * max(training - loading, 0.1)
    elif kind == "training":
        _until(process, lambda: _changed(place / "out" / "metrics.jsonl", began))
        delay = draw.random() * max(whole.seconds - training, 0.1)
    elif job.trains:
        _until(process, lambda: {path.name for path in (place / "out" / "checkpoints").glob("*")} - before)
        delay = draw.random() * 0.05
    else:
        _until(process, lambda: any(path.stat().st_mtime > began for path in place.rglob("*") if path.is_file()))
        delay = draw.random() * 0.3
    end = time.monotonic() + delay
    _until(process, lambda: time.monotonic() > end)
    return kind


def _until(process: subprocess.Popen, there: Callable[[], Any]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError):  # what was listed is gone
            if there():
                return
        time.sleep(0.002)


def _changed(file: pathlib.Path, began: float) -> bool:
    return file.exists() and file.stat().st_mtime > began


def interrupt(campaign: Campaign, job: Job, numbers: tuple[int, ...], rounds: int) -> None:
    """Send `rounds` of the signals to a job at random moments; after every few let it end, and compare."""
    name, done, start = f"{job.name}: {'SIGKILL' if numbers[0] == signal.SIGKILL else 'SIGTERM, Ctrl-C'}", 0, 0
    while done < rounds and start < 5 * rounds:  # some are faster than the signal
        start += 1
        draw, place = campaign.draw(name, start), campaign.fresh(f"interrupted {job.name}")
        events: list[str] = []
        for _ in range(draw.choice([1, 2, 3]) if job.trains else 1):
            number = draw.choice(numbers)
            began = time.monotonic()
            process = campaign.start(job, place, preexec_fn=_default_signals)
            moment = _wait(campaign, job, place, process, draw)
            if process.poll() is not None:  # it was faster
                campaign.end(process, began)
                break
            process.send_signal(number)
            ended = campaign.end(process, began)
            events.append(f"{signal.Signals(number).name} while {moment}")
            problem = _unclean(number, ended) or campaign.difference(job, place, complete=False)
            if problem:
                campaign.count(
                    name, problem if problem in ("traceback", "stuck") else "lost", f"{events}: {problem} {ended}"
                )
                done, events = done + 1, events[:-1]
        again = campaign.start_and_end(job, place)
        outcome, about = _judged(campaign, job, place, again)
        for _ in events:
            campaign.count(name, outcome, f"{events}: {about}")
        done += len(events)


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background process of a shell ignores it


def _unclean(number: int, ended: Ended) -> str:
    """What is not clean about how a process ended by a signal; "" if it was."""
    if "Traceback" in ended.err or "Exception ignored" in ended.err:
        return "traceback"
    if ended.err.endswith("stuck"):
        return "stuck"
    clean = {signal.SIGKILL: {0, -9}, signal.SIGTERM: {0, -15, 143}, signal.SIGINT: {0, 1, 130, -2}}[number]
    return "" if ended.status in clean else f"status {ended.status}"


def _judged(campaign: Campaign, job: Job, place: pathlib.Path, ended: Ended) -> tuple[str, str]:
    if "Traceback" in ended.err:
        return "traceback", ended.err
    different = campaign.difference(job, place)
    # A command that does not replace what is there says so where the one before had ended but for its exit.
    if ended.status != 0 and (different or "is there already" not in ended.err):
        return "lost", f"status {ended.status}: {ended.err}"
    return ("difference", f"{different}: {ended.err}") if different else ("right", "")


# --- disks and checkpoints ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(campaign: Campaign) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Yield a function that gives the folder `disk` a size, in bytes, and returns how to start a process on it.

    As root it is a disk of its own; else a limit on the size of each file.
    """
    place = campaign.fresh("disk")
    mounted = (
        os.geteuid() == 0
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512m", "tmpfs", place]).returncode == 0
    )

    def limit(size: int) -> dict[str, Any]:
        if not mounted:
            return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
        subprocess.run(["mount", "-o", f"remount,size={max(size, 4096)}", str(place)], check=True)
        return {}

    try:
        yield limit
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def _empty(place: pathlib.Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill(campaign: Campaign, job: Job, rounds: int, limit: Callable[[int], dict[str, Any]]) -> None:
    """Run a job on disks that are too small by a random share, then with room enough."""
    place, name = campaign.folder / "disk", f"{job.name}: full disk"
    used = sum(path.stat().st_blocks * 512 for path in campaign.whole(job)[0].rglob("*"))
    for number in range(rounds):
        limit(512 << 20)
        _empty(place)
        size = int(used * campaign.draw(name, number).random())
        ended = campaign.start_and_end(job, place, **limit(size))
        lines = [line for line in ended.err.splitlines() if line.startswith("tpu-tune:")]
        if "Traceback" in ended.err or ended.status not in (0, 1) or len(lines) != ended.status:
            outcome = "traceback" if ended.status in (0, 1) else "crash"
            campaign.count(name, outcome, f"{size} of {used} bytes, status {ended.status}: {ended.err}")
            continue
        different = (
            "" if ended.status == 0 and job.trains else campaign.difference(job, place, complete=ended.status == 0)
        )
        limit(512 << 20)
        left = ended.status != 0 and not job.trains and [path.name for path in place.rglob(".*") if path.is_file()]
        again = campaign.start_and_end(job, place)
        outcome, about = _judged(campaign, job, place, again)
        if different:
            outcome, about = "lost", different
        elif left:
            outcome, about = "left behind", str(left)
        elif outcome == "right" and ended.status == 1:
            outcome = "one line"
        campaign.count(name, outcome, f"{size} of {used} bytes: {about}; first: {ended.err}")


def damage_checkpoint(campaign: Campaign, job: Job, rounds: int) -> None:
    """Damage a file of a run's checkpoints, and start the run again: it ends equal, or says what is wrong."""
    from fault_files import damage

    for number in range(rounds):
        draw, place = campaign.draw("checkpoint", number), campaign.fresh("damaged")
        shutil.copytree(campaign.whole(job)[0] / "out", place / "out")
        shutil.rmtree(place / "out" / ("adapter" if (place / "out" / "adapter").exists() else "model"))
        files = sorted(path for path in (place / "out" / "checkpoints").rglob("*") if path.is_file())
        file = draw.choice([path for path in files if path.stat().st_size])
        file.write_bytes(damage(file.read_bytes(), draw, True, file.suffix == ".json" or file.name.startswith("_")))
        ended = campaign.start_and_end(job, place)
        lines = [line for line in ended.err.splitlines() if line.startswith("tpu-tune:")]
        about = str(file.relative_to(place))
        if ended.status == 1 and len(lines) == 1 and "Traceback" not in ended.err:
            campaign.count(f"{job.name}: checkpoint", "one line")
            continue
        outcome, said = _judged(campaign, job, place, ended)
        campaign.count(f"{job.name}: checkpoint", outcome, f"{number}, {about}: {said}")


KILLED = {"train, lora": 15, "train, full": 15, "data run": 10, "export --merge": 5, "export --gguf": 5}
SIGNALLED = {"train, lora": 18, "train, full": 12, "data run": 8, "data tokenize": 3, "eval": 3, "export --gguf": 3}
SIGNALLED |= {"lr-find": 3}


def run(part: str, folder: pathlib.Path, rounds: int, seed: int, only: str = "") -> dict[str, Counter]:
    """Run a part of the campaign; return job -> how often each outcome came."""
    campaign = Campaign(folder, seed)
    jobs = [job for name, job in campaign.jobs.items() if only in name]
    if part == "disks":
        with _disk(campaign) as limit:
            for job in jobs:
                fill(campaign, job, rounds, limit)
    elif part == "checkpoints":
        for job in [job for job in jobs if job.trains]:
            damage_checkpoint(campaign, job, rounds // 2)
    else:
        shares = KILLED if part == "kills" else SIGNALLED
        numbers = (signal.SIGKILL,) if part == "kills" else (signal.SIGTERM, signal.SIGINT)
        for job in [job for job in jobs if job.name in shares]:
            interrupt(campaign, job, numbers, max(1, round(shares[job.name] * rounds / 50)))
    return campaign.found
