"""What a request asks for: its fields held against the tables below; a field that would change the answer and is not
supported is refused, and so is one that is not known."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any

from tpu_tune.errors import UserError
from tpu_tune.inference.conversation import remembers
from tpu_tune.inference.generation import Sampling, encode_chat
from tpu_tune.inference.model import Model
from tpu_tune.inference.serving.batch import TOPS
from tpu_tune.inference.serving.engine import Limits
from tpu_tune.inference.serving.errors import ApiError, bad
from tpu_tune.models import check_length
from tpu_tune.models.values import FLAG, NOTHING, OBJECT, TEXT, Kind, listing, number, shown, whole

COMPLETION_TOKENS = 16  # of an answer to /v1/completions that names no length, as OpenAI has it
_MOST_CHOICES, _MOST_STOPS = 16, 4

_BOTH: dict[str, Kind] = {
    "model": TEXT,
    "max_tokens": whole(1, 2**31 - 1),
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": whole(-1, 2**31 - 1),
    "seed": whole(-(2**63), 2**64 - 1),
    "n": whole(1, _MOST_CHOICES),
    "stop": TEXT | listing(TEXT),
    "stream": FLAG,
    "stream_options": OBJECT,
}
CHAT = _BOTH | {
    "messages": listing(OBJECT),
    "max_completion_tokens": whole(1, 2**31 - 1),
    "logprobs": FLAG,
    "top_logprobs": whole(0, TOPS),
    "chat_template_kwargs": OBJECT,
}
_TOKENS = listing(whole(0, 2**31 - 1))
COMPLETION = _BOTH | {
    "prompt": TEXT | listing(TEXT) | _TOKENS | listing(_TOKENS),
    "logprobs": whole(0, TOPS),
    "echo": FLAG,
}
# Fields that say nothing about the answer.
_ASIDE = {
    "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Fields that are not supported, with the values at which they change nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "min_tokens": (0,),
    "logit_bias": ({},), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (), "store": (False,),
    "suffix": ("",), "best_of": (1,), "ignore_eos": (False,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request in our words.

    Attributes:
      model: the model's name.
      prompts: token ids of each prompt; a chat is one.
      texts: with `echo`, the text before each prompt's answer.
      sampling: how tokens are chosen; the seed is that of the first answer, the next ones count on.
      choices: answers to each prompt.
      stops: texts that end an answer.
      tops: how many alternatives' log-probabilities come with each token; None: no log-probabilities.
      stream: whether pieces are sent as they come.
      usage: whether the stream ends with the number of tokens.
    """

    model: str
    prompts: list[list[int]]
    texts: list[str]
    sampling: Sampling
    choices: int
    stops: tuple[str, ...]
    tops: int | None
    stream: bool
    usage: bool


def model_of(body: Any, models: Mapping[str, Model]) -> str:
    """Return the name of the model that a request's body names.

    Raises:
      ApiError: it is no object, or names none of ours.
    """
    if not isinstance(body, Mapping):
        raise ApiError(400, "the body is not a JSON object")
    name = body.get("model")
    if name is None:
        raise bad("model", "is missing")
    if name not in models if isinstance(name, str) else True:
        known = ", ".join(models)
        raise ApiError(404, f"there is no model {shown(name)}; there is {known}", "model", "model_not_found")
    return name


def read_chat(body: Any, models: Mapping[str, Model], limits: Limits, chat: bool | None) -> Asked:
    """Read the body of a request to /v1/chat/completions.

    Args:
      body: the parsed JSON.
      models: by name.
      limits: of tokens.
      chat: whether models are asked through their chat template; None: as they were taught, see `Model.generate`.

    Raises:
      ApiError: something in it is wrong or not supported.
    """
    name = model_of(body, models)
    fields = _checked(body, CHAT)
    if "messages" not in fields:
        raise bad("messages", "is missing")
    if fields.get("top_logprobs") is not None and not fields.get("logprobs"):
        raise bad("top_logprobs", "needs 'logprobs': true")
    prompt = _encoded(models[name], [_message(*one) for one in enumerate(fields["messages"])], fields, chat)
    most = fields.get("max_completion_tokens", fields.get("max_tokens"))
    tops = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    return _asked(name, models[name], fields, [prompt], most, tops, limits)


