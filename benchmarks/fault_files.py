"""Files of every kind that is read, damaged by a seed: one line, or right. A part of `faults.py`, which see.

Each case is a kind of file and a number. A worker, a process of its own, writes the whole files, damages one of them
and reads them as the commands do. Where somebody else reads the kind too, what both read must be equal: safetensors,
`gguf`, `json`, `csv`, transformers. A run's checkpoint has no other reader; it is in the part `checkpoints`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SECONDS = 120  # that one case may take on a busy machine
MEMORY = 3e9  # bytes that a worker may grow to
ODD = [
    None, "", "x", "\ud83d", 0, -1, 1.5, 10**18, 10**400, float("nan"), float("inf"), True, [], {}, [[]], {"a": 1},
    [None], "../x", "(", "{{", "a\nb", -(2**63), 2**31, 1e-300, ["x"] * 3,
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
      files: name -> content of everything that is read together.
      damaged: the one that is damaged.
      read: reads the folder as a command would; raises AssertionError where it read something wrong.
      binary: whether most damage belongs into its first bytes, where the structure is.
    """

    files: Mapping[str, bytes]
    damaged: str
    read: Callable[[pathlib.Path], Any]
    binary: bool = False


# --- damage ---------------------------------------------------------------------------------------------------------


def damage(content: bytes, draw: random.Random, binary: bool, is_json: bool) -> bytes:
    """Return a damaged copy: bits flipped, bytes overwritten, a part cut, doubled or emptied, or a value exchanged."""
    if is_json and draw.random() < 0.6:
        with contextlib.suppress(ValueError):
            return _exchange(content, draw)
    how = draw.choice(["bits", "bits", "bytes", "cut", "part", "double", "zero", "swap"])
    changed = bytearray(content)
    reach = len(changed) if not binary or draw.random() < 0.3 else min(len(changed), 4096)
    if how == "cut":
        return content[: draw.randrange(len(content))]
    if how in ("bits", "bytes"):
        for _ in range(draw.choice([1, 1, 2, 8, 40])):
            place = draw.randrange(reach)
            changed[place] = changed[place] ^ (1 << draw.randrange(8)) if how == "bits" else draw.randrange(256)
        return bytes(changed)
    start = draw.randrange(reach)
    end = min(len(changed), start + draw.choice([1, 2, 8, 64, 1024]))
    if how == "part":
        del changed[start:end]
    elif how == "double":
        changed[start:start] = changed[start:end]
    elif how == "zero":
        changed[start:end] = bytes(end - start)
    else:
        other = draw.randrange(reach)
        changed[start], changed[other] = changed[other], changed[start]
    return bytes(changed)


