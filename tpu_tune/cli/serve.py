"""`tpu-tune serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os

from tpu_tune.cli import numbers
from tpu_tune.cli.common import Commands, say
from tpu_tune.cli.generate import add_loading
from tpu_tune.errors import UserError

KEY = "TPU_TUNE_API_KEY"


def add(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = commands.add(
        "serve",
        run,
        "answer the requests of OpenAI's API with a model and its adapters, and show a page to chat with them",
        "tpu-tune serve --model output/quickstart\n"
        "  tpu-tune serve --model model.gguf --adapter tuned=output/adapter --port 8080",
    )
    add_loading(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="PEFT adapter directory, or a run with one, served as a model NAME; may be given several times",
    )
    parser.add_argument("--name", help="name of the model (default: its file's or directory's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine's)")
    parser.add_argument("--port", type=numbers.whole(0, 65535), default=8000, help="port (default 8000; 0: any)")
    parser.add_argument(
        "--api-key", help=f"what requests must show; by default the environment variable {KEY}, or none"
    )
    parser.add_argument("--slots", type=numbers.whole(1, 1024), default=8, help="answers written at once (default 8)")
    parser.add_argument(
        "--queue", type=numbers.whole(), default=64, help="answers that may wait; more get status 429 (default 64)"
    )
    parser.add_argument(
        "--max-length", type=numbers.whole(2), default=2048, help="tokens of a prompt and its answer (default 2048)"
    )
    parser.add_argument(
        "--max-new-tokens", type=numbers.whole(1), default=1024, help="tokens of an answer (default 1024)"
    )
    parser.add_argument("--max-body", type=numbers.whole(1), default=2**20, help="bytes of a request (default 1048576)")
    parser.add_argument(
        "--timeout",
        type=numbers.real(above=0),
        default=600,
        help="seconds for an answer, its wait included (default 600)",
    )


def run(options: argparse.Namespace) -> int:
    """Run it; return the exit status."""
    try:
        from tpu_tune.inference.serving import server
    except ImportError as error:
        raise UserError(f"serve needs what `pip install 'tpu_tune[serve]'` brings ({error})") from error
    from tpu_tune.inference.serving.app import Door
    from tpu_tune.inference.serving.engine import Engine, Limits
    from tpu_tune.inference.serving.models import load_models

    if options.json:
        raise UserError("serve has no --json; its answers are JSON")
    key = options.api_key if options.api_key is not None else os.environ.get(KEY, "")
    if options.api_key == "":
        raise UserError("--api-key is empty; leave it out to let everybody in")
    local = options.host in server.LOCAL
    listening = server.bound(options.host, options.port)
    port = listening.getsockname()[1]
    models = load_models(options.model, options.adapter, options.dtype, options.quantize, options.step, options.name)
    most = min(
        [options.max_length, *(model.architecture.max_positions or options.max_length for model in models.values())]
    )
    limits = Limits(options.slots, options.queue, most, min(options.max_new_tokens, most - 1))
    engine = Engine(models, limits)
    with server.running(engine):
        server.warm_up(engine, say)
        door = Door(key, options.chat, server.LOCAL if local else (), options.max_body, options.timeout)
        at = f"http://{options.host if ':' not in options.host else f'[{options.host}]'}:{port}"
        say(f"serving {', '.join(models)} at {at}/v1, a page to chat at {at}/ ; Ctrl-C ends it")
        if not local and not key:
            say(f"warning: everybody who reaches {options.host} may ask; --api-key keeps others out")
        server.serve(server.make_server(engine, door), listening)
    return 0
