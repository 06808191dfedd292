"""`tpu-tune data clean`: drop or cut noise, duplicates and rows out of bounds; repair and mask texts."""

from __future__ import annotations

import argparse
import json

from tpu_tune.checkpoints import json_text
from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands
from tpu_tune.cli.data.arguments import add_as, same_names
from tpu_tune.errors import UserError


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "clean",
        run,
        "drop or cut noise, duplicates and rows out of bounds; repair and mask texts",
        "tpu-tune data clean raw.jsonl --output clean.jsonl --refusals --near-duplicates 0.8 --report report.json",
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="JSON Lines files, gzipped or not, in this order")
    parser.add_argument("--output", metavar="FILE", help="JSON Lines file to write; appears when all is done")
    parser.add_argument("--report", metavar="FILE", help="JSON file for every rule's hits, with examples")
    parser.add_argument("--dry-run", action="store_true", help="show the report and write nothing")
    parser.add_argument("--skip-bad", action="store_true", help="count rows that cannot be read and go on without them")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--format", default="auto", help="of the rows; default: told from the keys of each row")
    rows.add_argument(
        "--columns",
        dest="rows_columns",
        metavar="JSON",
        help="the rows' keys -> the format's, as '{\"question\": \"input\"}'",
    )
    add_as(rows)
    _add_noise(parser)
    _add_duplicates(parser)
    _add_bounds(parser)
    _add_repairs(parser)


def _add_noise(parser: argparse.ArgumentParser) -> None:
    noise = parser.add_argument_group(
        "noise",
        "Phrases are found whatever their case, white space and kind of apostrophe, in what is trained on:\n"
        "  the text of plain rows, the answers of others. By default: the three of the guide.",
    )
    noise.add_argument(
        "--action",
        choices=("drop", "truncate"),
        default="drop",
        help="leave the row out (default), or cut its text where the sentence with the match begins and drop what "
        "comes after it in a chat; a row without an answer left is dropped",
    )
    noise.add_argument("--refusals", action="store_true", help="look for a wider list of refusals too")
    noise.add_argument(
        "--single-words",
        action="store_true",
        help='look for single words too ("ethical", "OpenAI"...): drops many good rows',
    )
    noise.add_argument(
        "--phrases",
        dest="phrase_files",
        metavar="FILE",
        action="append",
        default=[],
        help="look for the phrases of a file too, one a line, # for comments; may be given several times",
    )
    noise.add_argument(
        "--pattern",
        metavar="REGEX",
        action="append",
        default=[],
        help="look for a regular expression too, case counts unless it has (?i); may be given several times",
    )
    noise.add_argument(
        "--default-phrases",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for the guide's phrases (default)",
    )
    noise.add_argument(
        "--repeated-text",
        metavar="SHARE",
        type=numbers.real(above=0, at_most=1),
        help="take out lines that stand at the top or the bottom of this share or more of a site's pages, such as "
        "footers; 0.5 is usual. A site is a folder of the rows' source, or of their url",
    )
    noise.add_argument(
        "--prompts", action="store_true", help="look into prompts and context too; a match there drops the row"
    )


def _add_duplicates(parser: argparse.ArgumentParser) -> None:
    duplicates = parser.add_argument_group("duplicates", "The first of its like stays.")
    duplicates.add_argument(
        "--exact-duplicates",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="drop rows with the same roles and texts, white space apart (default)",
    )
    duplicates.add_argument(
        "--near-duplicates",
        metavar="SIMILARITY",
        type=numbers.real(above=0, at_most=1),
        help="drop rows whose shingles have this Jaccard similarity or more with an earlier row's; 0.8 is usual",
    )
    duplicates.add_argument(
        "--shingle", choices=("chars", "words"), default="chars", help="what a shingle is made of (default chars)"
    )
    duplicates.add_argument(
        "--shingle-size", type=numbers.whole(), default=5, metavar="N", help="how many of them (default 5)"
    )
    duplicates.add_argument(
        "--seed", type=numbers.seed, default=0, help="of the hashes that find near duplicates (default 0)"
    )


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    bounds = parser.add_argument_group("bounds", "On the whole text of a row, prompt and answer together.")
    bounds.add_argument(
        "--drop-empty", action="store_true", help="drop rows whose answers are all empty; nothing is learnt from them"
    )
    bounds.add_argument(
        "--min-chars", type=numbers.whole(), default=0, metavar="N", help="drop rows with fewer characters"
    )
    bounds.add_argument("--max-chars", type=numbers.whole(), metavar="N", help="drop rows with more characters")
    bounds.add_argument("--min-words", type=numbers.whole(), default=0, metavar="N", help="drop rows with fewer words")
    bounds.add_argument("--max-words", type=numbers.whole(), metavar="N", help="drop rows with more words")
    bounds.add_argument(
        "--language",
        metavar="CODE",
        action="append",
        default=[],
        help="drop rows in other languages (ISO 639: en, or en,de); rows too short to tell, and code, stay",
    )


def _add_repairs(parser: argparse.ArgumentParser) -> None:
    repairs = parser.add_argument_group("repairs", "Of the texts that the format names; other keys stay as they are.")
    repairs.add_argument("--fix-unicode", action="store_true", help="repair mojibake and broken characters")
    repairs.add_argument("--mask-email", action="store_true", help="write [EMAIL] for e-mail addresses")
    repairs.add_argument("--mask-phone", action="store_true", help="write [PHONE] for phone numbers")
    repairs.add_argument(
        "--phone-region",
        default="US",
        metavar="CODE",
        help='country whose numbers are known without +, as in GB; "" for none (default US)',
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.data.clean import CleanOptions, clean, read_phrases, table

    lists = [
        name
        for name, asked in (
            ("guide", options.default_phrases),
            ("refusals", options.refusals),
            ("single-words", options.single_words),
        )
        if asked
    ]
    rules = CleanOptions(
        **same_names(CleanOptions, options),
        lists=tuple(lists),
        phrases=tuple(phrase for file in options.phrase_files for phrase in read_phrases(file)),
        patterns=tuple(options.pattern),
        languages=tuple(code for codes in options.language for code in codes.split(",") if code),
        columns=_columns(options.rows_columns),
    )
    figures = clean(
        options.inputs,
        options.output,
        rules,
        skip_bad=options.skip_bad,
        dry_run=options.dry_run,
        report=options.report,
    )
    if options.json:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    else:
        print(table(figures))
        print("nothing was written (--dry-run)" if options.dry_run else f"wrote {options.output}")
    return 0


def _columns(text: str | None) -> dict[str, str]:
    if not text:
        return {}
    try:
        columns = json_text.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'--columns: not valid JSON ({error.msg}); write it as \'{{"question": "input"}}\'') from error
    if not isinstance(columns, dict) or not all(isinstance(name, str) for name in columns.values()):
        raise UserError('--columns: must be an object of names, as \'{"question": "input"}\'')
    return columns
