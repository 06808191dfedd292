"""`tpu-tune data tokenize`: an Arrow file of token ids and labels."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tpu_tune.checkpoints import json_text
from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, spellings


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "tokenize",
        run,
        "tokenize rows into an Arrow file that trainers read memory-mapped",
        "tpu-tune data tokenize --input-file train.jsonl --output-file train.arrow "
        "--tokenizer-path HuggingFaceTB/SmolLM2-135M-Instruct --max-length 2048",
    )
    parser.add_argument(
        "-i",
        *spellings("--input-file"),
        "--input",
        required=True,
        metavar="FILE",
        help=".jsonl (or .jsonl.gz), .json, .csv, .tsv or .parquet with text, input/output, prompt/generation, alpaca "
        "or chat rows",
    )
    parser.add_argument(
        "-o",
        *spellings("--output-file"),
        "--output",
        required=True,
        metavar="FILE",
        help="the .arrow file to write",
    )
    add_tokenizer(parser)
    parser.add_argument(
        "-l",
        *spellings("--max-length"),
        type=numbers.whole(),
        default=2048,
        metavar="N",
        help="tokens a row (default 2048): text is cut into blocks of N, pairs and chats that are longer are left out",
    )
    parser.add_argument(
        *spellings("--num-eos"),
        type=numbers.whole(),
        default=1,
        metavar="N",
        help="ends of text after an answer or a text (default 1; 3 as PygmalionAI's script; chats end as their "
        "template)",
    )
    add_format(parser)
    parser.add_argument(*spellings("--train-on-source"), action="store_true", help="label the prompt too")
    parser.add_argument(
        "--workers", type=numbers.whole(), default=0, metavar="N", help="processes (default: what the rows are worth)"
    )
    parser.add_argument(
        *spellings("--skip-bad"), action="store_true", help="leave out and count rows that cannot be used"
    )


def add_tokenizer(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """Add `--tokenizer-path`; `otherwise` says what happens without it, else it is required."""
    parser.add_argument(
        "-t",
        *spellings("--tokenizer-path"),
        "--tokenizer",
        dest="tokenizer_path",
        default="",
        required=not otherwise,
        metavar="PATH",
        help="Hugging Face id or directory, .gguf file, or tokenizer.json" + otherwise,
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a row means."""
    parser.add_argument(
        "--format",
        default="auto",
        help="auto (default: by the keys of each row), text, input-output, prompt-generation, prompt-completion, "
        "alpaca, sharegpt, messages; with -as-chat behind it (auto-as-chat) prompt and answer become turns of a chat",
    )
    for key, name in (("text", "text"), ("input", "prompt"), ("output", "answer")):
        parser.add_argument(
            *spellings(f"--{key}-key"), default="", metavar="KEY", help=f"the rows' own key of the {name}"
        )
    parser.add_argument(
        *spellings("--chat-template"),
        default="",
        metavar="TEXT",
        help="Jinja text or file (default: the tokenizer's own)",
    )
    parser.add_argument(
        *spellings("--chat-template-kwargs"),
        default="",
        metavar="JSON",
        help="its variables, e.g. '{\"enable_thinking\": false}'; a row's own come first",
    )


def template_variables(options: argparse.Namespace) -> dict[str, Any]:
    """Read `--chat-template-kwargs`.

    Raises:
      UserError: it is no JSON object.
    """
    from tpu_tune.errors import UserError

    text = options.chat_template_kwargs
    try:
        found = json_text.loads(text) if text else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"--chat-template-kwargs {text[:60]!r} is no JSON object; e.g. '{{\"enable_thinking\": false}}'"
        )
    return found


def columns(options: argparse.Namespace) -> dict[str, str]:
    """The rows' own keys -> the known ones."""
    named = {"text": options.text_key, "input": options.input_key, "output": options.output_key}
    return {own: known for known, own in named.items() if own and own != known}


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.checkpoints.tokenizers import open_tokenizer
    from tpu_tune.data import chat
    from tpu_tune.data.pretokenize import tokenize_file
    from tpu_tune.data.tokenize_options import TokenizeOptions
    from tpu_tune.errors import UserError

    for name, least in (("max_length", 2), ("num_eos", 0), ("workers", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least {least}")
    tokenizer = open_tokenizer(options.tokenizer_path)
    tokenize_options = TokenizeOptions(
        format=options.format,
        max_length=options.max_length,
        columns=columns(options),
        chat_template=chat.read_template(tokenizer, options.chat_template),
        chat_template_kwargs=template_variables(options),
        train_on_source=options.train_on_source,
        num_eos=options.num_eos,
        objective="",
    )
    report = tokenize_file(
        options.input_file, options.output_file, tokenizer, tokenize_options, options.workers, options.skip_bad
    )
    if options.json:
        print(json.dumps(report))
        return 0
    print(
        f"{report['output']}: {report['examples']:,} examples ({report['format']}) of {report['rows']:,} rows, "
        f"{report['tokens']:,} tokens, {report['target_tokens']:,} of them targets; {report['bytes'] / 1e6:,.2f} MB"
    )
    if report["split"]:
        print(f"{report['split']:,} texts cut into blocks of {report['max_length']} tokens")
    for reason, count in report["dropped"].items():
        print(f"{count:,} rows left out: {reason}")
    for key, count in report["unused"].items():
        print(f"'{key}' of {count:,} rows is not used: it is not in the text that is trained on")
    for note in report["notes"]:
        print(f"note: {note}")
    if report["bad_rows"]:
        print(f"{report['bad_rows']:,} bad rows left out, first {report['bad_examples'][0]}")
    return 0
