"""What decides the tokens of a row, besides the row and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tpu_tune.data import chat, preferences
from tpu_tune.data.labels import Labels
from tpu_tune.errors import UserError


@dataclass(frozen=True)
class TokenizeOptions:
    """How rows become tokens and a loss mask. Every field is part of the cache's key.

    Attributes:
      format: how rows are read, one of `formats.NAMES`; `auto` goes by the keys of each row.
      max_length: most tokens of an example.
      columns: the rows' own keys -> the format's keys.
      chat_template: the Jinja text itself, or name -> text of a tokenizer that has several.
      chat_template_kwargs: variables for the template; those of a row come first.
      response_markers: of plain text, strings after which the text is trained on.
      instruction_markers: of plain text, strings that end what is trained on.
      train_on_source: train on the prompt too.
      source_max_len: most tokens of a pair's prompt; 0 is no bound but `max_length`.
      target_max_len: most tokens of a pair's answer; 0 is no bound but `max_length`.
      skip_bad_rows: count rows that cannot be used, instead of stopping at the first.
      encoder_decoder: make pairs for an encoder-decoder model (`pairs`).
      drop_long: leave out pairs and chats that are too long, instead of cutting them.
      num_eos: end-of-text tokens after an answer or a text; those that it ends in already are counted.
      labels: what a classification's rows are labelled with; their texts are then read whole, up to `max_length`.
      pad_token: id that counts as padding where the last token of what is judged as a whole is looked for.
      always_bos: BOS before every pair's prompt, as QLoRA has it; else where the tokenizer adds it.
      objective: what the rows are for (`objective.name`), which decides what they may be; "": any rows.
    """

    format: str
    max_length: int
    columns: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    response_markers: tuple[str, ...] = ()
    instruction_markers: tuple[str, ...] = ()
    train_on_source: bool = False
    source_max_len: int = 0
    target_max_len: int = 0
    skip_bad_rows: bool = False
    encoder_decoder: bool = False
    drop_long: bool = False
    num_eos: int = 1
    always_bos: bool = False
    labels: Labels | None = None
    pad_token: int | None = None
    objective: str = "sft"

    @property
    def judges(self) -> bool:
        """Whether texts are judged as a whole: nothing in them is predicted."""
        return self.labels is not None or self.objective == "reward"

    @property
    def learns_from(self) -> str:
        """What rows the objective learns from; see `preferences.learns_from`."""
        return preferences.learns_from(self.objective)


def for_labels(options: TokenizeOptions, labels: Labels, pad_token: int | None) -> TokenizeOptions:
    """Return the options for rows that are labelled as a whole: the text as it is, without an EOS of ours.

    Raises:
      UserError: settings that say which words are trained on; none are.
    """
    if options.response_markers:
        raise UserError("data.response_markers: a classification has no loss on words; leave them out")
    return replace(options, train_on_source=True, num_eos=0, labels=labels, pad_token=pad_token)


def options_from_config(
    data: Any, tokenizer: Any, encoder_decoder: bool = False, objective: str = "sft"
) -> TokenizeOptions:
    """Return the options that `config.data` and `config.objective.name` give."""
    return TokenizeOptions(
        format=data.format,
        max_length=data.max_length,
        columns=dict(data.columns),
        chat_template=chat.read_template(tokenizer, data.chat_template),
        chat_template_kwargs=dict(data.chat_template_kwargs),
        response_markers=tuple(data.response_markers),
        instruction_markers=tuple(data.instruction_markers),
        train_on_source=data.train_on_source,
        source_max_len=data.source_max_len,
        target_max_len=data.target_max_len,
        skip_bad_rows=data.skip_bad_rows,
        encoder_decoder=encoder_decoder,
        always_bos=data.add_bos_token == "always",
        objective=objective,
    )
