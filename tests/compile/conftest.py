"""The devices' compilers, without the devices: one process for all tests, started by the first that asks."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here; which compiler it needs stands beside it (compile_skips.py)."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.compile)


@pytest.fixture(scope="module")  # the compilers keep gigabytes: they go with the file's last test
def compile_steps(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Function from jobs of `program.py` to what was found of each; several are compiled side by side."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
        "JAX_DEFAULT_MATMUL_PRECISION": "default",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = tmp_path_factory.mktemp("libtpu") / "stderr"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, str(HERE / "program.py")],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):

        def compile_all(*jobs: dict[str, Any], minutes: float = 5) -> list[dict[str, Any]]:
            guard = threading.Timer(60 * minutes * len(jobs), process.kill)
            guard.start()
            try:
                print(json.dumps(jobs), file=process.stdin, flush=True)
                answer = process.stdout.readline()
            finally:
                guard.cancel()
            assert answer, (
                f"the compilers' process ended, or took more than {minutes} minutes a job:\n{log.read_text()[-3000:]}"
            )
            found = json.loads(answer)
            for result in found:
                assert "error" not in result, result["error"]
            return found

        yield compile_all
        process.stdin.close()
