"""Peak memory of the jobs that this project promises to fit, by the devices' own compilers, into benchmarks/MEMORY.md.

    python benchmarks/memory.py                                # all of them: half an hour on two cores
    python benchmarks/memory.py --list
    python benchmarks/memory.py --only 7b-v5e-1 33b-rtx3090    # some; the other rows of the file stay as they are

Each job is one `tpu-tune plan` command, run in a process of its own and written beside its figures, so that every row
can be had again by hand. Needs the compilers, not the devices: pip install -e ".[tpu,cuda-compiler]". A bar without a
number means that the job fits. GB are 1e9 bytes, of one device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import shlex
import subprocess
import sys
from typing import Any

PROJECT = pathlib.Path(__file__).resolve().parents[1]
TARGET = PROJECT / "benchmarks" / "MEMORY.md"

_ONE_ROW = {
    "train.per_device_train_batch_size": 1, "train.per_device_eval_batch_size": 1,
    "train.gradient_accumulation_steps": 1, "train.eval_strategy": "no", "model.remat": "full",
}  # fmt: skip
_QLORA = {"data.max_length": 2048, **_ONE_ROW}
_CHUNKED = {**_QLORA, "model.token_chunk_size": 512}  # projections and MLP of so many tokens at one time
_KAGGLE = {  # as the notebooks have it
    "train.per_device_train_batch_size": 1, "train.per_device_eval_batch_size": 1,
    "train.gradient_accumulation_steps": 1,
}  # fmt: skip
_SPARSE = {"lora.dropout": 0.0}  # adapters on experts have none
_OFFLOAD = {"model.remat": "offload", "lora.rank": 32}
_OVER_EIGHT = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1, "mesh.sequence": 8}
_KAGGLE_TPU = {
    **_KAGGLE, "model.remat": "full", "data.max_length": 1024,
    "train.per_device_train_batch_size": 2, "train.per_device_eval_batch_size": 2,
}  # fmt: skip
_KAGGLE_GPU = {"model.remat": "full", "data.max_length": 512, "model.dtype": "float16", **_KAGGLE}


@dataclasses.dataclass(frozen=True)
class Job:
    """One promise.

    Attributes:
      name: for `--only`.
      words: what is done.
      model: preset.
      device: of the catalogue.
      bar: GB a device at the most; None where it has to fit.
      overrides: config keys on the command line.
      config: the file they are laid over.
    """

    name: str
    words: str
    model: str
    device: str
    bar: float | None
    overrides: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(_QLORA))
    config: str = "configs/qlora.py"

    @property
    def arguments(self) -> list[str]:
        """The words behind `tpu-tune`."""
        overrides = {"model.path": self.model, **self.overrides}
        return ["plan", "--config", self.config, "--device", self.device] + [
            f"--config.{key}={value}" for key, value in overrides.items()
        ]


# Of a context that must be longer than a number: the next multiple of 1,024 tokens has to fit.
JOBS = (
    Job("7b-v5e-1", "LLaMA-7B QLoRA", "llama-7b", "v5e-1", 5.4, _CHUNKED),
    Job("13b-v5e-1", "LLaMA-13B QLoRA", "llama-13b", "v5e-1", 9.5, _CHUNKED),
    Job("20b-v5e-1", "GPT-NeoX-20B QLoRA", "gpt-neox-20b", "v5e-1", None, _CHUNKED),
    Job("qwen3.5-9b-v5e-1", "Qwen3.5-9B QLoRA", "qwen3.5-9b", "v5e-1", None, _CHUNKED),
    Job("gemma-4-31b-v5e-8", "Gemma-4-31B QLoRA", "gemma-4-31b", "v5e-8", None, _CHUNKED),
    Job("qwen3-32b-v5e-8", "Qwen3-32B QLoRA, kaggle_tpu_qlora.ipynb", "qwen3-32b", "v5e-8", None, _KAGGLE_TPU),
    Job(
        "qwen3-14b-t4x2",
        "Qwen3-14B QLoRA in float16, kaggle_gpu_qlora.ipynb",
        "qwen3-14b",
        "t4 x2",
        None,
        _KAGGLE_GPU,
    ),
    Job("7b-v2-8", "LLaMA-7B QLoRA", "llama-7b", "v2-8", 2.0),
    Job("7b-v3-8", "LLaMA-7B QLoRA", "llama-7b", "v3-8", 2.0),
    Job("33b-rtx3090", "LLaMA-33B QLoRA", "llama-33b", "rtx3090", 21.6, _CHUNKED),
    Job("65b-rtx6000ada", "LLaMA-65B QLoRA", "llama-65b", "rtx6000ada-48g", 41.0, _CHUNKED),
    Job(
        "65b-v2-8",
        "LLaMA-65B QLoRA, one sequence over all devices",
        "llama-65b",
        "v2-8",
        None,
        {**_QLORA, **_OVER_EIGHT},
    ),
    Job(
        "7b-full-v3-8",
        "LLaMA-7B full fine-tuning, float32 weights and AdamW, bf16 compute, state in host memory",
        "llama-7b",
        "v3-8",
        None,
        {**_QLORA, "train.optim_offload": "true"},
        "configs/full.py",
    ),
    Job(
        "8b-rtx4080",
        "Llama-3-8B QLoRA r=32, 40,960 tokens, layer inputs in host memory",
        "llama-3-8b",
        "rtx4080",
        None,
        {**_QLORA, **_OFFLOAD, "data.max_length": 40960},
    ),
    Job(
        "8b-rtx4090",
        "Llama-3-8B QLoRA r=32, 78,848 tokens, layer inputs in host memory",
        "llama-3-8b",
        "rtx4090",
        None,
        {**_QLORA, **_OFFLOAD, "data.max_length": 78848},
    ),
    Job("30b-a3b-v5e-8", "Qwen3-30B-A3B QLoRA", "qwen3-30b-a3b", "v5e-8", None, {**_QLORA, **_SPARSE}),
    Job("8x7b-v5e-8", "Mixtral-8x7B QLoRA", "mixtral-8x7b", "v5e-8", None, {**_QLORA, **_SPARSE}),
    Job("8x7b-a100", "Mixtral-8x7B QLoRA", "mixtral-8x7b", "a100-80g", None, {**_CHUNKED, **_SPARSE}),
    Job("gpt-oss-20b-v5e-4", "gpt-oss-20b LoRA over its mxfp4", "gpt-oss-20b", "v5e-4", None),
    Job("gpt-oss-20b-v5e-1", "gpt-oss-20b LoRA over its mxfp4", "gpt-oss-20b", "v5e-1", None, _CHUNKED),
)

_HEAD = """# Memory of the promised jobs

