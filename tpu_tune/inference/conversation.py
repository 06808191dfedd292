"""A conversation with a model: its messages so far, and answers that come piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tpu_tune.checkpoints.prompts import CHAT
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import Sampling, encode_chat, stream_ids
from tpu_tune.inference.model import Model
from tpu_tune.inference.pieces import Pieces

_EVERY = 4  # tokens between two pieces: seldom enough for the device, often enough for the eye


@dataclasses.dataclass
class Conversation:
    """What was said to a model and what it answered; a model without a chat template is asked each time anew.

    Attributes:
      model: whom to ask.
      system: the system text, "" for the template's own.
      messages: `role` and `content` of each turn, user and assistant in turn.
      chat: whether to ask through the chat template; None: as the rows of its training did, see `Model.generate`.
    """

    model: Model
    system: str = ""
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    chat: bool | None = None

    def ask(self, text: str, sampling: Sampling) -> Iterator[str]:
        """Yield the answer to a user's text in pieces; once it is whole, or is not read further, it has been said.

        Raises:
          UserError: the chat template refuses the chat, or it is longer than the model has positions for.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        said = ""
        try:
            for piece in stream(self.model, self._encoded(asked), sampling):
                said += piece
                yield piece
        except UserError:
            raise  # nothing was asked then
        except BaseException:  # Ctrl-C too: what was said until then stays
            self._keep(asked, said)
            raise
        self._keep(asked, said)

    def take_back(self) -> str | None:
        """Take the last answer and its question back; return the question, or None where there is none."""
        if not self.messages:
            return None
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        return question

    @property
    def remembers(self) -> bool:
        """Whether the model is shown what was said before."""
        return remembers(self.model, self.chat)

    def _encoded(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self.remembers:
            return self.model.encode_prompt(messages[-1]["content"], self.chat)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return encode_chat(self.model.tokenizer, [*system, *messages], self.model.chat_template_kwargs)

    def _keep(self, asked: list[dict[str, str]], said: str) -> None:
        self.messages = [*asked, {"role": "assistant", "content": said.strip()}]


def remembers(model: Model, chat: bool | None) -> bool:
    """Whether a model is asked through its chat template, which shows it what was said before; see `Model.generate`."""
    through_template = model.taught in ("", CHAT) if chat is None else chat
    return through_template and model.architecture.encoder is None


def stream(model: Model, ids: list[int], sampling: Sampling) -> Iterator[str]:
    """Yield the text that follows a prompt's ids in pieces, whose sum is what `Model.generate` returns."""
    pieces = Pieces(model.tokenizer)
    for (answer,) in stream_ids(
        model.architecture, model.params, [ids], sampling, model.ends, model.dtype, min(_EVERY, sampling.max_new_tokens)
    ):
        yield pieces.add(answer[len(pieces.ids) :])
    yield pieces.rest()
