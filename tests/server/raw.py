"""HTTP by hand, for what a well-behaved client does not do."""

from __future__ import annotations

import json
import socket
from typing import Any


def request(path: str, body: bytes, *, host: str = "localhost", headers: str = "", length: int | None = None) -> bytes:
    """The bytes of a POST."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body) if length is None else length}\r\n"
    kind = "" if "content-type" in headers.lower() else "Content-Type: application/json\r\n"
    return f"{head}{kind}{headers}\r\n".encode() + body


def completion(**settings: Any) -> bytes:
    """A request for a long text, or what else is asked."""
    asked = {"model": "m", "prompt": "It was", "max_tokens": 400, "temperature": 0, **settings}
    return request("/v1/completions", json.dumps(asked).encode())


class Connection:
    """One connection; a context that closes it, hard if asked."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._seen = b""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def until(self, sign: bytes) -> bytes:
        """What has come up to and with a sign."""
        while sign not in self._seen:
            more = self._socket.recv(65536)
            assert more, f"the connection was closed behind {self._seen[-300:]!r}"
            self._seen += more
        before, _, self._seen = self._seen.partition(sign)
        return before + sign

    def rest(self) -> bytes:
        """What comes until the server closes the connection."""
        found = self._seen
        while more := self._socket.recv(65536):
            found += more
        return found

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer with a length."""
        head = self.until(b"\r\n\r\n")
        status = int(head.split()[1])
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        while len(self._seen) < length:
            self._seen += self._socket.recv(65536)
        body, self._seen = self._seen[:length], self._seen[length:]
        return status, json.loads(body)

    def reset(self) -> None:
        """Close so that the other side sees an error rather than an end."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._socket.close()
