"""`tpu-tune data ingest`: files, folders, archives and named datasets to one file of rows."""

from __future__ import annotations

import argparse
import json

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands
from tpu_tune.cli.data.arguments import same_names

_FORMATS = (
    "html", "text", "markdown", "csv", "tsv", "jsonl", "json", "discord", "parquet", "arrow", "sql", "sqlite", "epub",
    "dictd",
)  # fmt: skip


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
        default="auto",
        choices=("auto", *_FORMATS),
        metavar="KIND",
        help=f"how to read the files: {', '.join(_FORMATS)}; auto goes by their names",
    )
    picks = parser.add_argument_group("tables and objects")
    picks.add_argument("--column", default="", metavar="NAME", help="the column that becomes text")
    picks.add_argument("--input-column", default="", metavar="NAME", help="the column that becomes input")
    picks.add_argument("--output-column", default="", metavar="NAME", help="the column that becomes output")
    picks.add_argument(
        "--columns",
        dest="kept_columns",
        default="",
        metavar="NAMES",
        help="columns to keep besides: a,b or a=new_name,b",
    )
    picks.add_argument("--table", default="", metavar="NAME", help="the table of a SQLite file or SQL dump")
    picks.add_argument("--split", default="train", metavar="NAME", help="the split of a named dataset (default train)")
    chats = parser.add_argument_group("chat exports")
    chats.add_argument(
        "--assistant", default="", metavar="NAME", help="whose words are the assistant's in a Discord channel"
    )
    chats.add_argument(
        "--gap-minutes",
        type=numbers.real(above=0),
        default=60.0,
        metavar="N",
        help="a silence that ends a conversation of a channel (default 60)",
    )
    chats.add_argument(
        "--keep-conversations",
        action="store_true",
        help="leave ShareGPT rows as conversations; else they become messages",
    )
    parser.add_argument(
        "--encoding",
        default="",
        metavar="NAME",
        help="encoding of text; else HTML's is detected, other files are UTF-8 or have a byte order mark",
    )
    parser.add_argument(
        "--workers",
        type=numbers.whole(),
        default=0,
        metavar="N",
        help="processes; 0, the default: by size, up to one a core",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="count what cannot be read and go on; else the first ends it"
    )
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


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.data.ingest import IngestOptions, ingest
    from tpu_tune.data.ingest.encodings import is_text_encoding
    from tpu_tune.errors import UserError

    if options.encoding and not is_text_encoding(options.encoding):
        raise UserError(f"--encoding {options.encoding} is unknown; e.g. utf-8, cp1252, shift_jis")
    columns = []
    for word in filter(None, (word.strip() for word in options.kept_columns.split(","))):
        old, _, new = word.partition("=")
        columns.append((old, new or old))
    ingest_options = IngestOptions(
        **same_names(IngestOptions, options),
        columns=tuple(columns),
        max_unpacked_bytes=int(options.max_unpacked_gb * 1e9),
    )
    report = ingest(options.inputs, options.output, ingest_options, options.workers).as_dict()
    if options.json:
        print(json.dumps({"output": options.output, **report}, indent=2, ensure_ascii=False))
        return 0
    formats = ", ".join(f"{count:,} {name}" for name, count in report["formats"].items())
    print(f"{options.output}: {report['rows']:,} rows ({formats}) from {report['sources']:,} sources")
    if report["bad"]:
        print(f"  {report['bad']:,} bad ones skipped, the first: {report['bad_examples'][0]}")
    if report["empty"]:
        print(f"  {report['empty']:,} without text left out")
    if report["passed_over"]:
        print("  files of no known kind: " + ", ".join(f"{n} {suffix}" for suffix, n in report["passed_over"].items()))
    return 0
