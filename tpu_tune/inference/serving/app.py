"""The server: an ASGI application over an engine, with the API's paths, its errors and the web page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tpu_tune.inference.serving.answers import Answer, Part, Writer, event
from tpu_tune.inference.serving.asked import Asked, model_of, read_chat, read_completion
from tpu_tune.inference.serving.engine import Busy, Engine, Job, News, Stopped
from tpu_tune.inference.serving.errors import ApiError

log = logging.getLogger(__name__)

_BODY_SECONDS = 30.0  # to send a request's body
_PAGE_RULES = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Door:
    """Who may come in and with what.

    Attributes:
      api_key: what requests must carry as `Authorization: Bearer KEY`; "" lets everybody in.
      chat: whether models are asked through their chat template; None: as they were taught.
      hosts: what the Host header may say; empty: anything. It keeps web pages off whose own name leads to this address.
      max_body: bytes of a request's body.
      timeout: seconds until an answer must be whole, its wait in the queue included.
    """

    api_key: str = ""
    chat: bool | None = None
    hosts: tuple[str, ...] = ()
    max_body: int = 2**20
    timeout: float = 600.0


def make_app(engine: Engine, door: Door, created: int = 0) -> Starlette:
    """Return the ASGI application; `created`: when the models were loaded, in seconds since 1970."""

    def models() -> list[dict[str, Any]]:
        return [{"id": name, "object": "model", "created": created, "owned_by": "tpu_tune"} for name in engine.models]

    async def list_models(request: Request) -> Response:
        _let_in(request, door)
        return JSONResponse({"object": "list", "data": models()})

    async def one_model(request: Request) -> Response:
        _let_in(request, door)
        name = model_of({"model": request.path_params["name"]}, engine.models)
        return JSONResponse(next(model for model in models() if model["id"] == name))

    async def chat(request: Request) -> Response:
        asked = read_chat(await _body(request, door), engine.models, engine.limits, door.chat)
        return await _answered(request, engine, asked, True, door.timeout)

    async def complete(request: Request) -> Response:
        asked = read_completion(await _body(request, door), engine.models, engine.limits)
        return await _answered(request, engine, asked, False, door.timeout)

    async def health(request: Request) -> Response:
        running, waiting = engine.load()
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def page(request: Request) -> Response:
        text = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_RULES, "Cache-Control": "no-store"})

    return Starlette(
        routes=[
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/health", health),
            Route("/", page),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(door.hosts))] if door.hosts else [],
        exception_handlers={ApiError: _refused, HTTPException: _not_found, Exception: _failed},
    )


def _let_in(request: Request, door: Door) -> None:
    """Refuse a request without the key.

    Raises:
      ApiError: 401.
    """
    if not door.api_key:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), door.api_key.encode()):
        said = "is wrong" if key else "is missing"
        raise ApiError(
            401,
            f"the API key {said}; send the header 'Authorization: Bearer KEY' with the key of --api-key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def _body(request: Request, door: Door) -> Any:
    """Return the JSON of a request's body.

    Raises:
      ApiError: no key, too large, too slow, or no JSON.
    """
    _let_in(request, door)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a web page of another site cannot send unasked
        raise ApiError(415, f"the Content-Type is '{kind[:60]}'; it must be application/json")
    content = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                content += piece
                if len(content) > door.max_body:
                    raise ApiError(
                        413,
                        f"the body is larger than the {door.max_body} bytes that this server reads (--max-body)",
                        code="request_too_large",
                        headers={"Connection": "close"},
                    )
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:g} seconds", code="timeout") from None
    try:
        return json.loads(bytes(content))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({' '.join(str(error).split())[:100]})") from error


async def _answered(request: Request, engine: Engine, asked: Asked, chat: bool, timeout: float) -> Response:
    """Answer a request, whole or as a stream."""
    work = Work(engine, asked)
    writer = Writer(asked, chat)
    if asked.stream:
        return StreamingResponse(
            _events(work, writer, timeout),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    gone = asyncio.ensure_future(_gone(request))
    whole = asyncio.ensure_future(_collected(work, timeout))
    try:
        await asyncio.wait({gone, whole}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=499)  # which nobody reads
        return JSONResponse(writer.whole(await whole, work.count))
    finally:
        work.cancel()
        gone.cancel()
        whole.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collected(work: Work, timeout: float) -> list[list[Part]]:
    parts: list[list[Part]] = [[] for _ in work.answers]
    async for place, part in work.parts(timeout):
        parts[place].append(part)
    return parts


async def _events(work: Work, writer: Writer, timeout: float) -> AsyncIterator[bytes]:
    """Yield the events of a stream; whoever stops reading lets go of its answers."""
    try:
        begun = set()
        async for place, part in work.parts(timeout):
            first = place not in begun
            begun.add(place)
            if first or part.text or part.tokens or part.finish:
                yield event(writer.chunk(place, part, first))
        if work.asked.usage:
            yield event(writer.last_chunk(work.count))
        yield event("[DONE]")
    except ApiError as error:  # the status is sent already
        yield event(error.body)
    finally:
        work.cancel()


class Work:
    """A request's answers in the making.

    Args:
      engine: who writes them.
      asked: the request; its jobs are in the engine's queue from here on.

    Raises:
      ApiError: the queue is full, or the server is shutting down.
    """

    def __init__(self, engine: Engine, asked: Asked):
        self.asked = asked
        tokenizer = engine.models[asked.model].tokenizer
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue()
        total = len(asked.prompts) * asked.choices
        most = engine.limits.slots + engine.limits.queue
        if total > most:
            raise ApiError(400, f"{total} answers at once are more than the {most} that this server takes on")
        self.answers = [Answer(tokenizer, asked.stops, asked.tops) for _ in range(total)]

        def emit(place: int) -> Callable[[News], None]:
            def told(news: News) -> None:
                with contextlib.suppress(RuntimeError):  # the server is gone
                    loop.call_soon_threadsafe(self._news.put_nowait, (place, news))

            return told

        def job(place: int) -> Job:
            which, choice = divmod(place, asked.choices)
            sampling = dataclasses.replace(asked.sampling, seed=(asked.sampling.seed + choice) % 2**32)
            return Job(asked.model, asked.prompts[which], sampling, asked.tops, emit(place))

        self._jobs = [job(place) for place in range(total)]
        try:
            engine.submit(self._jobs)
        except Busy:
            message = "the server has as many requests as it takes on; ask again in a few seconds"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "2"}) from None
        except Stopped:
            raise ApiError(503, "the server is shutting down") from None

    @property
    def count(self) -> int:
        """Tokens of the answers so far."""
        return sum(answer.count for answer in self.answers)

    async def parts(self, timeout: float) -> AsyncIterator[tuple[int, Part]]:
        """Yield (answer, part) until all answers are whole.

        Raises:
          ApiError: the engine failed, or they take longer than `timeout` seconds.
        """
        end, left = asyncio.get_running_loop().time() + timeout, len(self.answers)
        while left:
            try:
                async with asyncio.timeout_at(end):
                    place, news = await self._news.get()
            except TimeoutError:
                raise ApiError(504, f"the answer took longer than {timeout:g} seconds", code="timeout") from None
            if news.ended == "error":
                raise ApiError(500, news.message)
            answer = self.answers[place]
            if answer.finish:  # it was stopped by a text of its own, which the engine learns of late
                continue
            yield place, answer.take(news)
            if answer.finish:
                self._jobs[place].cancelled = True
                left -= 1

    def cancel(self) -> None:
        """Let go of what is still being written."""
        for job in self._jobs:
            job.cancelled = True


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    wanted = f"{request.method} {request.url.path[:100]}"
    return await _refused(request, ApiError(error.status_code, f"{wanted}: {error.detail.lower()}"))


async def _failed(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return await _refused(request, ApiError(500, f"the server failed ({type(error).__name__})"))
