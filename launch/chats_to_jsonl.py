"""Turn ChatterBot's .yml conversations into one .jsonl file of chats, a row a conversation.

    python launch/chats_to_jsonl.py FOLDER_OF_YML OUTPUT.jsonl

A conversation is a list of turns that alternate between the user and the assistant. A last turn of the user is dropped,
because nothing answers it; what is then empty, written in another way, or said before word for word, is left out.
The order is that of the files' names and of their lines, so that the same files always give the same bytes.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections import Counter

import yaml


def messages(turns: object) -> list[dict[str, str]]:
    """Return a conversation as chat messages, user first and assistant last; [] where it cannot be one."""
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        return []
    turns = [turn.strip() for turn in turns]
    turns = turns[: len(turns) // 2 * 2]
    if not all(turns):
        return []
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def convert(source: pathlib.Path, target: pathlib.Path) -> Counter:
    """Write the chats of every .yml file in `source` to `target` (aside, then renamed), and return the counts.

    Raises:
      ValueError: there is no .yml file, one cannot be read, or no conversation is left.
    """
    files = sorted(source.glob("*.yml"))
    if not files:
        raise ValueError(f"{source}: no .yml file is there")
    counts = Counter(files=len(files))
    rows: dict[str, None] = {}  # keeps the order, and each row once
    for file in files:
        try:
            # The base loader leaves every scalar as text: an answer may be "Yes" or "22".
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
            conversations = content["conversations"]
        except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a file of conversations ({error})") from error
        for turns in conversations:
            counts["conversations"] += 1
            chat = messages(turns)
            row = json.dumps({"messages": chat}, ensure_ascii=False)
            if not chat:
                counts["unusable"] += 1
            elif row in rows:
                counts["repeated"] += 1
            else:
                rows[row] = None
                counts["turns"] += len(chat)
    if not rows:
        raise ValueError(f"{source}: no conversation with an answer is there")
    counts["kept"] = len(rows)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        aside.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return counts


def main(arguments: list[str]) -> int:
    """Convert what the command line names, print the counts, and return the exit status."""
    if len(arguments) != 2:
        print("usage: chats_to_jsonl.py FOLDER_OF_YML OUTPUT.jsonl", file=sys.stderr)
        return 2
    source, target = map(pathlib.Path, arguments)
    try:
        counts = convert(source, target)
    except (ValueError, OSError) as error:
        print(f"chats_to_jsonl: {error}", file=sys.stderr)
        return 1
    print(
        f"{target}: {counts['kept']} chats, {counts['turns']} messages, from {counts['conversations']} conversations "
        f"in {counts['files']} files ({counts['repeated']} repeated, {counts['unusable']} unusable)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
