"""How a model was taught to be asked: through its chat template, in plain text, or with Stanford Alpaca's prompt.

It follows from the rows that a run was trained on, which its `summary.json` counts by their formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHAT, PLAIN, ALPACA = "chat", "plain", "alpaca"

# Where a written model keeps it: in config.json an object with this key, in a GGUF file `tpu_tune.taught_as`.
RECORD, KEY = "tpu_tune", "taught_as"

# Stanford Alpaca's own prompt. The variants that go about differ in what follows the last colon: nothing here, one
# space in qlora, a line break in axolotl and LLaMA-Factory.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_TURN_WITH_INPUT = "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
ALPACA_TURN = "\n\n### Instruction:\n{instruction}\n\n### Response:"


def taught_as(counts: Mapping[str, Any] | None) -> str:
    """Return how the rows of a set asked: `CHAT`, `PLAIN` or `ALPACA`, as most of them did; "" where that is not known.

    Plain text, which asks nothing, is `PLAIN` where there is nothing else.

    Args:
      counts: of a run's training rows, as in its summary: `format`, and with newer ones `formats`, `chats`, `pairs`.
    """
    counts = counts or {}
    formats = counts.get("formats")
    if not isinstance(formats, Mapping):
        formats = {str(counts.get("format") or "").removeprefix("tokenized").strip(): 1}
    formats = {name: count for name, count in formats.items() if name and isinstance(count, int)}
    chats, pairs = counts.get("chats"), counts.get("pairs")
    if not isinstance(chats, int) or not isinstance(pairs, int):
        chats = sum(count for name, count in formats.items() if _is_chat(name))
        pairs = sum(count for name, count in formats.items() if not _is_chat(name) and name != "text")
    if chats or pairs:
        return CHAT if chats >= pairs else ALPACA if 2 * formats.get("alpaca", 0) > pairs else PLAIN
    return PLAIN if formats else ""


def recorded(config: Mapping[str, Any]) -> str:
    """Return how the rows asked that a model was trained on, as its config says it; "" where it says nothing."""
    record = config.get(RECORD)
    form = record.get(KEY) if isinstance(record, Mapping) else None
    return form if form in (CHAT, PLAIN, ALPACA) else ""


def with_record(config: Mapping[str, Any], form: str) -> dict[str, Any]:
    """Return a config that says how the rows asked, in place of what it said before; nothing where `form` is ""."""
    kept = {key: value for key, value in config.items() if key != RECORD}
    return kept | ({RECORD: {KEY: form}} if form else {})


def _is_chat(format: str) -> bool:
    return format in ("messages", "sharegpt") or format.endswith("-as-chat")


def in_words(taught: str, prompt: str) -> str:
    """Put a prompt as the rows had it, where that is not through the chat template."""
    return ALPACA_WITHOUT_INPUT + ALPACA_TURN.format(instruction=prompt) if taught == ALPACA else prompt
