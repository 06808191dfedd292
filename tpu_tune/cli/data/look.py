"""`tpu-tune data look`: some rows as the model will see them."""

from __future__ import annotations

import argparse
import json
import os
import sys

from tpu_tune.checkpoints import json_text
from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, read_config, spellings
from tpu_tune.cli.data.tokenize import add_tokenizer
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "look",
        run,
        "show rows as the model will see them: trained tokens in green, the others dim",
        "tpu-tune data look chats.jsonl --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct -n 3",
    )
    parser.add_argument("input", nargs="?", metavar="INPUT", help="a data file, or a directory (default: data.train)")
    add_tokenizer(parser, " (default: model.path)")
    parser.add_argument(
        "--config", metavar="FILE", help="the run's config file; --config.KEY=VALUE overrides a key, with or without it"
    )
    parser.add_argument("-n", "--count", type=numbers.whole(), default=3, metavar="N", help="rows to draw (default 3)")
    parser.add_argument("--seed", type=numbers.seed, default=0, metavar="N", help="decides which (default 0)")
    parser.add_argument("--row", type=numbers.whole(), metavar="N", help="the file's Nth row instead")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="auto: on a terminal; otherwise what is trained on stands in [[ ]]",
    )
    parser.add_argument(
        *spellings("--no-color"), dest="color", action="store_const", const="never", help="as --color never"
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    config = read_config(options)
    path, model = options.input or config.data.train, options.tokenizer_path or config.model.path
    if not path or not model:
        raise UserError("give INPUT and --tokenizer, or a --config that sets data.train and model.path")
    if not isinstance(path, str):
        raise UserError("data.train names several sources; give one of them as INPUT")
    if options.count < 1 or (options.row is not None and options.row < 1):
        raise UserError("-n and --row must be at least 1")
    from tpu_tune.checkpoints.chat_template import template_of
    from tpu_tune.checkpoints.tokenizers import open_tokenizer
    from tpu_tune.checkpoints.vocabulary import add_tokens
    from tpu_tune.data.look import ROLES, look, show
    from tpu_tune.data.tokenize_options import options_from_config

    tokenizer = open_tokenizer(model)
    add_tokens(tokenizer, list(config.model.add_special_tokens))
    if config.model.adapter and (template := template_of(config.model.adapter)):
        tokenizer.chat_template = template
    objective = "" if config.objective.name == "sft" else config.objective.name  # rows of any kind can be looked at
    tokenize_options = options_from_config(config.data, tokenizer, _is_encoder_decoder(model), objective)
    views = look(os.path.expanduser(path), tokenizer, tokenize_options, options.count, options.seed, options.row)
    if options.json:
        shown = [
            {
                "where": view.where,
                **({"role": ROLES[view.role]} if view.role else {}),
                "tokens": len(view.texts),
                "trained": int(view.trained.sum()),
                "cut": view.cut,
                "notes": view.notes,
                "text": "".join(view.texts),
                "texts": view.texts,
                "mask": view.trained.tolist(),
            }
            for view in views
        ]
        print(json.dumps(shown, ensure_ascii=False))
        return 0
    in_color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    color = options.color == "always" or (options.color == "auto" and in_color)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 still shows all
    print("\n\n".join(show(view, color) for view in views))
    return 0


def _is_encoder_decoder(path: str) -> bool:
    try:
        with open(os.path.join(os.path.expanduser(path), "config.json"), "rb") as file:
            return bool(json_text.loads(file.read()).get("is_encoder_decoder"))
    except (OSError, ValueError, AttributeError):
        return False