def _exchange(content: bytes, draw: random.Random) -> bytes:
    """Put an odd value at a random place of a JSON file, or of one of its lines, or exchange two of its values."""
    lines = content.splitlines()
    try:
        texts, place = [content], 0
        tree = json.loads(content)
    except ValueError:
        texts, place = lines, draw.randrange(len(lines))
        tree = json.loads(lines[place])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list) and len(places) < 5000:
                walk(node[key])

    if not isinstance(tree, dict | list):
        return json.dumps(draw.choice(ODD)).encode()
    walk(tree)
    shallow = places[: max(1, len(places) // 4)]  # half the time near the root, where long lists do not drown the rest
    (node, key), (other, second) = (draw.choice(draw.choice([shallow, places])) for _ in range(2))
    how = draw.random()
    if how < 0.2 and other[second] is not node:
        node[key] = json.loads(json.dumps(other[second]))
    elif how < 0.3:
        del node[key]
    else:
        node[key] = draw.choice(ODD)
    texts[place] = json.dumps(tree).encode()
    return b"\n".join(texts) + (b"\n" if len(texts) > 1 else b"")


# --- kinds ----------------------------------------------------------------------------------------------------------


def kinds(folder: pathlib.Path) -> dict[str, Kind]:
    """Return every kind; `folder` holds what they are made from."""
    model = _model(folder)
    return {**_model_kinds(model), **_run_kinds(), **_data_kinds(folder)}


def _model(folder: pathlib.Path) -> dict[str, bytes]:
    from helpers_training import write_tiny_llama

    directory = write_tiny_llama(folder / "tiny")
    (directory / "generation_config.json").write_text('{"eos_token_id": [256, 257], "temperature": 0.5}')
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _model_kinds(model: dict[str, bytes]) -> dict[str, Kind]:
    adapter = _adapter(model)
    gguf = {"m.gguf": _gguf(model)}
    sharded = {name: content for name, content in model.items() if name != "model.safetensors"}
    names = _safetensors(model["model.safetensors"])
    index = {"metadata": {"total_size": 1}, "weight_map": {name: "part.safetensors" for name in names}}
    sharded |= {"part.safetensors": model["model.safetensors"]}
    sharded |= {"model.safetensors.index.json": json.dumps(index).encode()}
    return {
        "safetensors": Kind(model, "model.safetensors", _read_safetensors, binary=True),
        "safetensors index": Kind(sharded, "model.safetensors.index.json", _read_model),
        "config.json": Kind(model, "config.json", _read_model),
        "generation_config.json": Kind(model, "generation_config.json", _read_model),
        "tokenizer.json": Kind(model, "tokenizer.json", _read_tokenizer),
        "tokenizer_config.json": Kind(model, "tokenizer_config.json", _read_tokenizer),
        "GGUF": Kind(gguf, "m.gguf", _read_gguf, binary=True),
        "adapter_config.json": Kind(adapter, "adapter/adapter_config.json", _read_adapter),
        "adapter_model.safetensors": Kind(adapter, "adapter/adapter_model.safetensors", _read_adapter, binary=True),
    }


def _safetensors(content: bytes) -> dict[str, Any]:
    import safetensors.numpy

    return safetensors.numpy.load(content)


def _read_safetensors(folder: pathlib.Path) -> None:
    import numpy as np

    from tpu_tune.checkpoints.huggingface import read_header
    from tpu_tune.checkpoints.stored_tensor import read_tensor

    header = read_header(str(folder / "model.safetensors"))
    read = {name: read_tensor(name, tensor) for name, tensor in header.items()}
    try:
        expected = _safetensors((folder / "model.safetensors").read_bytes())
    except Exception:  # it is stricter about gaps between tensors
        expected = {}
    for name, value in expected.items():
        np.testing.assert_array_equal(read[name], value)
    _read_model(folder)


def _read_model(folder: pathlib.Path) -> None:
    import tpu_tune
    from tpu_tune.checkpoints.ends import end_ids
    from tpu_tune.checkpoints.source import open_source

    model = tpu_tune.load(str(folder))
    assert model.params and all(leaf.size for leaf in model.params.values())
    assert all(isinstance(number, int) for number in end_ids(open_source(str(folder))))


def _read_tokenizer(folder: pathlib.Path) -> None:
    from transformers import AutoTokenizer

    from tpu_tune.checkpoints.huggingface import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer("ab c\n\u00e4")["input_ids"]
    try:
        expected = AutoTokenizer.from_pretrained(str(folder))("ab c\n\u00e4")["input_ids"]
    except Exception:
        return
    assert ids == expected, (ids, expected)


def _gguf(model: dict[str, bytes]) -> bytes:
    from tpu_tune.checkpoints.gguf_write import write_gguf
    from tpu_tune.checkpoints.source import open_source

    with tempfile.TemporaryDirectory() as name:
        _write(pathlib.Path(name), model)
        source = open_source(name)
        file = pathlib.Path(name, "m.gguf")
        write_gguf(str(file), ((key, source.read(key)) for key in source.shapes), source, "q8_0")
        return file.read_bytes()


def _read_gguf(folder: pathlib.Path) -> None:
    import gguf
    import numpy as np

    from tpu_tune.checkpoints.gguf_file import open_gguf_file, read_gguf_tensor

    path = str(folder / "m.gguf")
    file = open_gguf_file(path)
    read = {name: read_gguf_tensor(file, name) for name in file.tensors}
    try:
        expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        values = {name: gguf.quants.dequantize(one.data, one.tensor_type) for name, one in expected.items()}
    except Exception:
        values = {}
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(read[name], np.float32).ravel(), np.asarray(value).ravel())
    _read_model_of(path)


def _read_model_of(path: str) -> None:
    import tpu_tune

    model = tpu_tune.load(path)
    assert model.params and model.tokenizer("ab c")["input_ids"]


def _adapter(model: dict[str, bytes]) -> dict[str, bytes]:
    import numpy as np
    import safetensors.numpy

    tensors = {}
    for layer in range(2):
        for name, out in (("q_proj", 32), ("v_proj", 16)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = np.full((4, 32), 0.01, np.float32)
            tensors[f"{at}.lora_B.weight"] = np.full((out, 4), 0.01, np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {}, "base_model_name_or_path": "tiny", "inference_mode": True, "init_lora_weights": True,
    }  # fmt: skip
    files = {"adapter/adapter_config.json": json.dumps(config).encode()}
    return {**model, **files, "adapter/adapter_model.safetensors": safetensors.numpy.save(tensors)}


def _read_adapter(folder: pathlib.Path) -> None:
    import tpu_tune

    model = tpu_tune.load(str(folder), adapter=str(folder / "adapter"))
    assert model.params


def _run_kinds() -> dict[str, Kind]:
    rows = [
        {"step": n, "loss": 3.0 / n, "epoch": n / 9, "num_tokens": 64 * n, "learning_rate": 1e-3} for n in range(1, 9)
    ]
    rows += [{"step": 4, "eval_loss": 1.5}, {"step": 8, "eval_loss": 1.25}]
    from tpu_tune import config as configuration

    summary = {"vocab_size": 264, "total_steps": 9, "data": {"rows": 9, "formats": ["pair"]}}
    run = {
        "config.json": json.dumps(configuration.to_dict(configuration.default())).encode(),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "summary.json": json.dumps(summary).encode(),
    }
    script = (
        b"#!/bin/bash\nA=1e-4\nR=${RANK:-8}\npython train.py --output_dir out --learning_rate $A \\\n  --lora_r $R\n"
    )
    return {
        **{f"a run's {name}": Kind(run, name, _read_run) for name in run},
        "a run's lock": Kind(run | {"run.lock": _lock()}, "run.lock", _read_lock),
        "script of flags": Kind({"s.sh": script}, "s.sh", _read_script),
    }


def _lock() -> bytes:
    holder = {"host": "a", "machine": "b", "process": 1, "began": "1", "token": "x", "since": "now", "renewals": 3}
    return (json.dumps(holder) + "\n").encode()


def _read_run(folder: pathlib.Path) -> None:
    from tpu_tune.checkpoints.run_directory import RunDirectory
    from tpu_tune.curves.report import page
    from tpu_tune.curves.runs import read_run
    from tpu_tune.inference.card import judged

    run = read_run(folder)
    assert page([run], [run.diagnosis()])
    directory = RunDirectory(folder)
    judged(directory.config(), directory.metrics())
    directory.truncate_metrics(4)
    assert all(row["step"] <= 4 for row in directory.metrics())


def _read_lock(folder: pathlib.Path) -> None:
    from tpu_tune.checkpoints.run_directory import RunDirectory
    from tpu_tune.training import run_lock

    with run_lock.hold(RunDirectory(folder), lambda line: None, seconds=0.01) as lock:
        lock.check()
    assert not (folder / run_lock.NAME).exists()


def _read_script(folder: pathlib.Path) -> None:
    from tpu_tune.cli.hf.bash_script import read_script

    read_script(str(folder / "s.sh"), {})


ROWS = [
    {"messages": [{"role": "user", "content": f"hi {n} \u00e4"}, {"role": "assistant", "content": "yes, no"}], "n": n}
    for n in range(30)
]
FLAT = [
    {"instruction": f'say "{n}", twice', "input": None if n % 3 else "a,b", "output": f"{n}\n{n}"} for n in range(40)
]


def _data_kinds(folder: pathlib.Path) -> dict[str, Kind]:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    table, buffers = pa.Table.from_pylist(ROWS), {name: io.BytesIO() for name in ("parquet", "file", "stream", "v1")}
    pyarrow.parquet.write_table(table, buffers["parquet"], compression="zstd")
    for name, make in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with make(buffers[name], table.schema) as writer:
            writer.write_table(table, 10)
    pyarrow.feather.write_feather(pa.Table.from_pylist(FLAT), buffers["v1"], version=1)
    flat = io.StringIO(newline="")
    writer = csv.DictWriter(flat, list(FLAT[0]))
    writer.writeheader()
    writer.writerows(FLAT)
    content = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "rows.json": json.dumps(FLAT).encode(),
        "rows.csv": flat.getvalue().encode(),
        "rows.tsv": flat.getvalue().replace(",", "\t").encode(),
        "rows.parquet": buffers["parquet"].getvalue(),
        "rows.arrow": buffers["file"].getvalue(),
        "stream.arrow": buffers["stream"].getvalue(),
    }
    ingested = {
        "rows.feather": buffers["v1"].getvalue(),
        "rows.jsonl.gz": gzip.compress(content["rows.jsonl"]),
        "page.html": b"<title>t</title><p>one &amp; two</p><table><tr><td>a<td>b</table><ul><li>x<li>y</ul>" * 9,
        "dump.sql": b"CREATE TABLE `p` (`id` int, `text` text);\nINSERT INTO `p` VALUES (1,'it''s'),(2,'b\\n');\n" * 5,
        **_archives(content["rows.jsonl"]),
    }
    found = {name: Kind({name: whole}, name, _read_rows(name), "arrow" in name) for name, whole in content.items()}
    found |= {name: Kind({name: whole}, name, _ingest(name)) for name, whole in ingested.items()}
    return found | _saved_kinds(folder) | _tokenized(folder)


def _archives(content: bytes) -> dict[str, bytes]:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/rows.jsonl", content)
        archive.writestr("b.txt", "text\n" * 50)
    bundle = io.BytesIO()
    with tarfile.open(fileobj=bundle, mode="w:gz") as archive:
        info = tarfile.TarInfo("a/rows.jsonl")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return {
        "rows.zip": packed.getvalue(),
        "rows.tar.gz": bundle.getvalue(),
        "rows.tar": gzip.decompress(bundle.getvalue()),
    }


def _saved_kinds(folder: pathlib.Path) -> dict[str, Kind]:
    import datasets

    saved = folder / "saved"
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list(FLAT)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(saved))
    files = {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    names = ("dataset_dict.json", "train/state.json", "train/dataset_info.json")
    readme = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n# A set\n"
    )
    clone = {"README.md": readme.encode(), "data/train-0.jsonl": b'{"output": "0\\n0"}\n'}
    return {f"saved set's {name}": Kind(files, name, _read_set) for name in names} | {
        "a clone's README.md": Kind(clone, "README.md", _read_set)
    }


