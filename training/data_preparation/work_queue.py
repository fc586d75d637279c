"""Work shared among workers, of which any may fail at a piece or be lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Piece = TypeVar("Piece")


class Shared(Generic[Piece]):
    """Pieces to be done, in order. One is given up when every worker that is left has failed at it.

    waiting: not done yet. given_up: piece -> why.
    """

    def __init__(self, pieces: Iterable[Piece], workers: Iterable[str]):
        self.waiting = deque(pieces)
        self.given_up: dict[Piece, str] = {}
        self._workers = set(workers)
        self._failures: dict[Piece, dict[str, str]] = {}
        self._in_hand: dict[str, Piece] = {}
        self._changed = asyncio.Condition()

    async def take(self, worker: str) -> Piece | None:
        """A piece that this worker has not failed at; waits while others may hand one back. None = all is over."""
        async with self._changed:
            while self.waiting or self._in_hand:
                for piece in self.waiting:
                    if worker not in self._failures.get(piece, ()):
                        self.waiting.remove(piece)
                        self._in_hand[worker] = piece
                        return piece
                await self._changed.wait()
            return None

    async def done(self, worker: str) -> None:
        """The worker's piece is done."""
        async with self._changed:
            del self._in_hand[worker]
            self._changed.notify_all()

    async def impossible(self, worker: str, why: str) -> None:
        """No worker can do the worker's piece."""
        async with self._changed:
            self.given_up[self._in_hand.pop(worker)] = why
            self._changed.notify_all()

    async def failed(self, worker: str, why: str) -> bool:
        """The worker cannot do its piece; another may. Whether the piece is given up with that."""
        async with self._changed:
            piece = self._in_hand.pop(worker)
            self._failures.setdefault(piece, {})[worker] = why
            self.waiting.append(piece)
            self._give_up_hopeless()
            self._changed.notify_all()
            return piece in self.given_up

    async def leave(self, worker: str) -> None:
        """The worker takes no more, and hands back what it has."""
        async with self._changed:
            if worker in self._in_hand:
                self.waiting.appendleft(self._in_hand.pop(worker))
            self._workers.discard(worker)
            self._give_up_hopeless()
            self._changed.notify_all()

    def _give_up_hopeless(self) -> None:
        for piece in list(self.waiting):
            reasons = self._failures.get(piece, {})
            if self._workers and self._workers <= set(reasons):
                self.waiting.remove(piece)
                self.given_up[piece] = "; ".join(dict.fromkeys(reasons.values()))
