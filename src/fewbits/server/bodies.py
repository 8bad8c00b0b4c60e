"""Bodies of requests, read within bounds: of each one's size, of all of them together, and of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.requests import Request

from fewbits.server.problems import Problem

SECONDS = 30.0
"""That a body may take to arrive."""
TOGETHER = 16
"""Bodies of the largest size that may be in memory at a time."""
DISCARDED = 4
"""Times the largest size that is read, and thrown away, of a body that is too large: a client that is still sending
does not see an answer."""
DISCARDING = 5.0
"""Seconds that this may take."""


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
        if int(request.headers.get("content-length", 0)) > self.largest:
            raise await self._too_large(request)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(SECONDS):
                async for part in _stream(request):
                    parts.append(part)
                    self.held += len(part)
                    if sum(map(len, parts)) > self.largest:
                        raise await self._too_large(request)
                    if self.held > self.together:
                        message = "too many large requests at a time; ask again in a moment"
                        raise Problem(429, message, code="bodies_full")
            yield b"".join(parts)
        except TimeoutError:
            raise Problem(408, f"the body did not arrive within {SECONDS:g} seconds", code="body_timeout") from None
        finally:
            self.held -= sum(map(len, parts))

    async def _too_large(self, request: Request) -> Problem:
        """What to say, once the client has sent so much that it listens."""
        count = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARDING):
                async for part in _stream(request):
                    count += len(part)
                    if count > DISCARDED * self.largest:
                        break
        message = f"the body has more than {self.largest} bytes; send less, or start the server with --max-body"
        return Problem(413, message, code="body_too_large", headers={"Connection": "close"})


async def _stream(request: Request) -> AsyncIterator[bytes]:
    """Parts of a body; what has been read before is not there any more."""
    while not request.scope.get("body read"):
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Problem(499, "the client went away")
        request.scope["body read"] = not message.get("more_body", False)
        yield message.get("body", b"")


def _require_json(request: Request) -> None:
    """A page of another origin can send what calls itself text without asking first; JSON it cannot."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"Content-Type is '{kind or 'not given'}'; it must be application/json"
        raise Problem(415, message, code="unsupported_media_type")