def _read_set(folder: pathlib.Path) -> None:
    from tpu_tune.data.sources import read_rows, resolve

    train, _ = resolve(str(folder))
    rows = [row for source in train for row in read_rows(source)[0]]
    texts = {row["output"] for row in FLAT}
    assert rows and all(row["output"] in texts for row in rows)


def _tokenized(folder: pathlib.Path) -> dict[str, Kind]:
    from tpu_tune.cli import main

    pairs = [{"prompt": row["instruction"], "completion": row["output"]} for row in FLAT]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = ["data", "tokenize", "-i", str(folder / "pairs.jsonl"), "-o", str(folder / "t.arrow")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([*words, "-t", str(folder / "tiny"), "-l", "128"]) == 0

    def read(place: pathlib.Path) -> None:
        from tpu_tune.data import arrow

        if arrow.is_tokenized(str(place / "t.arrow")):
            arrow.load([str(place / "t.arrow")], 64)

    return {"tokenized Arrow": Kind({"t.arrow": (folder / "t.arrow").read_bytes()}, "t.arrow", read, binary=True)}


def _read_rows(name: str) -> Callable[[pathlib.Path], None]:
    def read(folder: pathlib.Path) -> None:
        from tpu_tune.data.sources import read_rows

        file = folder / name
        for skip in (True, False):
            rows, bad = read_rows(str(file), skip_bad_rows=skip)
            assert all(isinstance(row, dict) for row in rows) and (skip or not bad)
        if name.endswith(".jsonl"):
            expected = [json.loads(line) for line in file.read_bytes().splitlines() if line.strip()]
            assert repr(rows) == repr(expected)
        elif name.endswith(".json"):
            expected = json.loads(file.read_bytes())
            assert repr(rows) == repr(expected) or not isinstance(expected, list)
        elif name.endswith(".csv"):
            lines = list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")))
            assert len(rows) == sum(any(cell.strip() for cell in line) for line in lines) - 1

    return read


def _ingest(name: str) -> Callable[[pathlib.Path], None]:
    def read(folder: pathlib.Path) -> None:
        from tpu_tune.data.ingest import IngestOptions, Tally, read_source
        from tpu_tune.data.streams import Skipped

        for skip in (True, False):
            tally = Tally(Skipped(allowed=skip))
            rows = list(read_source(str(folder / name), IngestOptions(skip_bad=skip), tally))
            assert all(isinstance(row, dict) and json.dumps(row) for row in rows)

    return read


# --- workers --------------------------------------------------------------------------------------------------------


def outcome(kind: Kind, draw: random.Random, folder: pathlib.Path) -> tuple[str, str]:
    """Return the outcome of one case, and what it said: right, one line, traceback, or difference."""
    from tpu_tune.errors import UserError

    is_json = kind.damaged.endswith((".json", ".jsonl", ".lock"))
    _write(folder, {**kind.files, kind.damaged: damage(kind.files[kind.damaged], draw, kind.binary, is_json)})
    try:
        kind.read(folder)
    except UserError as error:
        line = str(error)
        return ("one line" if line and "\n" not in line and len(line) < 2000 else "traceback"), line
    except AssertionError:
        return "difference", traceback.format_exc()
    except OSError as error:  # the program makes a line of these
        if error.filename is not None and error.strerror is not None:
            return "one line", str(error)
        return "traceback", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    return "right", ""


def _write(folder: pathlib.Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def worker(pipe: Any, folder: str, seed: int) -> None:
    """Answer (kind, number) with the outcome, until the pipe is closed."""
    warnings.simplefilter("ignore")
    place = pathlib.Path(folder)
    (place / "made").mkdir(parents=True)
    all_kinds = kinds(place / "made")
    for kind in all_kinds.values():  # an undamaged one is read
        _write(place / "whole", kind.files)
        kind.read(place / "whole")
        shutil.rmtree(place / "whole")
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    pipe.send(list(all_kinds))
    while True:
        try:
            name, number = pipe.recv()
        except EOFError:
            return
        shutil.rmtree(place / "case", ignore_errors=True)
        found = outcome(all_kinds[name], random.Random(f"{seed}/{name}/{number}"), place / "case")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MEMORY:
            found = ("memory", found[1])
        pipe.send(found)


class Worker:
    """A process that reads cases; started anew where a case ends it or takes too long."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self._folder, self._seed, self._count = folder, seed, 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        place = self._folder / f"worker{self._count}"
        self._count += 1
        self._process = context.Process(target=worker, args=(other, str(place), self._seed), daemon=True)
        self._process.start()
        other.close()
        self.names = self._pipe.recv()

    def case(self, name: str, number: int) -> tuple[str, str, pathlib.Path]:
        """Return the outcome of a case, what it said, and the folder with its files."""
        place = self._folder / f"worker{self._count - 1}" / "case"
        self._pipe.send((name, number))
        try:
            if self._pipe.poll(SECONDS):
                found = self._pipe.recv()
                if found[0] != "memory":
                    return *found, place
            else:
                found = ("stuck", f"more than {SECONDS} s")
        except EOFError:
            self._process.join()
            found = ("crash", f"exit status {self._process.exitcode}")
        self.end()
        self._start()
        return *found, place

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def run(folder: pathlib.Path, rounds: int, seed: int, keep: pathlib.Path, only: str = "") -> dict[str, Counter]:
    """Read `rounds` damaged files, evenly of every kind; copy those that failed to `keep`.

    Returns:
      kind -> how often each outcome came.
    """
    one = Worker(folder, seed)
    names = [name for name in one.names if only in name]
    found = {name: Counter() for name in names}
    began = time.monotonic()
    for number in range(rounds):
        name = names[number % len(names)]
        result, said, place = one.case(name, number)
        found[name][result] += 1
        if result not in ("right", "one line"):
            print(f"{result}: {name}, case {number}: {said.strip()[-1500:]}\n", flush=True)
            if place.exists():
                shutil.copytree(place, keep / f"{name.replace('/', '-')} {number}", dirs_exist_ok=True)
    one.end()
    print(f"{rounds} damaged files in {time.monotonic() - began:.0f} s", flush=True)
    return found
