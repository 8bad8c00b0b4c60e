"""Server-sent events: `data: ` and a JSON object for each, `data: [DONE]` at the end (WHATWG HTML, section 9.2).

A client that goes away is noticed at once, also while there is nothing to send: the connection is listened to all the
time, and whoever makes the events is closed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fewbits.server.problems import Problem

T = TypeVar("T")
Event = dict[str, Any]


class GoneError(Exception):
    """The client went away."""


class EventStream(Response):
    """Events as they are made. gone: called where the client goes away before the end, or has not read it in `seconds`.

    The first event is waited for before anything is sent, so that a text which cannot be begun is answered with a
    status of its own; later the problem is an event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event], seconds: float, gone: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._events, self._seconds, self._gone = events, seconds, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await unless_gone(self._sent(send), receive)
        except (GoneError, OSError):  # a timeout is an OSError
            self._gone()
        finally:
            await self._events.aclose()

    async def _sent(self, send: Send) -> None:
        first = await anext(self._events)
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, _line(first))
        try:
            async for event in self._events:
                await _send(send, _line(event))
        except Problem as problem:
            await _send(send, _line(problem.body))
        else:
            await _send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """What some work comes to. Raises GoneError, and ends the work, where the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(event: Event) -> bytes:
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
