"""The pages: their commands are real, those marked to be run print what stands there, every link and named test exists.

A console block behind `<!-- run -->` is run in this process, in one folder for all pages, on the inputs that the pages
name; each line of its output that the page shows must come, in that order, with the same words. Numbers may differ,
and `[...]` stands for any lines.
"""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tpu_tune.cli import main
from tpu_tune.cli.program import make_parser
from tpu_tune.models import FAMILIES, architecture
from tpu_tune.transforms import LoraConfig, QuantizeConfig, find_targets, quantize

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"(<!-- run -->\n)?```console\n(.*?)```", re.S)
FULL_SH = r"""MODEL_NAME='smollm2.gguf'
BSZ=4
accelerate launch \
    './training/hf_trainer.py' \
    --model_name_or_path "$MODEL_NAME" \
    --train_file chats.jsonl \
    --output_dir output/guide \
    --report_to "none" \
    --do_train --do_eval \
    --ddp_find_unused_parameters false \
    --optim 'adamw_torch_fused' \
    --seed 42 --data_seed 42 \
    --logging_first_step true --logging_steps 1 \
    --dataloader_num_workers 1 \
    --per_device_train_batch_size "$BSZ" --per_device_eval_batch_size "$BSZ" \
    --fp16 true \
    --evaluation_strategy "steps" --eval_steps 128 \
    --save_strategy "steps" --save_steps 128 \
    --save_total_limit 2 \
    --gradient_accumulation_steps 8 \
    --learning_rate 1.0e-5 \
    --lr_scheduler_type "cosine" \
    --warmup_steps 64 \
    --num_train_epochs 1
"""  # the guide's first listing, paths exchanged


def blocks(page: pathlib.Path) -> Iterator[tuple[bool, list[tuple[str, list[str]]]]]:
    """Yield (whether to run it, [(command, the lines shown of its output)]) of each console block."""
    for mark, text in BLOCK.findall(page.read_text()):
        commands: list[tuple[str, list[str]]] = []
        for line in text.splitlines():
            if line.startswith("$ "):
                commands.append((line[2:], []))
            elif line.strip():
                commands[-1][1].append(line)
        yield bool(mark), commands


def shell_lines(page: pathlib.Path) -> Iterator[str]:
    """Yield the commands of a page's bash blocks, without comments and variables before them."""
    for text in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] not in ("pip", "export"):
                yield shlex.join(words)


WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").glob("*.md")), *PAGES]
COMMANDS = [(page.stem, command) for page in PAGES for _, found in blocks(page) for command, _ in found]
COMMANDS += [(page.stem, command) for page in WRITTEN for command in shell_lines(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[:40])
def test_every_command_is_one(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "gcloud":
        assert words[1] in ("auth", "config", "services", "compute", "storage")
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "python":
        assert (
            words[1] == "-m"
            and (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
            or (ROOT / words[2].replace(".", "/")).is_dir()
        )
    else:
        assert words[0] == "tpu-tune"
        plain = [word for word in words[1:] if not word.startswith("--config.")]
        _, unknown = make_parser().parse_known_args(plain)
        assert plain[0] == "hf" or not unknown  # hf's parser takes the script's flags as they come


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    smollm2_gguf: pathlib.Path,
    foldoc_dir: pathlib.Path,
    chatterbot_dir: pathlib.Path,
) -> Iterator[pathlib.Path]:
    """The working directory of all pages."""
    place, before = tmp_path_factory.mktemp("docs"), pathlib.Path.cwd()
    (place / "smollm2.gguf").symlink_to(smollm2_gguf)
    (place / "foldoc").symlink_to(foldoc_dir)
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "full.sh").write_text(FULL_SH)
    for metrics in (ROOT / "tests" / "goldens" / "curves").glob("*.jsonl"):
        (place / "runs" / metrics.stem).mkdir(parents=True)
        shutil.copy(metrics, place / "runs" / metrics.stem / "metrics.jsonl")
    arguments, sys.argv = sys.argv, ["chats_to_jsonl.py", str(chatterbot_dir), str(place / "chats.jsonl")]
    try:
        runpy.run_path(str(ROOT / "launch" / "chats_to_jsonl.py"), run_name="__main__")
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = arguments
    os.chdir(place)
    yield place
    os.chdir(before)


def words_of(line: str) -> str:
    """A line without its numbers and its spacing."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "0", line).split())


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(run for run, _ in blocks(page))], ids=lambda page: page.stem
)
def test_what_is_marked_runs_and_prints_what_is_shown(
    page: pathlib.Path, folder: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for run, commands in blocks(page):
        for command, shown in commands if run else []:
            capsys.readouterr()
            status = main(shlex.split(command)[1:])
            captured = capsys.readouterr()
            assert status == 0, captured.err
            printed = [words_of(line) for line in (captured.out + captured.err).splitlines()]
            at = 0
            for line in shown:
                if line == "[...]":
                    continue
                assert words_of(line) in printed[at:], f"{page.name}: {command}: {line}\n{captured.out}"
                at = printed.index(words_of(line), at) + 1


def test_links_and_pictures_are_there() -> None:
    for page in WRITTEN:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
    for picture in (DOCS / "images").iterdir():
        assert picture.stat().st_size < 100_000, picture.name


def test_the_fourteen_places_where_the_guide_is_mistaken() -> None:
    rows = [line.split("|") for line in (DOCS / "mistakes.md").read_text().splitlines() if re.match(r"\| \d", line)]
    assert [int(row[1]) for row in rows] == list(range(1, 15))
    linked = [re.search(r"\((\w+\.md)\)", row[4])[1] for row in rows]
    for name in set(linked):
        assert (DOCS / name).read_text().count("!!! warning") >= linked.count(name) - (name in ("full.md", "qlora.md"))
    compute, qlora = (" ".join((DOCS / f"{name}.md").read_text().split()) for name in ("compute", "qlora"))
    assert "EasyLM" in compute and "Mesh Transformer JAX" in compute  # the guide's two routes to TPUs
    assert "99.3%" in qlora and "not one of this tool" in qlora and "arXiv:2305.14314" in qlora  # whose claim it is


def test_the_readme_can_be_scanned() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_every_family_is_in_the_tables() -> None:
    for name in ("README.md", "benchmarks/RESULTS.md"):
        listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .*", (ROOT / name).read_text(), re.M)))
        assert set(FAMILIES) <= set(listed), name


def test_what_the_guide_asks_is_shown_by_tests_that_exist() -> None:
    rows = re.findall(r"^\| .* \| `(\w+)::(\w+)` \|$", (DOCS / "guide-coverage.md").read_text(), re.M)
    assert len(rows) == 84  # one for each thing that the guide asks
    for file, test in rows:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.M), (file, test)


def test_files_that_the_pages_name_exist() -> None:
    for page in WRITTEN:
        text = page.read_text()
        for name in re.findall(r"\b((?:compile/)?test_\w+\.py)", text):
            assert list((ROOT / "tests").rglob(name)), (page.name, name)
        for name in re.findall(r"\b((?:tpu_tune|configs|launch|benchmarks|notebooks|docs)/[\w/*.-]*\w\.\w+)\b", text):
            assert "NAME" in name or list(ROOT.glob(name)), (page.name, name)


def test_nothing_outside_the_repository_is_cited() -> None:
    files = [
        path for folder in ("tpu_tune", "tests", "docs", "benchmarks", "launch") for path in (ROOT / folder).rglob("*")
    ]
    for path in [*files, *ROOT.glob("*.md")]:
        if path.suffix in (".py", ".md", ".sh") and path != pathlib.Path(__file__):
            assert not re.search(r"\.\./shared/|\bshared/reference|\bDESIGN\b", path.read_text()), path


def leaves(tree: dict[str, Any]) -> list[str]:
    """A line a leaf: its path, its kind, the shapes of its arrays."""
    kinds = {path: "array" if hasattr(leaf, "dtype") else type(leaf).__name__ for path, leaf in tree.items()}
    shapes = {path: " ".join(str(part.shape) for part in jax.tree.leaves(leaf)) for path, leaf in tree.items()}
    return [f"{path} {kinds[path]} {shapes[path]}" for path in tree]


def test_the_tree_before_and_after_combine() -> None:
    """The three listings of docs/design.md."""
    sizes = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    arch = architecture({"model_type": "llama", "num_attention_heads": 8, "tie_word_embeddings": True, **sizes})
    modules = arch.modules()
    params = {path: jnp.zeros(shape, jnp.bfloat16) for path, shape in arch.leaf_shapes().items()}
    params = quantize(params, modules, QuantizeConfig(format="nf4"))
    targets = find_targets(modules, LoraConfig(rank=4, target_modules=["q_proj"]))
    trainable, frozen = targets.split(params, targets.init(params, jax.random.key(0)))
    trees = {"trainable": trainable, "frozen": frozen, "combined": targets.combine(trainable, frozen)}
    page = (DOCS / "design.md").read_text()
    for name, tree in trees.items():
        text = re.search(rf"<!-- tree: {name} -->\n```text\n(.*?)```", page, re.S)[1]
        shown = [" ".join(line.split()) for line in text.splitlines()]
        assert shown[0] == leaves(tree)[0] and shown[-1] == leaves(tree)[-1]
        assert [line for line in leaves(tree) if line in shown] == [line for line in shown if line != "[...]"]


def test_the_site_builds(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site")))
    assert "Minimizing the noise" in (tmp_path / "site" / "data" / "index.html").read_text()
    pages = [page.read_text() for page in (tmp_path / "site").rglob("*.html")]
    assert not any(re.search(r'(src|href)="https?://fonts', page) for page in pages)
