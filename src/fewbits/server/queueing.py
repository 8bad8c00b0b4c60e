"""Who is next: clients in turn, each client's own requests in the order they came.

So a client that asks for a hundred texts at once delays another one's single text by one of them, not by a hundred
(Nagle 1987, "On packet switches with infinite storage": round robin over sources, rather than one queue for all).
The queue is bounded, and its last quarter is kept for clients that have nothing in it yet: one client alone cannot
shut the others out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")


class FullError(Exception):
    """There is no place for what was to be put into the queue."""


class FairQueue(Generic[T]):
    """At most `places` items. Not for several threads at once."""

    def __init__(self, places: int) -> None:
        self._places, self._count = places, 0
        self._by_client: dict[str, deque[T]] = {}  # in the order of their turns

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """All items, in no order that means anything."""
        for items in self._by_client.values():
            yield from items

    def put(self, client: str, items: Sequence[T]) -> None:
        """Append all of the items, or raise FullError and append none."""
        places = self._places - self._places // 4 if client in self._by_client else self._places
        if self._count + len(items) > places:
            raise FullError
        self._by_client.setdefault(client, deque()).extend(items)
        self._count += len(items)

    def take(self) -> T:
        """The next item; its client's turn comes again behind all others'. Raises IndexError where there is none."""
        if not self._count:
            raise IndexError("take from an empty queue")
        client, items = next(iter(self._by_client.items()))
        item = items.popleft()
        del self._by_client[client]
        if items:
            self._by_client[client] = items
        self._count -= 1
        return item

    def remove(self, client: str, item: T) -> bool:
        """Take an item out of the middle; whether it was there."""
        items = self._by_client.get(client)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._by_client[client]
        self._count -= 1
        return True
