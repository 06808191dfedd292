#!/usr/bin/env python3
"""A `gcloud compute tpus` that books directories: for the tests of `launch/tpu.sh`, which put it on PATH as `gcloud`.

$FAKE is its folder. `calls.jsonl` records every call; `rules.json` is a list of scripted answers, of which the first
that matches and is not used up is given: `match` (a regex on the words), `times` (how often; default for ever), `skip`
(matches to let pass first), `out`, `err`, `code`. A call without one does what it should: a TPU's state is a file
`vm/ZONE/NAME`, its workers' homes are folders, `scp` copies, and `ssh` runs the command in a shell that has the
worker's home.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

FAKE = pathlib.Path(os.environ["FAKE"])
WORKERS = 2
# From cloud.google.com/tpu/docs/runtimes ("TPU software versions"), 2026: generation -> image for JAX.
IMAGES = {
    **dict.fromkeys(("v2", "v3", "v4"), "tpu-ubuntu2204-base"),
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


def main(words: list[str]) -> int:
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    plain = [word for word in words if not word.startswith("--")]
    call = {"words": words, "zone": options.get("zone", ""), "what": " ".join(plain[2:4])}
    if call["what"] == "tpu-vm scp":
        call["mode"] = oct(stat.S_IMODE(os.stat(plain[4]).st_mode))
    with open(FAKE / "calls.jsonl", "a") as stream:
        stream.write(json.dumps(call) + "\n")
    rule = scripted(" ".join(words))
    if rule is not None:
        sys.stdout.write(rule.get("out", ""))
        sys.stderr.write(rule.get("err", ""))
        return rule.get("code", 1 if "err" in rule else 0)
    return play(call["what"], plain, options)


def scripted(line: str) -> dict | None:
    file = FAKE / "rules.json"
    rules = json.loads(file.read_text()) if file.exists() else []
    for rule in rules:
        if not re.search(rule["match"], line) or rule.get("times", 1) < 1:
            continue
        if rule.get("skip", 0) > 0:
            rule["skip"] -= 1
            continue
        if "times" in rule:
            rule["times"] -= 1
        break
    else:
        rule = None
    file.write_text(json.dumps(rules))
    return rule


def play(what: str, plain: list[str], options: dict[str, str]) -> int:
    kind, verb = what.split()
    name = next(word for word in plain[4:] if not os.path.exists(word) or word.isalpha()).partition(":")[0]
    queue = FAKE / "queue" / options["zone"] / name
    machine = FAKE / "vm" / options["zone"] / name
    homes = [FAKE / f"home{number}" for number in range(WORKERS)]
    target = queue if kind == "queued-resources" else machine
    if verb == "create":
        if complaint := refused(options["accelerator-type"], options.get("version") or options["runtime-version"]):
            print(f"ERROR: (gcloud.compute.tpus) INVALID_ARGUMENT: {complaint}", file=sys.stderr)
            return 1
        for place in (target, machine):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text("ACTIVE" if place == queue else "READY")
        for home in homes:
            shutil.rmtree(home, ignore_errors=True)  # a new machine has nothing on it
            home.mkdir()
        return 0
    if not target.exists():
        print(f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource '{name}' was not found", file=sys.stderr)
        return 1
    if verb == "describe":
        print(target.read_text() if "state" in options["format"] else name)
    elif verb == "delete":
        target.unlink()
        if kind == "queued-resources":
            machine.unlink(missing_ok=True)
    elif verb == "scp":
        for home in homes:
            place = home / plain[5].partition(":")[2]
            with open(plain[4], "rb") as source, open(place, "wb") as copy:  # keeps the mode of a file that is there
                shutil.copyfileobj(source, copy)
    elif verb == "ssh":
        chosen = homes if options["worker"] == "all" else [homes[int(options["worker"])]]
        codes = [run(home, options["command"]) for home in chosen]
        return max(codes)
    return 0


def refused(kind: str, image: str) -> str:
    """What Google says of a type that it does not book as a TPU VM, or of an image that is not for it, or nothing."""
    version, _, count = kind.rpartition("-")
    if version not in IMAGES or not count.isdigit():
        return f'Invalid accelerator type "{kind}"'
    return "" if image == IMAGES[version] else f'Invalid runtime version "{image}" for accelerator type "{kind}"'


def run(home: pathlib.Path, command: str) -> int:
    given = {"HOME": str(home), "FAKE": str(FAKE), "PATH": os.environ["PATH"], "VIRTUAL_ENV": str(FAKE / "venv")}
    return subprocess.run(["bash", "-c", command], cwd=home, env=given, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
