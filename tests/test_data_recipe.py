"""Recipes: their configuration, cached stages, the report, and Beam against this machine's own engine."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers_training import write_tiny_llama

from tpu_tune import UserError
from tpu_tune.cli import main
from tpu_tune.data import recipe as recipes
from tpu_tune.data.recipe import beam, settings, stages

TOPICS = ("bread", "ships", "stars")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Sixty HTML pages of three topics: two the same, two nearly, one that refuses."""
    folder, random = tmp_path_factory.mktemp("pages"), np.random.RandomState(0)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = {topic: ["".join(random.choice(letters, 7)) for _ in range(60)] for topic in TOPICS}
    for number in range(60):
        topic = TOPICS[number % 3]
        words = " ".join(random.choice(vocabulary[topic], 40))
        (folder / f"{number:02}.html").write_text(f"<title>{topic}</title><p>{words} & <b>{number}</b></p>")
    (folder / "60.html").write_text((folder / "00.html").read_text())
    (folder / "61.html").write_text((folder / "01.html").read_text().replace("</p>", " again</p>"))
    (folder / "62.html").write_text("<p>As an AI language model, I cannot &lt;script&gt;alert(1)&lt;/script&gt;</p>")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def recipe_of(pages: pathlib.Path, tokenizer: pathlib.Path, folder: pathlib.Path, **sections: Any) -> Any:
    values = {
        "inputs": [str(pages)],
        "output_dir": str(folder),
        "clean": {"near_duplicates": 0.8},
        "cluster": {"k": 3},
        "split": {"count": 9, "stratify_key": "cluster"},
        "tokenize": {"tokenizer_path": str(tokenizer), "max_length": 128},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) else section
    return settings.from_dict(values)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(pages: pathlib.Path, tokenizer: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("recipe") / "out"
    return folder, recipes.run_recipe(recipe_of(pages, tokenizer, folder))


def test_five_steps_from_pages_to_tokens(done: Any) -> None:
    folder, finished = done
    ingested, cleaned, clustered, split, tokenized = finished
    assert [found.name for found in finished] == list(settings.STEPS)
    assert ingested.report["rows_out"] == 63 and cleaned.report["rows_out"] == 60
    dropped = {rule["rule"]: rule["dropped"] for rule in cleaned.report["rules"]}
    assert dropped["exact duplicate"] == 1 and dropped["near duplicate"] == 1 and sum(dropped.values()) == 3
    rows = read_rows(clustered.outputs[0])
    assert {(row["cluster"], row["text"].split()[0]) for row in rows} == {
        (row["cluster"], row["text"].split()[0]) for row in rows[:3]
    }  # purity 1.0
    train, held_out = (read_rows(path) for path in split.outputs)
    assert len(train) == 51 and sorted(row["cluster"] for row in held_out) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [pathlib.Path(path).name for path in tokenized.outputs] == ["train.arrow", "val.arrow"]
    table = pa.ipc.open_file(tokenized.outputs[0]).read_all()
    assert table.column_names == ["input_ids", "labels"] and max(map(len, table["input_ids"].to_pylist())) <= 128
    assert sorted(os.listdir(folder)) == [
        "1-ingest",
        "2-clean",
        "3-cluster",
        "4-split",
        "5-tokenize",
        recipes.REPORT,
    ]


def test_the_report_holds_everything_and_runs_nothing_of_the_data(done: Any) -> None:
    folder, _ = done
    page = (folder / recipes.REPORT).read_text()
    for text in ("near duplicate", "data:image/png;base64,", "first rows of train.jsonl", "stratify_key", "rows in"):
        assert text in page
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "http://" not in page and "https://" not in page


def test_a_second_run_does_nothing_and_a_change_only_what_follows(
    done: Any, pages: pathlib.Path, tokenizer: pathlib.Path
) -> None:
    folder, finished = done
    stamps = {path: os.stat(path).st_mtime_ns for found in finished for path in found.outputs}
    again = recipes.run_recipe(recipe_of(pages, tokenizer, folder))
    assert all(found.cached for found in again)
    assert {path: os.stat(path).st_mtime_ns for path in stamps} == stamps
    assert [found.report for found in again] == [json.loads(json.dumps(found.report)) for found in finished]
    changed = recipes.run_recipe(recipe_of(pages, tokenizer, folder, split={"seed": 1}))
    assert [found.cached for found in changed] == [True, True, True, False, False]
    assert read_rows(changed[3].outputs[1]) != read_rows(changed[2].outputs[0])[:9]
    recipes.run_recipe(recipe_of(pages, tokenizer, folder))  # as it was, for the other tests


def test_a_changed_input_or_a_damaged_output_is_seen(
    pages: pathlib.Path, tokenizer: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one row"}\n{"text": "another row"}\n')
    recipe = settings.from_dict({"inputs": [str(file)], "output_dir": str(tmp_path / "out"), "steps": ["clean"]})
    first = recipes.run_recipe(recipe)[0]
    assert recipes.run_recipe(recipe)[0].cached
    pathlib.Path(first.outputs[0]).write_text("cut")
    assert not recipes.run_recipe(recipe)[0].cached
    file.write_text('{"text": "one row"}\n{"text": "a third"}\n{"text": "and more"}\n')
    assert recipes.run_recipe(recipe)[0].report["rows_out"] == 3


def test_a_step_that_fails_leaves_what_was_done(tmp_path: pathlib.Path) -> None:
    def work(files: list[str], folder: pathlib.Path) -> dict[str, Any]:
        (folder / "rows.jsonl").write_text('{"text": "x"}\n')
        return {"outputs": ["rows.jsonl"]}

    def fail(files: list[str], folder: pathlib.Path) -> dict[str, Any]:
        (folder / "half").write_text("half")
        raise failure

    good, place = stages.Stage("good", {}, work), tmp_path / "out"
    for failure in (UserError("bad row"), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            stages.run_stages([good, stages.Stage("bad", {}, fail)], ["a"], place, "1")
        assert sorted(os.listdir(place)) == ["1-good"]
    assert stages.run_stages([good], ["a"], place, "1")[0].cached
    assert not stages.run_stages([good], ["a"], place, "2")[0].cached
    (place / ".1-good.tmp").mkdir()  # what a kill leaves
    (place / ".1-good.tmp" / "half").write_text("half")
    assert not stages.run_stages([good], ["a"], place, "3")[0].cached
    assert sorted(os.listdir(place)) == ["1-good"]


# --- Beam -------------------------------------------------------------------------------------------------------------


def test_beam_writes_the_same_bytes(
    done: Any, pages: pathlib.Path, tokenizer: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(beam, "BLOCK_BYTES", 2000)  # several blocks
    _, finished = done
    steps = {"steps": ["ingest", "clean", "tokenize"], "clean": {"near_duplicates": 0.8}}
    local = recipes.run_recipe(recipe_of(pages, tokenizer, tmp_path / "local", **steps))
    found = recipes.run_recipe(recipe_of(pages, tokenizer, tmp_path / "beam", **steps, runner="beam"))
    for one, other in zip(local, found, strict=True):
        for mine, theirs in zip(one.outputs, other.outputs, strict=True):
            assert pathlib.Path(mine).read_bytes() == pathlib.Path(theirs).read_bytes(), mine
        if one.name == "clean":  # the examples name the files, which lie elsewhere
            assert json.dumps(one.report).replace("/local/", "/beam/") == json.dumps(other.report)
        assert sorted(os.listdir(one.folder)) == sorted(os.listdir(other.folder))


def test_beams_first_bad_row_is_the_error(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("apache_beam")
    from tpu_tune.data.clean import CleanOptions

    monkeypatch.setattr(beam, "BLOCK_BYTES", 100)
    file, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"text": f"row {number} of some"}) for number in range(20)]
    rows[7] = rows[15] = "{"
    file.write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"rows\.jsonl:8: not valid JSON"):
        beam.clean([str(file)], str(output), CleanOptions(), False, [])
    assert not output.exists()
    report = beam.clean([str(file)], str(output), CleanOptions(), True, [])
    assert (report["rows_in"], report["rows_out"]) == (20, 18) and len(read_rows(output)) == 18


@pytest.mark.parametrize("size", [1, 10, 57, 10**6])
@pytest.mark.parametrize("ending", ["\n", "", "\n\n"])
def test_blocks_are_the_lines_of_the_file(tmp_path: pathlib.Path, size: int, ending: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text("\n".join("x" * (number % 5 * 20) for number in range(40)) + ending)
    found = [line for block in beam.blocks(str(file), size) for line in block.lines()]
    assert found == list(enumerate(file.read_bytes().splitlines(keepends=True), start=1))
    assert len(list(beam.blocks(str(file), size))) > (1 if size < 100 else 0)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("clean.near_duplicate", 0.8, "did you mean 'clean.near_duplicates'"),
        ("step", ["clean"], "did you mean 'steps'"),
        ("clean.near_duplicates", "often", "of type float or none"),
        ("cluster.k", 3.5, "of type int or str"),
        ("inputs", 3, "of type list"),
        ("tokenize.max_length", True, "of type int"),
    ],
)
def test_wrong_keys_and_types(key: str, value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings.assign(settings.default(), key, value)


def test_text_from_the_command_line_gets_its_type() -> None:
    recipe = settings.default()
    given = {
        "clean.near_duplicates": ("0.8", 0.8), "cluster.k": ("7", 7), "split.count": ("none", None),
        "inputs": ("a.jsonl,b/", ["a.jsonl", "b/"]), "clean.patterns": ('["x,y"]', ["x,y"]), "skip_bad": ("true", True),
        "ingest.column": ("7", "7"), "tokenize.columns": ('{"q": "input"}', {"q": "input"}), "ingest.gap_minutes": ("5", 5.0),
    }  # fmt: skip
    for key, (text, value) in given.items():
        settings.assign(recipe, key, text)
        node = recipe
        for part in key.split("."):
            node = node[part]
        assert node == value and type(node) is type(value), key
    settings.assign(recipe, "cluster.k", "auto")
    assert recipe.cluster.k == "auto"
    settings.assign(recipe, "tokenize.columns.a", "output")
    assert recipe.tokenize.columns == {"q": "input", "a": "output"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": ["clean", "ingest"]}, "in this order"),
        ({"steps": ["wash"]}, "names 'wash'"),
        ({"inputs": []}, "'inputs' is empty"),
        ({"runner": "spark"}, "one of local, beam"),
        ({"num_workers": -1}, "'num_workers' is -1; it must not be negative"),
        ({"clean": {"near_duplicates": float("nan")}}, "'clean.near_duplicates' is nan; it must be finite"),
        ({"tokenize": {"tokenizer_path": ""}}, "tokenizer_path' is empty"),
    ],
)
def test_recipes_that_cannot_run(pages: pathlib.Path, tokenizer: pathlib.Path, changes: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        recipe_of(pages, tokenizer, pathlib.Path("out"), **changes)


def test_the_command(
    pages: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], tokenizer: pathlib.Path
) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(
        "from tpu_tune.data.recipe import default\n\ndef get_config():\n    c = default()\n"
        f"    c.inputs, c.output_dir = [{str(pages)!r}], {str(tmp_path / 'out')!r}\n    c.steps = ['ingest', 'clean']\n    return c\n"
    )
    words = ["data", "run", "--config", str(file), "--config.clean.max_words=400"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "clean " in text and "train on it:" in text and "--config.data.train=" in text
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [step["cached"] for step in facts["steps"]] == [True, True] and facts["steps"][1]["rows_out"] == 61
    assert main(["data", "run", "--config", str(file), "--config.clean.max_word=4"]) == 1
    assert "did you mean 'clean.max_words'" in capsys.readouterr().err


# --- real inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python_docs", "foldoc"])
def test_real_inputs_end_in_twenty_steps_of_training(
    name: str,
    tmp_path: pathlib.Path,
    python_docs_dir: pathlib.Path,
    foldoc_dir: pathlib.Path,
    smollm2_gguf: pathlib.Path,
) -> None:
    root = pathlib.Path(__file__).parents[1] / "configs"
    recipe = settings.read(str(root / f"data_{name}.py"))
    recipe.inputs = [str(python_docs_dir if name == "python_docs" else foldoc_dir)]
    recipe.output_dir, recipe.tokenize.tokenizer_path = str(tmp_path / "data"), str(smollm2_gguf)
    train, held_out = recipes.run_recipe(recipe)[-1].outputs
    status = main(
        [
            "train",
            "--config",
            str(root / "quickstart.py"),
            f"--config.model.path={smollm2_gguf}",
            "--config.data.format=auto",
            f"--config.data.train={train}",
            f"--config.data.eval={held_out}",
            f"--config.output_dir={tmp_path / 'run'}",
            "--config.train.max_steps=20",
            "--config.train.per_device_train_batch_size=1",
            "--config.data.max_length=512",
            "--config.train.eval_steps=20",
            "--config.mesh.fsdp=1",
            "--config.mesh.data=8",
            "--no-check",
        ]
    )
    assert status == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert rows[-1]["step"] == 20 and losses[-1] < losses[0]
