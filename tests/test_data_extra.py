"""Without the extra `data` training works, and what `tpu-tune data` needs of it is said in one line."""

import configparser
import json
import pathlib
import re
import subprocess
import sys

import pytest
from helpers_training import write_tiny_llama

ROOT = pathlib.Path(__file__).parents[1]
# What each package of the extra is imported as, where the name differs.
MODULES = {"beautifulsoup4": "bs4", "scikit-learn": "sklearn", "charset-normalizer": "charset_normalizer"}
# Runs command lines in an interpreter that finds none of these modules, up to the first that fails.
WITHOUT = """
import json
import sys
from importlib.machinery import PathFinder

hidden, commands = map(json.loads, sys.argv[1:])


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)


sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from tpu_tune.cli import main

for words in commands:
    status = main(words)
    if status:
        sys.exit(status)
assert not set(hidden) & set(sys.modules)
"""


def extra_modules():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = [line for line in settings["options.extras_require"]["data"].splitlines() if line.strip("# ")]
    packages = [re.match(r"[\w-]+", line)[0] for line in lines if not line.lstrip().startswith("#")]
    assert len(packages) == 10
    packages.remove("regex")  # transformers itself needs it
    return [MODULES.get(package, package) for package in packages]


def without_extra(*commands, cwd):
    words = [sys.executable, "-c", WITHOUT, json.dumps(extra_modules()), json.dumps(commands, default=str)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=cwd)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def test_every_other_command_works_without(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "row {i} of the text"}}\n' for i in range(8)))
    (tmp_path / "run.py").write_text("from tpu_tune.config import default as get_config\n")
    train = [
        "train", "--config", "run.py", f"--config.model.path={model}", "--config.data.train=rows.jsonl",
        "--config.output_dir=run", "--config.train.max_steps=1", "--config.data.max_length=16",
        "--config.train.report_to=[]",
    ]  # fmt: skip
    done = without_extra(["--help"], cwd=tmp_path)
    assert done.returncode == 0 and "train" in done.stdout, done.stderr
    done = without_extra(
        ["inspect", model],
        train,
        ["plan", "--config", "run.py", f"--config.model.path={model}", "--device", "v5e-1", "--no-compile"],
        ["curves", "run"],
        [
            "generate",
            "--model",
            model,
            "--adapter",
            "run/adapter",
            "--prompt",
            "a",
            "--no-chat",
            "--max-new-tokens",
            "1",
        ],
        ["export", "run", "--output", "exported"],
        ["data", "split", "rows.jsonl", "--val-count", "2"],
        ["data", "tokenize", "-i", "rows.jsonl", "-o", "rows.arrow", "-t", model],
        ["data", "stats", "rows.jsonl", "-t", model],
        ["data", "ingest", "rows.jsonl", "--output", "again.jsonl"],
        ["data", "clean", "rows.jsonl", "--output", "clean.jsonl"],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    "words, package",
    [
        (["ingest", "page.html", "rows.jsonl"], "reading html needs bs4"),
        (["ingest", "rows.jsonl", "dump.sql"], "reading sql needs sqlparse"),
        (["clean", "rows.jsonl", "--near-duplicates", "0.8"], "--near-duplicates needs rensa"),
        (["clean", "rows.jsonl", "--language", "en"], "--language needs py3langid"),
        (["clean", "rows.jsonl", "--mask-phone"], "--mask-phone needs phonenumbers"),
        (["clean", "rows.jsonl", "--fix-unicode"], "--fix-unicode needs ftfy"),
        (["cluster", "rows.jsonl", "--k", "2"], "data cluster needs scikit-learn"),
    ],
)
def test_what_is_missing_is_named_in_one_line(tmp_path, words, package):
    (tmp_path / "page.html").write_text("<p>text</p>")
    (tmp_path / "dump.sql").write_text("CREATE TABLE a (b text);\nINSERT INTO a VALUES ('c');\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i} of it"}) + "\n" for i in range(20)))
    done = without_extra(["data", *words, "--output", "out.jsonl"], cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(rf"tpu-tune: {package}, .*: pip install 'tpu_tune\[data\]'\n", done.stderr), done.stderr
    assert not (tmp_path / "out.jsonl").exists()