def read_completion(body: Any, models: Mapping[str, Model], limits: Limits) -> Asked:
    """Read the body of a request to /v1/completions; see `read_chat`."""
    name = model_of(body, models)
    fields, model = _checked(body, COMPLETION), models[name]
    prompts = fields.get("prompt")
    if prompts is None:
        raise bad("prompt", "is missing")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    encoded = [model.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if not encoded or not all(encoded):
        raise bad("prompt", "is empty; an answer needs at least one token to go on from")
    if any(token >= model.architecture.vocab_size for prompt in encoded for token in prompt):
        raise bad("prompt", f"has a token beyond the model's vocabulary of {model.architecture.vocab_size}")
    if fields.get("echo") and fields.get("logprobs") is not None:
        raise bad("echo", "is not supported together with 'logprobs'")
    asked = _asked(
        name, model, fields, encoded, fields.get("max_tokens", COMPLETION_TOKENS), fields.get("logprobs"), limits
    )
    if not fields.get("echo"):
        return asked
    texts = [
        prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt, skip_special_tokens=True)
        for prompt in prompts
    ]
    return dataclasses.replace(asked, texts=texts)


def _checked(body: Mapping[str, Any], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the fields that were given, each of its kind; null is as good as not given."""
    fields = {name: value for name, value in body.items() if value is not None and name not in _ASIDE}
    for name, value in fields.items():
        if name in kinds:
            if not (kinds[name] | NOTHING).holds(value):
                raise bad(name, f"is {shown(value)}; it must be {kinds[name].words}")
        elif name in _NOTHING:
            if not any(value == nothing and type(value) is not bool or value is nothing for nothing in _NOTHING[name]):
                raise bad(name, f"is not supported ({shown(value)} was given); leave it out", "unsupported_parameter")
        else:
            raise bad(str(name)[:100], "is not a parameter that this server knows", "unknown_parameter")
    return {name: value for name, value in fields.items() if name in kinds}


def _message(place: int, message: Mapping[str, Any]) -> dict[str, str]:
    """Return a message as a chat template takes it: role and text."""
    where = f"messages[{place}]"
    for name, value in message.items():
        if name not in ("role", "content") and value:
            raise bad(f"{where}.{name}", "is not supported; give role and content", "unsupported_parameter")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise bad(f"{where}.role", f"is {shown(role)}; it must be one of system, developer, user, assistant")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise bad(f"{where}.content", "has a part that is not text; this server reads text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise bad(f"{where}.content", f"is {shown(content)}; it must be text, or a list of parts of type text")
    return {"role": "system" if role == "developer" else role, "content": content}


def _encoded(model: Model, messages: list[dict[str, str]], fields: Mapping[str, Any], chat: bool | None) -> list[int]:
    if not messages:
        raise bad("messages", "is empty")
    variables = fields.get("chat_template_kwargs", {})
    if not remembers(model, chat):
        if len(messages) > 1 or messages[0]["role"] != "user" or variables:
            raise bad(
                "messages",
                "must be one user's message: this model was taught in plain text and sees each text by itself; ask "
                "/v1/completions, or start the server with --chat",
            )
        return model.encode_prompt(messages[0]["content"], chat)
    try:
        return encode_chat(model.tokenizer, messages, {**model.chat_template_kwargs, **variables})
    except UserError as error:
        raise ApiError(400, str(error).replace("--no-chat", "/v1/completions"), "messages") from error


def _asked(
    name: str,
    model: Model,
    fields: Mapping[str, Any],
    prompts: list[list[int]],
    most: int | None,
    tops: int | None,
    limits: Limits,
) -> Asked:
    """Put together what both kinds of request have."""
    longest = max(map(len, prompts))
    if most is not None and most > limits.max_new_tokens:
        raise bad("max_tokens", f"is {most}; this server writes at most {limits.max_new_tokens} tokens an answer")
    if longest + (most or 1) > limits.max_length:
        raise ApiError(
            400,
            f"the prompt has {longest} tokens and the answer may have {most or 1}: together more than the "
            f"{limits.max_length} tokens of this server; shorten one of them",
            "messages" if "messages" in fields else "prompt",
            "context_length_exceeded",
        )
    most = most or min(limits.max_new_tokens, limits.max_length - longest)
    try:
        check_length(model.architecture, longest + most)
    except UserError as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from error
    stops = fields.get("stop", ())
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if len(stops) > _MOST_STOPS or not all(stops):
        raise bad("stop", f"must be at most {_MOST_STOPS} texts, none of them empty")
    options = fields.get("stream_options", {})
    if options and not fields.get("stream"):
        raise bad("stream_options", "needs 'stream': true")
    for option in options.keys() - {"include_usage", "include_obfuscation"}:
        raise bad(f"stream_options.{option}", "is not a parameter that this server knows", "unknown_parameter")
    sampling = Sampling(
        max_new_tokens=most,
        temperature=fields.get("temperature", 1.0),
        top_k=max(fields.get("top_k", 0), 0),
        top_p=fields.get("top_p", 1.0),
        seed=fields["seed"] % 2**32 if "seed" in fields else secrets.randbits(32),
    )
    return Asked(
        name,
        prompts,
        [""] * len(prompts),
        sampling,
        fields.get("n", 1),
        stops,
        tops,
        bool(fields.get("stream")),
        bool(options.get("include_usage")),
    )
