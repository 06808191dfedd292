"""`tpu-tune data ingest`: files, folders, archives and named datasets to one file of rows."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands
from tpu_tune.cli.data.arguments import add_as, same_names
from tpu_tune.errors import counted

_FORMATS = (
    "html", "text", "markdown", "csv", "tsv", "jsonl", "json", "discord", "parquet", "arrow", "sql", "sqlite", "epub",
    "dictd",
)  # fmt: skip


class _For(argparse.Action):
    """`--for PATTERN`: what follows it holds for what the pattern means."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        namespace.for_files = {**namespace.for_files, values: namespace.for_files.get(values, {})}
        namespace.current = values


class _Own(argparse.Action):
    """An option that holds for all files, or for those of the last `--for`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        value = self.const if self.nargs == 0 else values
        pattern = getattr(namespace, "current", None)
        if pattern is None:
            setattr(namespace, self.dest, value)
        else:
            own = {**namespace.for_files[pattern], self.dest: value}
            namespace.for_files = {**namespace.for_files, pattern: own}


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    from tpu_tune.data.ingest.patterns import column_pairs

    return column_pairs(text)


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "ingest",
        run,
        "read files, folders, archives or a named dataset into one .jsonl of rows",
        "tpu-tune data ingest pages/ posts.csv dump.sql.gz --column body --output rows.jsonl",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="file, folder, pattern, archive (.zip, .tar, .tar.gz ...), compressed file (.gz, .bz2, .xz, .zst), "
        "tfds:NAME[/CONFIG], datasets:NAME[:CONFIG], or OWNER/NAME on the hub",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=".jsonl or .jsonl.gz to write; replaced if there"
    )
    parser.add_argument(
        "--format",
        action=_Own,
        default="auto",
        choices=("auto", *_FORMATS),
        metavar="KIND",
        help=f"how to read the files: {', '.join(_FORMATS)}; auto goes by their names",
    )
    some = parser.add_argument_group(
        "some files only",
        "Options of the next two groups, --format and --encoding hold for all files where they stand before the first\n"
        "  --for; behind one they hold for what it means. Of several patterns that mean a file the first counts.",
    )
    some.add_argument(
        "--for",
        action=_For,
        dest="for_files",
        default={},
        metavar="PATTERN",
        help="files, folders or archives, as in: --for '*.csv' --input-column q --output-column a",
    )
    some.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="do not read these; may be given several times",
    )
    _add_readers(parser)
    parser.add_argument(
        "--encoding",
        action=_Own,
        default="",
        metavar="NAME",
        help="encoding of text without a byte order mark; else HTML's is detected, and other files are UTF-8",
    )
    parser.add_argument(
        "--workers",
        type=numbers.whole(),
        default=0,
        metavar="N",
        help="processes; 0, the default: by size, up to one a core",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="count what cannot be read and go on; else it ends the run"
    )
    parser.add_argument(
        "--bad", default="", metavar="FILE", help=".jsonl for all that cannot be read, also where the run fails"
    )
    _add_limits(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits, against archives made to do harm")
    limits.add_argument(
        "--max-unpacked-gb",
        type=numbers.real(above=0),
        default=20.0,
        metavar="N",
        help="what one file may unpack to (default 20)",
    )
    limits.add_argument(
        "--max-ratio",
        type=numbers.real(above=0),
        default=300.0,
        metavar="N",
        help="how many times its size one may unpack to, past 64 MiB (default 300)",
    )
    limits.add_argument(
        "--max-depth", type=numbers.whole(1, 100), default=3, metavar="N", help="archives inside archives (default 3)"
    )


def _add_readers(parser: argparse.ArgumentParser) -> None:
    picks = parser.add_argument_group("tables and objects")
    picks.add_argument(
        "--column",
        action=_Own,
        default="",
        metavar="NAME",
        help="the column of tables, and of objects of no known format, that becomes text",
    )
    picks.add_argument("--input-column", action=_Own, default="", metavar="NAME", help="the column that becomes input")
    picks.add_argument(
        "--output-column", action=_Own, default="", metavar="NAME", help="the column that becomes output"
    )
    picks.add_argument(
        "--columns",
        action=_Own,
        dest="columns",
        type=_pairs,
        default=(),
        metavar="NAMES",
        help="columns to keep besides: a,b or a=new_name,b",
    )
    picks.add_argument(
        "--strip-html", action=_Own, nargs=0, const=True, default=False, help="turn cells from HTML into plain text"
    )
    picks.add_argument(
        "--table", action=_Own, default="", metavar="NAME", help="the table of a SQLite file or SQL dump"
    )
    picks.add_argument(
        "--split", action=_Own, default="train", metavar="NAME", help="the split of a named dataset (default train)"
    )
    add_as(picks)
    chats = parser.add_argument_group("chat exports")
    chats.add_argument(
        "--assistant",
        action=_Own,
        default="",
        metavar="NAME",
        help="whose words are the assistant's in a Discord channel",
    )
    chats.add_argument(
        "--gap-minutes",
        action=_Own,
        type=numbers.real(above=0),
        default=60.0,
        metavar="N",
        help="a silence that ends a conversation of a channel (default 60)",
    )
    chats.add_argument(
        "--keep-conversations",
        action=_Own,
        nargs=0,
        const=True,
        default=False,
        help="leave ShareGPT rows as conversations; else they become messages",
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.data.ingest import IngestOptions, ingest

    ingest_options = IngestOptions(
        **{**same_names(IngestOptions, options), "exclude": tuple(options.exclude)},
        max_unpacked_bytes=int(options.max_unpacked_gb * 1e9),
    )
    report = ingest(options.inputs, options.output, ingest_options, options.workers, bad=options.bad).as_dict()
    if options.json:
        print(json.dumps({"output": options.output, **report}, indent=2, ensure_ascii=False))
        return 0
    formats = ", ".join(f"{count:,} {name}" for name, count in report["formats"].items())
    print(f"{options.output}: {counted(report['rows'], 'row')} ({formats}) from {counted(report['sources'], 'source')}")
    if report["rewritten"]:
        print(
            f"  written as {options.as_format}: "
            + ", ".join(f"{count:,} {name}" for name, count in report["rewritten"].items())
            + "; a text is the words of an assistant whom nobody asks" * ("text" in report["rewritten"])
        )
    if report["bad"]:
        print(f"  {counted(report['bad'], 'bad one')} skipped, the first: {report['bad_examples'][0]}")
    if report["empty"]:
        print(f"  {report['empty']:,} without text left out")
    if report["excluded"]:
        print(f"  {report['excluded']:,} excluded")
    if report["passed_over"]:
        print("  files of no known kind: " + ", ".join(f"{n} {suffix}" for suffix, n in report["passed_over"].items()))
    return 0
