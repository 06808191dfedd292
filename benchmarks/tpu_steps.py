"""Training steps compiled for TPUs that are not there, and what their programs say of time: for scripts beside this.

Each step is compiled once, in a process of its own, with every kernel's bundles dumped. `figures` reads that program
in both ways that a plan has: without the bundles, and with all of them.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

PROJECT = pathlib.Path(__file__).resolve().parents[1]
_ONE_ROW = {
    "data.max_length": 2048, "train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 1,
    "model.remat": "full",
}  # fmt: skip
_PLAIN = {**_ONE_ROW, "lora.dropout": 0.0}
_DOTS = {**_ONE_ROW, "model.remat": "dots"}
_EIGHT_ROWS = {**_ONE_ROW, "train.per_device_train_batch_size": 8, "model.token_chunk_size": 8 * 2048}  # not cut
QLORA, LORA, FULL = "configs/qlora.py", "configs/lora.py", "configs/full.py"
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> device, config, overrides
    "7b": ("v5e-1", QLORA, {**_ONE_ROW, "model.path": "llama-7b"}),
    "7b-dots": ("v5e-1", QLORA, {**_DOTS, "model.path": "llama-7b"}),
    "7b-no-dropout": ("v5e-1", QLORA, {**_PLAIN, "model.path": "llama-7b"}),
    "7b-int4": ("v5e-1", QLORA, {**_PLAIN, "model.path": "llama-7b", "quantize.format": "int4"}),
    "8b": ("v5e-1", QLORA, {**_ONE_ROW, "model.path": "llama-3-8b"}),
    "13b": ("v5e-1", QLORA, {**_ONE_ROW, "model.path": "llama-13b"}),
    "smollm2": ("v5e-1", QLORA, {**_ONE_ROW, "model.path": "smollm2-135m"}),
    "smollm2-full": ("v5e-1", FULL, {**_EIGHT_ROWS, "model.path": "smollm2-135m"}),
    "smollm2-full-dots": ("v5e-1", FULL, {**_EIGHT_ROWS, "model.path": "smollm2-135m", "model.remat": "dots"}),
    "7b-v6e": ("v6e-1", QLORA, {**_ONE_ROW, "model.path": "llama-7b"}),
    "7b-v3": ("v3-8", QLORA, {**_ONE_ROW, "model.path": "llama-7b"}),
    "7b-v3-kernel": ("v3-8", QLORA, {**_ONE_ROW, "model.path": "llama-7b", "model.quantized_matmul": "pallas"}),
    "7b-lora-v5e-8": ("v5e-8", LORA, {**_ONE_ROW, "model.path": "llama-7b"}),
    "70b-v5e-16": ("v5e-16", QLORA, {**_ONE_ROW, "model.path": "llama-2-70b"}),
}
_LAYERS = 32  # of LLaMA-7B
# name -> the job that does the same work, what `tunix_step.py` takes. Its layers are a loop of Python's, so the bundles
# of all 32 would be hours of compiling: they are dumped of two layers, to see how far the figure without them is off.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    f"tunix-{format}-{remat}{suffix}": ("7b-no-dropout", {"format": format, "remat": remat.upper(), **how})
    for format in ("int4", "nf4")
    for remat in ("none", "block", "decoder")
    for suffix, how in {
        "": {"layers": _LAYERS, "donate": False},
        "-donated": {"layers": _LAYERS, "donate": True},
        "-2-layers": {"layers": 2, "donate": False},
    }.items()
}


def figures(name: str, keep: pathlib.Path, python: str = sys.executable) -> dict[str, Any]:
    """Return a job's figures; it is compiled where `keep` does not hold its program and bundles yet.

    Args:
      name: of a job, or of a peer's.
      keep: a directory for programs and bundles.
      python: the interpreter that has a peer's packages.

    Returns:
      `name`, `device` and `compiler` (names), `peak` (bytes a device), and `plan` and `full`: `rates` of a step's time
      without the kernels' bundles and with them (the same where none were dumped).

    Raises:
      SystemExit: it cannot be compiled.
    """
    from tpu_tune.planning import step_time
    from tpu_tune.planning.devices import find_device

    place = keep / name
    if not (place / "compiled.json").exists():
        _compile_in_a_process(name, place, python)
    same = PEERS[name][0] if name in PEERS else name
    found, device = json.loads((place / "compiled.json").read_text()), find_device(JOBS[same][0])
    program, tokens, adapters = (place / "program.txt").read_text(), found.pop("tokens"), found.pop("adapters", 0)
    flops = found.pop("flops") if "flops" in found else _flops(name, tokens, adapters)
    for key, dump in (("plan", ""), ("full", str(place))):
        found[key] = step_time.rates(step_time.of_program(program, device, dump), tokens, flops, device)
    return {"name": name, "device": device.name, **found}


def kinds(time: dict[str, Any]) -> str:
    """Return where a step's time goes, in words and milliseconds."""
    return ", ".join(f"{kind} {1e3 * seconds:,.0f}" for kind, seconds in time["kinds"].items())


