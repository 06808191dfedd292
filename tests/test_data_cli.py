"""Every command of `tpu-tune data`: its help shows an example, and the parser accepts it."""

import shlex

import pytest

from tpu_tune.cli import data, main
from tpu_tune.cli.program import make_parser

NAMES = [module.__name__.rpartition(".")[2] for module in data.COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_an_example_that_parses(capsys, name):
    with pytest.raises(SystemExit) as end:
        main(["data", name, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "--json" in text
    example = shlex.split(text.partition("example:\n")[2])
    assert example[:3] == ["tpu-tune", "data", name]
    words = [word for word in example[1:] if not word.startswith("--config.")]
    assert make_parser().parse_args(words).command == f"data {name}"


def test_the_help_of_data_lists_them(capsys):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in NAMES)