Peak bytes of one device, in GB of 1e9 bytes, as the device's own compiler says of the whole training step: compiled,
not run. nf4 with double quantization, rank 16 on every linear layer, AdamW with float32 adapters and state, one row of
2,048 tokens a device, unless said. Written by `python benchmarks/memory.py`; `--only NAME` renews single rows.
"""
_COLUMNS = ("name", "job", "device", "bar", "peak", "capacity", "", "frozen", "trainable", "gradients", "optimizer",
            "batch, padding", "scratch", "in host memory", "compiler", "date")  # fmt: skip


def measure(job: Job) -> dict[str, Any]:
    """Run a job's command and return the figures that it prints.

    Raises:
      RuntimeError: the command fails, or there is no compiler for the device.
    """
    command = [sys.executable, "-m", "tpu_tune", *job.arguments, "--json"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    figures = json.loads(done.stdout)
    if figures["compiler"].startswith("none"):
        raise RuntimeError(f"{job.name}: no compiler, so no figure worth writing down: {figures['compiler']}")
    return figures


def holds(job: Job, figures: dict[str, Any]) -> bool:
    """Return whether the job fits its device, and its bar where it has one."""
    peak = figures["peak_bytes_per_device"]
    return figures["fits"] and (job.bar is None or peak <= job.bar * 1e9)


def record(job: Job, figures: dict[str, Any], date: str) -> dict[str, str]:
    """Return a row: column -> text, and `command`."""
    parts = figures["breakdown"]
    peak = figures["peak_bytes_per_device"]
    cells = [
        job.name,
        job.words,
        job.device,
        "fits" if job.bar is None else f"{job.bar:.1f}",
        "too large" if peak is None else f"{peak / 1e9:.2f}",
        _gb(figures["capacity_bytes_per_device"]),
        "holds" if holds(job, figures) else "**fails**",
        *[_gb(parts[name]) for name in ("frozen", "trainable", "gradients", "optimizer")],
        _gb(parts["batch"] + parts["padding"]),
        _gb(parts["scratch"]),
        _gb(figures["host_bytes_per_device"]),
        figures["compiler"],
        date,
    ]
    return {**dict(zip(_COLUMNS, cells, strict=True)), "command": shlex.join(["tpu-tune", *job.arguments])}


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def read(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of a file that `write` made, by name."""
    rows: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == len(_COLUMNS) and cells[0] != _COLUMNS[0]:
            rows[cells[0]] = dict(zip(_COLUMNS, cells, strict=True))
        name, found, command = line.partition(": `")
        if found and name.removeprefix("- ") in rows:
            rows[name.removeprefix("- ")]["command"] = command.rstrip("`")
    return rows


def write(rows: dict[str, dict[str, str]]) -> str:
    """Return the file's text: the jobs in the order of `JOBS`; what is not among them is dropped."""
    kept = [rows[job.name] for job in JOBS if job.name in rows]
    lines = [_HEAD, f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += [f"| {' | '.join(row[column] for column in _COLUMNS)} |" for row in kept]
    missing = [job.name for job in JOBS if job.name not in rows]
    lines += ["", f"Not measured yet: {', '.join(missing)}."] if missing else []
    lines += ["", "The commands:", "", *[f"- {row['name']}: `{row['command']}`" for row in kept]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; the status is 1 where a job fails its bar or cannot be compiled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [job.name for job in JOBS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="print the jobs' commands and do nothing")
    parser.add_argument("--output", type=pathlib.Path, default=TARGET, help="the file (default benchmarks/MEMORY.md)")
    options = parser.parse_args(arguments)
    chosen = [job for job in JOBS if not options.only or job.name in options.only]
    status = 0
    for job in chosen:
        if options.list:
            print(f"{job.name}: {shlex.join(['tpu-tune', *job.arguments])}")
            continue
        try:
            row = record(job, measure(job), datetime.date.today().isoformat())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        print(f"{job.name}: {row['peak']} GB, bar {row['bar']}: {row['']}", file=sys.stderr, flush=True)
        status |= row[""] != "holds"
        before = read(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
        # After each job: a run that is stopped leaves what it has.
        options.output.write_text(write({**before, job.name: row}), encoding="utf-8")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
