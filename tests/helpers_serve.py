"""What the tests of `tpu-tune serve` share: a server in a thread, and clients of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

from tpu_tune.inference.serving.app import Door  # noqa: E402
from tpu_tune.inference.serving.engine import Engine, Limits  # noqa: E402
from tpu_tune.inference.serving.server import bound, make_server, serve  # noqa: E402

HOST, OPEN = "127.0.0.1", Door()


@contextlib.contextmanager
def served(engine: Engine, door: Door = OPEN) -> Iterator[str]:
    """Have an engine's server run in a thread; the value is its address. The engine is whoever's made it."""
    listening = bound(HOST, 0)
    server = make_server(engine, door)
    thread = threading.Thread(target=serve, args=(server, listening))
    thread.start()
    try:
        yield f"http://{HOST}:{listening.getsockname()[1]}"
    finally:
        engine.stop()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def client(address: str, key: str = "none", **options: Any) -> Any:
    """Return an `openai` client that asks once."""
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, **{"max_retries": 0, "timeout": 900} | options)


__all__ = ["Door", "Engine", "Limits", "client", "openai", "served"]
