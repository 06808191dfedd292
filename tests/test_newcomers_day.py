"""A newcomer's day: a messy folder becomes a model that answers, with the commands of README.md and docs/ alone.

Real inputs (pages of Python's documentation, ChatterBot's conversations as questions, ShareGPT and Discord chats and a
SQL dump, SmolLM2's tokenizer and template); the model is tiny and random, so that training takes seconds. Each command
is a process of its own. What becomes of every row is followed from the folder to the runs.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import yaml
from helpers_training import write_tiny_llama

from tpu_tune.checkpoints.tokenizers import open_tokenizer

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("commandref", "configfile", "examples", "extending", "introduction", "packageindex", "uploading", "builtdist")
QUESTIONS, OLD, EXCEL, SHARED, POSTS, SPOKEN = 120, 30, 30, 90, 25, 30  # rows of each kind
TWICE, REFUSALS = 7, 3
SETTINGS = (
    "--config.model.dtype=float32 --config.data.train=diverse.jsonl --config.data.max_length=256 "
    "--config.train.num_train_epochs=1 --config.train.per_device_train_batch_size=2 "
    "--config.train.gradient_accumulation_steps=1 --config.train.logging_steps=1 "
    "--config.train.eval_steps=10 --config.train.save_steps=10"
)
REFUSAL = "As an AI language model, I cannot answer that."


def pairs_of(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """ChatterBot's questions with their first answers, none twice."""
    seen = set()
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            pair = tuple(" ".join(str(turn).split()) for turn in turns[:2])
            if len(pair) == 2 and all(pair) and pair not in seen:
                seen.add(pair)
                yield pair


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *rows])
    return text.getvalue()


def shared(pair: tuple[str, str]) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": text} for who, text in zip(("human", "gpt"), pair, strict=True)]}


