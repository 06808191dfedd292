"""`tpu-tune data chunk`: long text into rows of so many tokens."""

from __future__ import annotations

import argparse
import json

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, spellings
from tpu_tune.cli.data.tokenize import add_tokenizer
from tpu_tune.errors import counted


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "chunk",
        run,
        "cut long text into rows of at most so many tokens",
        "tpu-tune data chunk book.txt --output book.jsonl --tokenizer-path HuggingFaceTB/SmolLM2-135M-Instruct "
        "--tokens 2048",
    )
    parser.add_argument("input", metavar="INPUT", help="a .txt or .md file, or a data file of rows with text")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the .jsonl file to write")
    add_tokenizer(parser)
    parser.add_argument(
        "--tokens",
        type=numbers.whole(1),
        default=2048,
        metavar="N",
        help="most tokens a row (default 2048), a beginning and an end of text among them",
    )
    parser.add_argument(*spellings("--text-key"), default="text", metavar="KEY", help="the rows' key of the text")
    parser.add_argument(
        *spellings("--skip-bad"), action="store_true", help="leave out and count rows that cannot be used"
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.checkpoints.tokenizers import open_tokenizer
    from tpu_tune.data.chunk import chunk_file
    from tpu_tune.errors import UserError

    if options.tokens < 1:
        raise UserError(f"--tokens is {options.tokens}; it must be at least 1")
    tokenizer = open_tokenizer(options.tokenizer_path)
    report = chunk_file(options.input, options.output, tokenizer, options.tokens, options.text_key, options.skip_bad)
    if options.json:
        print(json.dumps(report))
    else:
        whole = f"; {counted(report['whole'], 'row')} of other formats copied unchanged" if report["whole"] else ""
        bad = f"; {counted(report['bad_rows'], 'bad row')} left out" if report["bad_rows"] else ""
        print(
            f"{report['output']}: {counted(report['pieces'], 'row')} of at most {counted(report['tokens'], 'token')}, "
            f"of {counted(report['rows'], 'text')}{whole}{bad}"
        )
    return 0
