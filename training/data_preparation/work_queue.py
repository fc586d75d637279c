"""A queue of work items for workers that can fail at an item or disappear."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WorkQueue(Generic[Item]):
    """Work items, in order. An item is abandoned when all remaining workers have failed at it.

    waiting: items that no worker has taken. abandoned: item -> reason.
    """

    def __init__(self, items: Iterable[Item], workers: Iterable[str]):
        self.waiting = deque(items)
        self.abandoned: dict[Item, str] = {}
        self._workers = set(workers)
        self._failures: dict[Item, dict[str, str]] = {}
        self._in_progress: dict[str, Item] = {}
        self._changed = asyncio.Condition()

    async def take(self, worker: str) -> Item | None:
        """The next item that this worker has not failed at; None when all items are finished.

        Waits while other workers may still return an item.
        """
        async with self._changed:
            while self.waiting or self._in_progress:
                for item in self.waiting:
                    if worker not in self._failures.get(item, ()):
                        self.waiting.remove(item)
                        self._in_progress[worker] = item
                        return item
                await self._changed.wait()
            return None

    async def done(self, worker: str) -> None:
        """The worker has finished its item."""
        async with self._changed:
            del self._in_progress[worker]
            self._changed.notify_all()

    async def abandon(self, worker: str, reason: str) -> None:
        """Abandon the worker's item, which no worker can do."""
        async with self._changed:
            self.abandoned[self._in_progress.pop(worker)] = reason
            self._changed.notify_all()

    async def failed(self, worker: str, reason: str) -> bool:
        """The worker has failed at its item; other workers can try. Returns whether the item is abandoned now."""
        async with self._changed:
            item = self._in_progress.pop(worker)
            self._failures.setdefault(item, {})[worker] = reason
            self.waiting.append(item)
            self._abandon_failed_items()
            self._changed.notify_all()
            return item in self.abandoned

    async def worker_left(self, worker: str) -> None:
        """The worker takes no more items. An item that it has in progress is returned to the queue."""
        async with self._changed:
            if worker in self._in_progress:
                self.waiting.appendleft(self._in_progress.pop(worker))
            self._workers.discard(worker)
            self._abandon_failed_items()
            self._changed.notify_all()

    def _abandon_failed_items(self) -> None:
        """Abandon the waiting items that all remaining workers have failed at."""
        for item in list(self.waiting):
            reasons = self._failures.get(item, {})
            if self._workers and self._workers <= set(reasons):
                self.waiting.remove(item)
                self.abandoned[item] = "; ".join(dict.fromkeys(reasons.values()))
