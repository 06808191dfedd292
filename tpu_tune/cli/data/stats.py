"""`tpu-tune data stats`: how large, how long, how often the same, and what the tokenizer makes of it."""

from __future__ import annotations

import argparse
import json

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, spellings
from tpu_tune.cli.data.tokenize import add_format, add_tokenizer, columns, template_variables


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "stats",
        run,
        "count rows, characters, tokens, duplicates; warn of what will go wrong",
        "tpu-tune data stats chats.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct",
    )
    parser.add_argument("input", metavar="INPUT", help="a data file, or a directory of them")
    add_tokenizer(parser, "; without it lengths are in characters")
    parser.add_argument(
        "-l",
        *spellings("--max-length"),
        type=numbers.whole(1),
        default=2048,
        metavar="N",
        help="count rows over N tokens (default 2048)",
    )
    parser.add_argument(
        "--method", choices=("full", "lora"), default="full", help="what the data is for: full (default) wants 100 MiB"
    )
    add_format(parser)
    parser.add_argument(
        *spellings("--skip-bad"), action="store_true", help="leave out and count rows that cannot be used"
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.checkpoints.tokenizers import open_tokenizer
    from tpu_tune.data import chat, stats
    from tpu_tune.data.tokenize_options import TokenizeOptions

    tokenizer = open_tokenizer(options.tokenizer_path) if options.tokenizer_path else None
    tokenize_options = TokenizeOptions(
        format=options.format,
        max_length=options.max_length,
        columns=columns(options),
        chat_template=chat.read_template(tokenizer, options.chat_template),
        chat_template_kwargs=template_variables(options),
        objective="",
    )
    figures = stats.describe(options.input, tokenizer, tokenize_options, options.method, options.skip_bad)
    print(json.dumps(figures, ensure_ascii=False) if options.json else stats.table(figures))
    return 0
