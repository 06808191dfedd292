"""How near `tpu-tune plan` comes to the full method: a step's time without its kernels' bundles, and with all of them.

    python benchmarks/plan_time.py                          # all jobs: a quarter of an hour each on two cores
    python benchmarks/plan_time.py --only 7b smollm2        # some

Each job is compiled once, in a process of its own, for a TPU that is not there, with every kernel's bundles dumped;
both estimates read that one program. Nothing is measured on a device. Needs pip install -e ".[tpu]".
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

PROJECT = pathlib.Path(__file__).resolve().parents[1]
_ONE_ROW = {
    "data.max_length": 2048, "train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 1,
    "model.remat": "full",
}  # fmt: skip
_PLAIN = {**_ONE_ROW, "lora.dropout": 0.0}
JOBS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> device, config, overrides
    "7b": ("v5e-1", "configs/qlora.py", {**_ONE_ROW, "model.path": "llama-7b"}),
    "7b-dots": ("v5e-1", "configs/qlora.py", {**_ONE_ROW, "model.path": "llama-7b", "model.remat": "dots"}),
    "7b-no-dropout": ("v5e-1", "configs/qlora.py", {**_PLAIN, "model.path": "llama-7b"}),
    "7b-int4": ("v5e-1", "configs/qlora.py", {**_PLAIN, "model.path": "llama-7b", "quantize.format": "int4"}),
    "8b": ("v5e-1", "configs/qlora.py", {**_PLAIN, "model.path": "llama-3-8b"}),
    "13b": ("v5e-1", "configs/qlora.py", {**_ONE_ROW, "model.path": "llama-13b"}),
    "smollm2": ("v5e-1", "configs/qlora.py", {**_ONE_ROW, "model.path": "smollm2-135m"}),
    "smollm2-full": ("v5e-1", "configs/full.py", {**_ONE_ROW, "model.path": "smollm2-135m"}),
    "7b-v6e": ("v6e-1", "configs/qlora.py", {**_ONE_ROW, "model.path": "llama-7b"}),
    "7b-v3": ("v3-8", "configs/qlora.py", {**_ONE_ROW, "model.path": "llama-7b"}),
}


def both(name: str, dump: str) -> dict[str, Any]:
    """Compile a job's step, whose bundles go to `dump`, and return both estimates of its time."""
    import jax

    from tpu_tune import config as configuration
    from tpu_tune.planning import compile_step, step_time
    from tpu_tune.planning.devices import find_device
    from tpu_tune.planning.model_config import model_config
    from tpu_tune.training.opening import micro_batch_rows
    from tpu_tune.training.prepare_model import abstract_model
    from tpu_tune.training.prepare_steps import prepare_steps
    from tpu_tune.transforms import sharding

    device_name, file, overrides = JOBS[name]
    device, config = find_device(device_name), configuration.from_file(str(PROJECT / file))
    for key, value in overrides.items():
        configuration.assign(config, key, value)
    config = configuration.check(config)
    jax.config.update("jax_num_cpu_devices", device.count)
    job = {"topology": device.topology, "count": device.count, "compile": True}
    devices, compiler, why = compile_step.find_devices(job)
    if not compiler:
        raise SystemExit(f"no compiler: {why}")
    mesh = sharding.make_mesh(config.mesh, devices)
    model = abstract_model(config, model_config(config), mesh)
    steps = prepare_steps(config, model, 1)
    batch = compile_step.abstract_batch(config, model, (1, micro_batch_rows(config, mesh)[0]))
    program = compile_step.compile_one(steps.train, (steps.initial_state, model.frozen, batch), True)["program"]
    plain, full = step_time.of_program(program, device), step_time.of_program(program, device, dump)
    return {"name": name, "device": device.name, "compiler": compiler, "plan": plain, "full": full}


def _in_a_process(name: str) -> dict[str, Any]:
    from tpu_tune.planning.bundles import dump_flags
    from tpu_tune.planning.compile_process import environment

    with tempfile.TemporaryDirectory(prefix="plan-time-") as dump:
        variables = {**environment("tpu"), "LIBTPU_INIT_ARGS": dump_flags(dump)}
        command = [sys.executable, __file__, "--one", name, "--dump", dump]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=os.getcwd())
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def row(found: dict[str, Any]) -> str:
    """Return a row of the table in RESULTS.md."""
    plain, full = found["plan"]["seconds"], found["full"]["seconds"]
    kinds = ", ".join(f"{kind} {1e3 * seconds:,.0f}" for kind, seconds in found["full"]["kinds"].items())
    figures = f"{1e3 * plain:,.0f} | {1e3 * full:,.0f} | {plain / full - 1:+.1%}"
    return f"| {found['name']} | {found['device']} | {figures} | {kinds} |"


def main() -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(both(options.one, options.dump)))
        return 0
    print("| job | device | plan, ms | with all bundles, ms | difference | where the time goes, ms |")
    print("|---|---|---|---|---|---|")
    for name in options.only:
        print(row(_in_a_process(name)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
