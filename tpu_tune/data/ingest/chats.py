"""Chat exports to `messages` rows: a Discord channel, as DiscordChatExporter writes it in JSON.

(ShareGPT's `conversations` are rows as they are; `picking` turns them into `messages`.) A channel has no turns. An
author's consecutive messages are one turn, a long silence ends a conversation, and one author is the assistant: the one
named by `assistant`, or the channel's only bot, or, of two people, the one who answers.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tpu_tune.data.ingest.blobs import Tally, row_of
from tpu_tune.data.ingest.ingest_options import IngestOptions
from tpu_tune.errors import UserError

_SPOKEN = ("Default", "Reply", "0", "19")  # other types are notices: who joined, what was pinned


def is_discord(header: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Whether a JSON file is a Discord channel, by its head and its first message."""
    return "channel" in header and isinstance(first.get("author"), dict) and "timestamp" in first


def discord_rows(
    name: str, header: Mapping[str, Any], messages: Iterator[tuple[str, Any]], options: IngestOptions, tally: Tally
) -> Iterator[dict[str, Any]]:
    """Yield the conversations of a channel as `messages`, those in which somebody asks and the assistant answers.

    Args:
      messages: (where, message object), in the order of time.

    Raises:
      UserError: it is not plain who the assistant is; lists who writes.
    """
    channel = header.get("channel")
    channel = str(channel.get("name") or channel.get("id") or "") if isinstance(channel, dict) else ""
    title = f"{name}!{channel}" if channel else name
    authors: Counter = Counter()
    for number, turns in enumerate(_conversations(messages, options, tally, authors), start=1):
        chat = _chat(turns, options, title, authors)
        if chat:
            yield row_of(f"{title}:{number}", messages=chat)
        else:
            tally.empty += 1


def _conversations(
    messages: Iterator[tuple[str, Any]], options: IngestOptions, tally: Tally, authors: Counter
) -> Iterator[list[tuple[dict[str, Any], list[str]]]]:
    """Yield conversations as turns: (author, the texts written in a row)."""
    turns: list[tuple[dict[str, Any], list[str]]] = []
    last = None
    for where, message in messages:
        author, text = message.get("author"), message.get("content")
        try:
            time = datetime.datetime.fromisoformat(message["timestamp"])
        except (KeyError, TypeError, ValueError):
            time = None
        if not isinstance(author, dict) or not isinstance(text, str) or time is None:
            tally.skipped.add(where, "no message of a channel: it needs 'author', 'content' and 'timestamp'")
            continue
        if time.tzinfo is None:
            time = time.replace(tzinfo=datetime.UTC)
        if not text.strip() or str(message.get("type", "Default")) not in _SPOKEN:
            continue
        authors[_shown(author)] += 1
        if turns and last is not None and (time - last).total_seconds() > 60 * options.gap_minutes:
            yield turns
            turns = []
        last = time
        if turns and _id(turns[-1][0]) == _id(author):
            turns[-1][1].append(text.strip())
        else:
            turns.append((author, [text.strip()]))
    if turns:
        yield turns


def _chat(
    turns: list[tuple[dict[str, Any], list[str]]], options: IngestOptions, title: str, authors: Counter
) -> list[dict[str, str]]:
    """Turns as messages that begin with a user's and end with the assistant's; [] where there is no such part."""
    answers = _assistant(turns, options, title, authors)
    if answers is None:
        return []
    several = len({_id(author) for author, _ in turns} - {answers}) > 1
    chat: list[dict[str, str]] = []
    for author, texts in turns:
        role = "assistant" if _id(author) == answers else "user"
        text = "\n".join(texts)
        if role == "user" and several:
            text = f"{_shown(author)}: {text}"
        if chat and chat[-1]["role"] == role:
            chat[-1]["content"] += "\n" + text
        elif chat or role == "user":
            chat.append({"role": role, "content": text})
    if chat and chat[-1]["role"] == "user":
        chat.pop()
    return chat


def _assistant(
    turns: list[tuple[dict[str, Any], list[str]]], options: IngestOptions, title: str, authors: Counter
) -> str | None:
    """The id of the assistant in a conversation, None where it does not speak."""
    people = {_id(author): author for author, _ in turns}
    if options.assistant:
        names = {key: {author.get("name"), author.get("nickname"), author.get("id")} for key, author in people.items()}
        return next((key for key, known in names.items() if options.assistant in known), None)
    bots = [key for key, author in people.items() if author.get("isBot")]
    if len(bots) == 1:
        return bots[0]
    if len(people) == 2 and not bots:
        return list(people)[1]
    if len(people) < 2:
        return None
    listed = ", ".join(f"{name} ({count})" for name, count in authors.most_common(10))
    raise UserError(f"{title}: who is the assistant? give --assistant NAME; up to here write: {listed}")


def _id(author: Mapping[str, Any]) -> str:
    return str(author.get("id") or author.get("name"))


def _shown(author: Mapping[str, Any]) -> str:
    return str(author.get("nickname") or author.get("name") or author.get("id"))
