"""What a client is told where its request cannot be served: OpenAI's error object, with a status.

{"error": {"message": "…", "type": "invalid_request_error", "param": "top_p", "code": null}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.server.scheduler import Failure

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):  # noqa: N818  # it is an answer, rather than something that went wrong here
    """An answer that says why there is none. param: the part of the request that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def queue_full() -> Problem:
    return Problem(
        429,
        "as many requests wait as the server lets; ask again in a moment",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def stopping() -> Problem:
    return Problem(503, "the server is stopping; ask again when it is back", code="stopping")


def failed(failure: Failure, seconds: float) -> Problem:
    """Why a text ended that had been accepted."""
    match failure:
        case "time_limit":
            return Problem(504, f"the text was not finished within {seconds:g} seconds", code="time_limit")
        case "stopping":
            return Problem(503, "the server is stopping, and the text is not finished", code="stopping")
        case "engine_failed":
            return Problem(500, "the engine failed on a step that this text took part in", code="engine_failed")
