"""What a notebook installs, run as `%run launch/notebook_install.py`: tpu_tune, with JAX for what the machine has.

Runs in the notebook's own process, so that it can say when a package in use was replaced. JAX and what goes with it are
of the versions in notebook_versions.txt; everything else that is there already and will do is kept.
"""

import importlib
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile


def version(package: str) -> str:
    """The installed version of a package, "" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def from_shell(call: str, project: pathlib.Path) -> str:
    """What a function of launch/common.sh prints."""
    words = ["bash", "-c", f"source launch/common.sh; {call}"]
    return subprocess.run(words, cwd=project, check=True, capture_output=True, text=True).stdout.strip()


def install(project: pathlib.Path) -> None:
    """Install the project and the extras that this machine needs.

    Raises:
      RuntimeError: a package that the session has loaded already was replaced.
    """
    loaded = {name: sys.modules[name].__version__ for name in ("jax", "numpy", "pandas") if name in sys.modules}
    build = from_shell("choose_jax", project)  # tpu, cuda13, cuda12 or cpu
    if build.startswith("cuda"):  # two CUDA plugins would quarrel: stay with the one that is there
        build = next((name for name in ("cuda13", "cuda12") if version(f"jax-{name}-plugin")), build)
    print(f"installing tpu_tune for {build}; this machine has jax {version('jax') or 'not yet'}", flush=True)
    extras = from_shell(f"extras_of {build}", project)
    if not os.access(project, os.W_OK):  # pip builds inside the folder; what is attached on Kaggle is read-only
        project = pathlib.Path(shutil.copytree(project, tempfile.mkdtemp(), dirs_exist_ok=True))
    pinned = str(project / "launch" / "notebook_versions.txt")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", pinned, f"{project}[{extras}]"]
    subprocess.run(command, check=True)
    importlib.invalidate_caches()
    changed = [name for name, before in loaded.items() if version(name) != before]
    if changed:
        raise RuntimeError(f"{', '.join(changed)} changed while in use: restart the session and run this cell again")


if __name__ == "__main__":
    if not version("tpu_tune"):
        install(pathlib.Path(__file__).resolve().parents[1])
    # JAX takes three quarters of a GPU by itself. It reads this when it is imported.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    print(f"tpu_tune {version('tpu_tune')}, jax {version('jax')}")
