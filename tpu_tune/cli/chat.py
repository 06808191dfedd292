"""`tpu-tune chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from tpu_tune.cli.common import Commands
from tpu_tune.cli.generate import add_model, add_sampling, sampling_of
from tpu_tune.errors import UserError

HELP = {
    "/reset": "forget what was said",
    "/retry": "take the last answer back and ask again, with the next seed",
    "/system": "[TEXT] the system's words from now on, and forget what was said; without TEXT none",
    "/set": "[NAME VALUE] max_new_tokens, temperature, top_k, top_p or seed; alone: how they are set",
    "/help": "this list",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
QUOTES = '"""'  # around a text of several lines


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "chat",
        run,
        "talk to a model in the terminal",
        'tpu-tune chat --model model.gguf --system "Answer in one sentence."\n'
        "  tpu-tune chat --model output/quickstart --compare",
    )
    add_model(parser)
    parser.add_argument("--system", default="", help="the system's words before the chat")
    parser.add_argument(
        "--compare", action="store_true", help="answer without the adapter too, first that, then with it"
    )
    add_sampling(parser, max_new_tokens=512)


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    from tpu_tune.checkpoints.run_directory import RunDirectory
    from tpu_tune.inference.conversation import Conversation
    from tpu_tune.inference.run_model import load_any

    if options.json:
        raise UserError("a chat has no --json; tpu-tune generate --json answers prompts one by one")
    sampling = sampling_of(options)
    is_run, words = RunDirectory(options.model).exists(), (options.dtype, options.quantize)
    if options.compare and not (is_run or options.adapter):
        raise UserError("--compare sets a model beside the one before its training: --model a run, or give --adapter")
    models = {"": load_any(options.model, *words, options.adapter, step=options.step)}
    if options.compare:
        models = {"base": load_any(options.model, *words, before=is_run), "tuned": models[""]}
    speakers = {name: Conversation(model, options.system, chat=options.chat) for name, model in models.items()}
    talk = Talk(speakers, sampling)
    if not all(speaker.remembers for speaker in speakers.values()):
        print("note: asked without its chat template, a model sees each text by itself", file=sys.stderr)
    for text in _texts():
        if not respond(talk, text):
            break
    return 0


@dataclasses.dataclass
class Talk:
    """Who answers, by name ("" where it is one alone), and how."""

    speakers: dict[str, Any]
    sampling: Any


def respond(talk: Talk, text: str) -> bool:
    """Do what a text asks for, an answer or one of the commands in `HELP`; return whether the talk goes on."""
    word, _, rest = text.strip().partition(" ")
    try:
        if not word.startswith("/"):
            return not text.strip() or _answer(talk, text)
        if word not in HELP:
            raise UserError(f"{word} is no command; /help lists them")
        return _command(talk, word, rest.strip())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return True


def _command(talk: Talk, word: str, rest: str) -> bool:
    speakers = list(talk.speakers.values())
    if word in ("/reset", "/system"):
        for speaker in speakers:
            speaker.messages = []
            speaker.system = rest if word == "/system" else speaker.system
    elif word == "/retry":
        questions = [speaker.take_back() for speaker in speakers]
        if questions[0] is None:
            raise UserError("nothing was asked yet")
        talk.sampling = dataclasses.replace(talk.sampling, seed=talk.sampling.seed + 1)
        return _answer(talk, questions[0])
    elif word == "/set":
        talk.sampling = _set(talk.sampling, rest)
    elif word == "/help":
        print("\n".join(f"{name:9}{what}" for name, what in HELP.items()))
        print(f"{QUOTES:9}begins and ends a text of several lines")
    return word != "/exit"


def _set(sampling: Any, rest: str) -> Any:
    values, (name, _, value) = dataclasses.asdict(sampling), rest.partition(" ")
    if name and name not in values:
        raise UserError(f"/set {name}: choose {', '.join(values)}")
    if name:
        try:
            number = type(values[name])(value)
        except ValueError:
            raise UserError(f"/set {name} {value}: that is no number of its kind ({values[name]})") from None
        sampling = dataclasses.replace(sampling, **{name: number})
    print(" ".join(f"{name}={value}" for name, value in dataclasses.asdict(sampling).items()))
    return sampling


def _answer(talk: Talk, text: str) -> bool:
    """Print each speaker's answer as it comes; Ctrl-C stops it there."""
    for name, speaker in talk.speakers.items():
        try:
            print(f"[{name}] " if name else "", end="", flush=True)
            for piece in speaker.ask(text, talk.sampling):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)
    return True


def _texts() -> Iterator[str]:
    """Yield what the user types, or the lines of standard input; several of them between `QUOTES` as one text."""
    lines = _typed() if sys.stdin.isatty() else (line.rstrip("\n") for line in sys.stdin)
    for line in lines:
        if line.startswith(QUOTES):
            parts = [line.removeprefix(QUOTES)]
            while not parts[-1].endswith(QUOTES) and (more := next(lines, None)) is not None:
                parts.append(more)
            line = "\n".join(parts).removesuffix(QUOTES).strip("\n")
        yield line


def _typed() -> Iterator[str]:
    """Yield the lines typed at the terminal, with their history and completed commands, until Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    session: Any = PromptSession(completer=WordCompleter(list(HELP), sentence=True))
    print("/help lists the commands; Ctrl-D leaves.")
    while True:
        try:
            yield session.prompt("> ")
        except KeyboardInterrupt:
            continue  # a line that was begun is thrown away
        except EOFError:
            return