def _compile_in_a_process(name: str, place: pathlib.Path, python: str) -> None:
    from tpu_tune.planning.bundles import dump_flags
    from tpu_tune.planning.compile_process import environment

    place.mkdir(parents=True, exist_ok=True)
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump_flags(place)}".strip()
    command = [sys.executable, __file__, name, str(place)]
    if name in PEERS:
        if PEERS[name][1]["layers"] == _LAYERS:
            flags = os.environ.get("LIBTPU_INIT_ARGS", "")
        command = [python, str(PROJECT / "benchmarks" / "tunix_step.py"), json.dumps(PEERS[name][1]), str(place)]
    variables = {**environment("tpu"), "LIBTPU_INIT_ARGS": flags}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")


def _config(name: str) -> Any:
    """Return a job's whole configuration."""
    from tpu_tune import config as configuration

    _, file, overrides = JOBS[name]
    config = configuration.from_file(str(PROJECT / file))
    for key, value in overrides.items():
        configuration.assign(config, key, value)
    return configuration.check(config)


def _flops(name: str, tokens: int, adapters: int) -> float:
    """Return the model's FLOPs of one row of a peer's: those of the job that does the same work."""
    from tpu_tune.models import architecture
    from tpu_tune.planning.flops import step_work
    from tpu_tune.planning.model_config import model_config

    same, given = PEERS[name]
    config = _config(same)
    sizes = {**model_config(config), "num_hidden_layers": given["layers"]}
    return step_work(architecture(sizes), config, 1, tokens, 0, adapters).model


def _compile(name: str, place: pathlib.Path) -> None:
    """Compile a job's step in this process; write its program, and what else `figures` needs, beside its bundles."""
    import jax

    from tpu_tune.planning import compile_step
    from tpu_tune.planning.devices import find_device
    from tpu_tune.planning.flops import step_work
    from tpu_tune.planning.model_config import model_config
    from tpu_tune.training.opening import micro_batch_rows
    from tpu_tune.training.prepare_model import abstract_model
    from tpu_tune.training.prepare_steps import prepare_steps
    from tpu_tune.transforms import sharding

    device, config = find_device(JOBS[name][0]), _config(name)
    jax.config.update("jax_num_cpu_devices", device.count)
    job = {"topology": device.topology, "count": device.count, "compile": True}
    devices, compiler, why = compile_step.find_devices(job)
    if not compiler:
        raise SystemExit(f"no compiler: {why}")
    mesh = sharding.make_mesh(config.mesh, devices)
    model, rows = abstract_model(config, model_config(config), mesh), micro_batch_rows(config, mesh)[0]
    steps = prepare_steps(config, model, 1)
    batch = compile_step.abstract_batch(config, model, (1, rows))
    found = compile_step.compile_one(steps.train, (steps.initial_state, model.frozen, batch), True)
    if not found["fits"]:
        raise SystemExit(f"it does not fit: {found['peak'] / 1e9:.2f} GB")
    width = batch["input_ids"].shape[-1]
    adapters = model.num_trainable if config.method == "lora" else 0
    work = step_work(model.architecture, config, rows, width, 0, adapters)
    facts = {"compiler": compiler, "peak": found["peak"], "tokens": rows * width, "flops": work.model}
    (place / "program.txt").write_text(found["program"])
    (place / "compiled.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    _compile(sys.argv[1], pathlib.Path(sys.argv[2]))