def channel(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A channel of Discord in which Ann asks every three hours, and Bob answers."""
    messages = [
        {
            "id": str(2 * day + turn),
            "type": "Default",
            "timestamp": f"2024-{1 + day // 28:02}-{1 + day % 28:02}T09:0{turn}:00+00:00",
            "content": text,
            "author": {"id": str(turn + 1), "name": who, "nickname": who.title(), "isBot": False},
            "attachments": [],
        }
        for day, pair in enumerate(pairs)
        for turn, (who, text) in enumerate(zip(("ann", "bob"), pair, strict=True))
    ]
    about = {"guild": {"id": "0", "name": "G"}, "channel": {"id": "5", "type": "GuildTextChat", "name": "help"}}
    return {**about, "messages": messages, "messageCount": len(messages)}


def dump(texts: Sequence[str]) -> str:
    """What mysqldump writes, of two tables; a post is HTML."""
    posts = ",".join(
        "({},'<p>{}</p>')".format(number, text.replace("\\", "\\\\").replace("'", "\\'"))
        for number, text in enumerate(texts)
    )
    return (
        "CREATE TABLE `users` (`id` int NOT NULL, `name` text);\nINSERT INTO `users` VALUES (1,'ann'),(2,'bob');\n"
        f"CREATE TABLE `posts` (`id` int NOT NULL, `body` text);\nINSERT INTO `posts` VALUES {posts};\n"
    )


def write_folder(folder: pathlib.Path, documentation: pathlib.Path, conversations: pathlib.Path) -> int:
    """Write the messy folder; return how many rows it holds, a line that nothing can read not counted."""
    pairs = pairs_of(conversations)
    take = lambda count: list(itertools.islice(pairs, count))  # noqa: E731
    (folder / "pages").mkdir(parents=True)
    (folder / "old").mkdir()
    for page in PAGES:
        shutil.copy(documentation / "distutils" / f"{page}.html", folder / "pages")
    questions = take(QUESTIONS)
    (folder / "faq.csv").write_text(table(("question", "answer"), questions + questions[:TWICE]), encoding="utf-8")
    (folder / "old" / "faq.csv").write_bytes(
        table(("question", "answer"), [(f"Café, s'il vous plaît: {q}", a) for q, a in take(OLD)]).encode("cp1252")
    )
    (folder / "excel.csv").write_text(table(("question", "answer"), take(EXCEL)), encoding="utf-16")
    chats = [shared(pair) for pair in take(SHARED)]
    refused = [shared((f"May I ask {number}?", f"{REFUSAL} Ask again.")) for number in range(REFUSALS)]
    (folder / "sharegpt.json").write_text(json.dumps(chats + refused))
    (folder / "help.json").write_text(json.dumps(channel(take(SPOKEN))))
    (folder / "dump.sql").write_text(dump([f"{q} &mdash; {a}" for q, a in take(POSTS)]), encoding="utf-8")
    (folder / "more.jsonl").write_text(
        '{"text": "A line of its own, which is cut\n{"input": "Cut?", "output": "No."}\n'
    )
    (folder / "package.json").write_text('{"name": "forum", "version": "1"}')
    return len(PAGES) + QUESTIONS + TWICE + OLD + EXCEL + SHARED + REFUSALS + SPOKEN + POSTS + 1


@pytest.fixture(scope="module")
def tiny(smollm2_gguf: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny Llama with SmolLM2's tokenizer and chat template."""
    tokenizer = open_tokenizer(str(smollm2_gguf))
    folder = tmp_path_factory.mktemp("base") / "tiny"
    write_tiny_llama(folder, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    (folder / "tokenizer.json").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def process(words: Sequence[Any], folder: pathlib.Path) -> subprocess.Popen:
    """Start `tpu-tune` with these words in this folder, as on a machine of one device."""
    flags = [word for word in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in word]
    flags = [word for word in flags if "optimization_level" not in word]  # its code is too slow for a large vocabulary
    changes = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "XLA_FLAGS": " ".join(flags)}
    env = {**os.environ, **changes, "TPU_TUNE_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "tpu_tune", *map(str, words)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def user(folder: pathlib.Path) -> Callable[..., str]:
    """Return what runs one command line, shows what it says, and wants it to succeed."""

    docs = "".join(file.read_text() for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

    def run(line: str, *more: Any) -> str:
        words = [*line.split(), *more]
        options = [word for word in words if word.startswith("--") and not word.startswith("--config.")]
        assert [word for word in options if word not in docs] == []  # nothing that the docs do not teach
        with process(words, folder) as started:
            said, _ = started.communicate(timeout=600)
        print("$ tpu-tune", *words, f"\n{said}")
        assert started.returncode == 0 and "Traceback" not in said, said
        return said

    return run


def interrupted(line: str, folder: pathlib.Path, after: str) -> str:
    """Run a command, press Ctrl-C when a line matches `after`, and return all that it says."""
    said = ""
    with process(line.split(), folder) as started:
        for text in started.stdout:
            said += text
            if after and re.search(after, text):
                started.send_signal(signal.SIGINT)
                after = ""
    print("$ tpu-tune", line, f"# and Ctrl-C\n{said}")
    assert not after and started.returncode == 130 and "Traceback" not in said, said
    return said


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def number(pattern: str, said: str) -> int:
    """The number of the pattern's group in what was said."""
    found = re.search(pattern, said, re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{said}"
    return int(found[1].replace(",", ""))


@pytest.mark.slow
def test_a_newcomers_day(tiny, python_docs_dir, chatterbot_dir, tmp_path):
    there = write_folder(tmp_path / "forum", python_docs_dir, chatterbot_dir)
    run = user(tmp_path)
    rows = from_folder_to_rows(run, tmp_path, there)
    look_before_training(run, tmp_path, rows, tiny)
    command = f"--config {ROOT / 'configs' / 'lora.py'} --config.model.path={tiny} {SETTINGS}"
    train_twice(run, tmp_path, rows, command)
    use_what_was_trained(run, tmp_path)


def from_folder_to_rows(run: Callable[..., str], folder: pathlib.Path, there: int) -> int:
    """Ingest, clean and cluster; return how many rows are kept."""
    said = run(
        "data ingest forum/ --output raw.jsonl --exclude package.json --skip-bad --bad bad.jsonl "
        "--for old --input-column question --output-column answer --encoding cp1252 "
        "--for *.csv --input-column question --output-column answer "
        "--for dump.sql --table posts --column body --strip-html"
    )
    raw = rows_of(folder / "raw.jsonl")
    assert number(r"raw.jsonl: ([\d,]+) rows", said) == len(raw) == there
    assert [row["where"] for row in rows_of(folder / "bad.jsonl")] == ["forum/more.jsonl:1"]
    assert "1 bad one skipped, the first: forum/more.jsonl:1" in said and "1 excluded" in said
    kinds = [next(kind for kind in ("messages", "input", "text") if kind in row) for row in raw]
    assert (kinds.count("messages"), kinds.count("text")) == (SHARED + REFUSALS + SPOKEN, len(PAGES) + POSTS)
    whole = json.dumps(raw, ensure_ascii=False)
    assert whole.count("Café, s'il vous plaît") == OLD and "\\ufeff" not in whole
    assert all(" — " in row["text"] and "<p>" not in row["text"] for row in raw if "dump.sql" in row["source"])

    said = run(
        "data clean raw.jsonl --output clean.jsonl --refusals --repeated-text 0.5 --near-duplicates 0.9 --as messages"
    )
    clean = rows_of(folder / "clean.jsonl")
    assert re.search(rf"^{len(raw)} rows in = {len(clean)} out \+ {len(raw) - len(clean)} dropped$", said, re.M)
    rules = {name: int(dropped) for name, dropped in re.findall(r"^  (\S.*?) +\d+ +(\d+)$", said, re.M)}
    assert (rules["exact duplicate"], rules["phrase: As an AI language model"]) == (TWICE, REFUSALS)
    assert sum(rules.values()) == len(raw) - len(clean)
    assert all("messages" in row for row in clean) and "Last updated on" not in json.dumps(clean)

    said = run("data cluster clean.jsonl --k 4 --keep-per-cluster 60 --output diverse.jsonl --map map.html")
    kept = rows_of(folder / "diverse.jsonl")
    groups = re.findall(r"^ +\d+ +(\d+) +(\d+) +\d+  ", said, re.M)
    assert number(r"^(\d+) rows in 4 clusters", said) == sum(int(rows) for rows, _ in groups) == len(clean)
    assert number(r"(\d+) rows kept", said) == sum(int(some) for _, some in groups) == len(kept) < len(clean)
    assert {json.dumps(row["messages"]) for row in kept} <= {json.dumps(row["messages"]) for row in clean}
    return len(kept)


def look_before_training(run: Callable[..., str], folder: pathlib.Path, rows: int, tiny: pathlib.Path) -> None:
    said = run(f"data stats diverse.jsonl --tokenizer {tiny} --max-length 256 --method lora")
    assert f"rows          {rows} (messages)" in said and "--skip-bad" not in said
    over = number(r"(\d+) rows \([\d.]+%\) are longer than 256 tokens", said)
    assert "<|im_start|>assistant" in run(f"data look diverse.jsonl --tokenizer {tiny} --row 1 --color never")
    said = run(
        f"data tokenize --input-file diverse.jsonl --output-file train.arrow --tokenizer-path {tiny} --max-length 256"
    )
    assert number(r"train.arrow: (\d+) examples", said) == rows - over
    assert f"{over} rows left out: longer than max_length" in said


def train_twice(run: Callable[..., str], folder: pathlib.Path, rows: int, command: str) -> None:
    """Plan, find a rate, train with a Ctrl-C in the middle, train again otherwise, compare."""
    assert "ampere-12g" in run(f"plan {command} --device v5e-1 rtx3070 --memory 12 --no-compile")
    found = re.search(r"train with it: (--config.train.learning_rate=\S+)", run(f"lr-find {command} --steps 12"))
    assert found and (folder / "lr.png").is_file()

    first = f"train {command} --config.output_dir=output {found[1]}"
    said = interrupted(first, folder, after=r"^step 1\d/")
    assert "tpu-tune generate --model output" in said
    stopped = metrics_of(folder / "output")[-1]["step"]
    run("generate --model output --prompt", "What is AI?")
    said = run(first)
    assert f"resuming from step {stopped} of" in said and "finished after" in said
    data = json.loads((folder / "output" / "summary.json").read_text())["data"]
    assert data["train"]["used_examples"] + data["eval"]["used_examples"] == rows

    run(f"train {command} --config.output_dir=second --config.lora.rank=4 {found[1]}")
    logged, again = ([row for row in metrics_of(folder / name) if "loss" in row] for name in ("output", "second"))
    steps = [row["step"] for row in logged]
    assert steps == sorted(set(steps)) and steps[-1] == again[-1]["step"]
    # The interruption has cost no row and repeated none: one epoch is all tokens once.
    assert logged[-1]["num_tokens"] == again[-1]["num_tokens"] == data["train"]["used_tokens"]
    said = run("curves output second --html report.html")
    assert "comparison:" in said and "lora.rank" in said and (folder / "report.html").is_file()


def metrics_of(directory: pathlib.Path) -> list[dict[str, Any]]:
    return rows_of(directory / "metrics.jsonl")


def use_what_was_trained(run: Callable[..., str], folder: pathlib.Path) -> None:
    assert "perplexity" in run("eval --model output --base")
    run("export output --merge --output merged")
    run("export output --gguf --output model.gguf")
    for model in ("output", "merged", "model.gguf"):
        assert "What is AI?" in run(f"generate --model {model} --prompt", "What is AI?")
    said = run("push output --repo me/my-adapter --dry-run")
    assert "adapter_model.safetensors" in said and str(folder) not in said
