"""Options that are numbers: every command refuses what is no number or out of bounds before it starts; and paths that
lead nowhere end every data command in one line."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
from collections.abc import Iterator

import pytest

from tpu_tune import UserError
from tpu_tune.cli import main, program
from tpu_tune.data.recipe import settings
from tpu_tune.planning import find_device

NONSENSE = ["nan", "inf", "-inf", "1e999", "9" * 5000, "x", "", "1e", "0x10"]
NO_COUNT = [*NONSENSE, "1" + "0" * 30, "-1" + "0" * 30, "-1", "1.5"]


def commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield (words, parser) of every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from commands(inner, f"{name} {word}".strip())
            return
    yield name, parser


ALL = dict(commands(program.make_parser()))


def numbers_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [one for one in parser._actions if one.type in (int, float) or isinstance(one.type, functools.partial)]


@pytest.mark.parametrize("name", [name for name, parser in ALL.items() if numbers_of(parser)])
def test_nonsense_is_refused_by_name(name: str) -> None:
    for action in numbers_of(ALL[name]):
        assert action.type not in (int, float), f"{action.option_strings}: takes numbers without bounds"
        for text in NO_COUNT if action.type.args[0] is int else NONSENSE:
            with pytest.raises(argparse.ArgumentError) as refused:
                ALL[name]._get_value(action, text)
            assert action.option_strings[0] in str(refused.value) and len(str(refused.value)) < 300
        assert action.default is None or ALL[name]._get_value(action, str(action.default)) == action.default


def test_every_command_that_draws_takes_numpys_seeds() -> None:
    seeds = [action for parser in ALL.values() for action in numbers_of(parser) if "--seed" in action.option_strings]
    assert len(seeds) >= 6
    assert {(action.type("0"), action.type(str(2**32 - 1))) for action in seeds} == {(0, 2**32 - 1)}
    for action in seeds:
        with pytest.raises(argparse.ArgumentTypeError, match="at most 4294967295"):
            action.type(str(2**32))


def test_an_option_out_of_bounds_ends_in_a_line_with_its_name(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "split", "rows.jsonl", "--seed", "1" + "0" * 30])
    assert ended.value.code == 2
    assert "argument --seed: 1000000000000000000000000000000 is out of range; it must be" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t4x999999999", "t4x" + "9" * 5000, "v5e-" + "9" * 5000, "rtx4090 x0"])
def test_no_plan_for_more_cards_than_there_are(name: str) -> None:
    with pytest.raises(UserError) as refused:
        find_device(name)
    assert "9" * 50 not in str(refused.value) and "\n" not in str(refused.value)  # one line that does not repeat it all


LONG = "x" * 300 + ".jsonl"
DEEP = "/".join(["d" * 100] * 60) + "/rows.jsonl"


@pytest.mark.parametrize("path", ["loop.jsonl", "loops/rows.jsonl", LONG, DEEP, "rows.jsonl/rows.jsonl"])
@pytest.mark.parametrize(
    "words",
    [
        "ingest {} --output o.jsonl",
        "ingest rows.jsonl --output {}",
        "clean {} --output o.jsonl",
        "clean rows.jsonl --output {}",
        "clean rows.jsonl --output o.jsonl --report {}",
        "clean rows.jsonl --dry-run --phrases {}",
        "split {}",
        "split rows.jsonl --output-dir {}",
        "stats {}",
        "run --config {}",
        "run --config recipe.py --config.output_dir={}",
        "run --config recipe.py --config.inputs={}",
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(
    words: str, path: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    os.symlink("loop.jsonl", "loop.jsonl")
    os.symlink("loops", "loops")
    pathlib.Path("rows.jsonl").write_text('{"text": "a cat"}\n' * 5)
    pathlib.Path("recipe.py").write_text(
        'def get_config():\n    return {"inputs": ["rows.jsonl"], "steps": ["ingest", "clean"], "output_dir": "o"}\n'
    )
    assert main(["data", *words.format(path).split()]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("tpu-tune: ") and "Traceback" not in "".join(said)


@pytest.mark.parametrize("name", ["clean.seed", "cluster.seed", "split.seed", "ingest.max_depth"])
@pytest.mark.parametrize("value", ["-1", "1" + "0" * 30, "nan"])
def test_a_recipes_numbers_have_the_same_bounds(name: str, value: str) -> None:
    recipe = settings.default()
    recipe.inputs = ["rows.jsonl"]
    with pytest.raises(UserError, match=name):
        settings.assign(recipe, name, value)
        settings.SCHEMA.check(recipe)
