"""Features of label sets, computed once and kept."""

from __future__ import annotations

import asyncio

from cachetools import LRUCache
from torch import Tensor

from vlm.apps.serve.batcher import Batcher
from vlm.tasks.zero_shot import label_features

Key = tuple[tuple[str, ...], tuple[str, ...]]
"""Labels and templates."""


class LabelCache:
    """Label sets' features by labels and templates; bounded, the least recently used go first."""

    def __init__(self, batcher: Batcher, *, size: int) -> None:
        """size: labels kept over all sets, not sets; each takes D floats."""
        self.batcher = batcher
        self.kept: LRUCache[Key, Tensor] = LRUCache(size, getsizeof=len)
        self._running: dict[Key, asyncio.Task[Tensor]] = {}
        self._waiting: dict[Key, int] = {}

    async def features(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
        """(labels, D), unit norm. Requests that ask for the same set at once share one run of the text tower."""
        key = (labels, templates)
        found = self.kept.get(key)
        self.batcher.metrics.label_cache.labels("hit" if found is not None else "miss").inc()
        if found is not None:
            return found
        if key not in self._running:
            self._running[key] = asyncio.ensure_future(self._compute(key))
        task = self._running[key]
        self._waiting[key] = self._waiting.get(key, 0) + 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
                if not task.done():  # every client that asked for it is gone
                    self._running.pop(key, None)
                    task.cancel()

    async def _compute(self, key: Key) -> Tensor:
        try:
            labels, templates = key
            steps = label_features(self.batcher.model, labels, templates, batch_size=self.batcher.batch_size)
            features = await self.batcher.texts(steps)
            if len(labels) <= self.kept.maxsize:
                self.kept[key] = features
            return features
        finally:
            if self._running.get(key) is asyncio.current_task():
                del self._running[key]
