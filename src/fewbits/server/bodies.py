"""Bodies of requests, read within bounds: of each one's size, of all of them together, and of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import Request

from fewbits.server.problems import Problem

SECONDS = 30.0
"""That a body may take to arrive."""
TOGETHER = 16
"""Bodies of the largest size that may be in memory at a time."""
DISCARDED = 4
"""Times the largest size that is read, and thrown away, of a body that is too large: a client that is still sending
does not see an answer."""


class Bodies:
    """largest: bytes of one body."""

    def __init__(self, largest: int) -> None:
        self.largest, self.together = largest, TOGETHER * largest
        self.held = 0

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, counted until the end of the context.

        Raises Problem: 415 for what does not call itself JSON, 413 for a body that is too large, 429 where too many
        are being read, 408 for one that does not arrive.
        """
        _require_json(request)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(SECONDS):
                async for part in request.stream():
                    self.held += len(part)
                    parts.append(part)
                    await self._require_room(request, sum(map(len, parts)))
            yield b"".join(parts)
        except TimeoutError:
            raise Problem(408, f"the body did not arrive within {SECONDS:g} seconds", code="body_timeout") from None
        finally:
            self.held -= sum(map(len, parts))

    async def _require_room(self, request: Request, size: int) -> None:
        size = max(size, int(request.headers.get("content-length", 0)))
        if size > self.largest:
            await _discard(request, DISCARDED * self.largest)
            message = f"the body has more than {self.largest} bytes; send less, or start the server with --max-body"
            raise Problem(413, message, code="body_too_large", headers={"Connection": "close"})
        if self.held > self.together:
            raise Problem(429, "too many large requests at a time; ask again in a moment", code="bodies_full")


def _require_json(request: Request) -> None:
    """A page of another origin can send what calls itself text without asking first; JSON it cannot."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type is '{kind or 'not given'}'; it must be application/json"
        raise Problem(415, message, code="unsupported_media_type")


async def _discard(request: Request, most: int) -> None:
    """Read on to the end, but no further than so many bytes, and keep nothing."""
    count = 0
    while count < most:
        message = await request.receive()
        count += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return
