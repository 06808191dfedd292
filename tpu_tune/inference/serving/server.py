"""Running the server: warm-up, the socket, and an end that no client has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from tpu_tune import ctrl_c
from tpu_tune.errors import UserError
from tpu_tune.inference.generation import Sampling
from tpu_tune.inference.serving.app import Door, make_app
from tpu_tune.inference.serving.batch import EVERY
from tpu_tune.inference.serving.engine import Engine, Job, News

_FAREWELL = 5  # seconds for the last bytes of answers when the server ends
_MOST_CONNECTIONS = 1000
LOCAL = ("127.0.0.1", "localhost", "::1")


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens for the server.

    Raises:
      UserError: the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; take another one") from error
    return made


def warm_up(engine: Engine, say: Callable[[str], None]) -> None:
    """Let every model write a few tokens as one row and as many, so that common shapes are compiled before use."""
    for name in engine.models:
        begun = time.monotonic()
        for rows in (1, engine.limits.slots):
            news: queue.Queue[News] = queue.Queue()
            count = min(EVERY + 1, engine.limits.max_new_tokens, engine.limits.max_length - 1)
            jobs = [Job(name, [0], Sampling(count), None, news.put) for _ in range(rows)]
            for job in jobs:
                engine.submit([job])
            left = rows
            while left:
                told = news.get()
                if told.ended == "error":
                    raise UserError(f"{name} cannot write: {told.message}")
                left -= bool(told.ended)
        say(f"{name} is ready ({time.monotonic() - begun:.0f} s)")


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[None]:
    """Have the engine's thread run in a block."""
    engine.start()
    try:
        yield
    finally:
        engine.stop()
        engine.join(_FAREWELL)


def make_server(engine: Engine, door: Door) -> uvicorn.Server:
    """Return the server, which Ctrl-C or SIGTERM ends: answers that are being written end with an error."""
    config = uvicorn.Config(
        make_app(engine, door, int(time.time())),
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_FAREWELL,
    )
    server = uvicorn.Server(config)
    end = server.handle_exit

    def handle_exit(number: int, frame: Any) -> None:
        ctrl_c.heard()
        engine.stop()
        end(number, frame)

    server.handle_exit = handle_exit  # type: ignore[method-assign]
    return server


def serve(server: uvicorn.Server, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, which is raised again at the end."""
    asyncio.run(server.serve([listening]))
