"""The model behind a queue: one thread runs it, pictures of concurrent requests together."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm.apps.serve.errors import ApiError
from vlm.apps.serve.metrics import Metrics
from vlm.weights.loaded import VisionLanguageModel

Steps = Generator[None, None, Tensor]


@dataclass(frozen=True)
class _Job:
    """Pictures of one request (n, 3, H, W), and what is made of their features (n, D) in the model's thread."""

    pixels: Tensor
    then: Callable[[Tensor], Any]
    future: asyncio.Future[Any]


class Batcher:
    """Runs a model for many requests; its methods belong to one event loop, which the model never blocks.

    Whatever waits when the model is free runs at once, up to `batch_size` pictures: alone a request never waits
    for company. Between two batches of pictures one step of one text job runs, so neither starves the other.
    """

    def __init__(self, model: VisionLanguageModel, metrics: Metrics, *, batch_size: int, queue: int) -> None:
        self.model, self.metrics, self.batch_size, self.queue = model, metrics, batch_size, queue
        self.accepted = 0
        """Requests accepted and not yet answered."""
        self._seconds = 0.0  # a request takes on average, as far as the last ones tell
        self._images: deque[_Job] = deque()
        self._texts: deque[tuple[Steps, asyncio.Future[Tensor]]] = deque()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to run what is queued, also once more after `stop`; needs a running event loop."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Finish what is queued, then end."""
        while self._images or self._texts:
            await asyncio.sleep(0.01)
        if self._loop is not None:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        self._thread.shutdown()

    @contextlib.contextmanager
    def accept(self) -> Iterator[None]:
        """A place in the bounded queue for as long as a request is worked on.

        Raises ApiError 429 when there is none, with the seconds after which one is likely.
        """
        self.check_room()
        self.accepted += 1
        self.metrics.queue_length.set(self.accepted)
        try:
            yield
        finally:
            self.accepted -= 1
            self.metrics.queue_length.set(self.accepted)

    def check_room(self) -> None:
        """Raises ApiError 429 when the queue is full: asked before a body is read, it spares reading it."""
        if self.accepted >= self.queue:
            wait = max(1, math.ceil(self.accepted * self._seconds))
            raise ApiError(
                429, "queue_full", f"{self.accepted} requests are waiting; try again in {wait} s",
                headers={"Retry-After": str(wait)},
            )  # fmt: skip

    async def images(self, pixels: Tensor, then: Callable[[Tensor], Any]) -> Any:
        """`then` of the features (n, D) of preprocessed pictures (n, 3, H, W); it runs in the model's thread."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._images.append(_Job(pixels, then, future))
        self._wake.set()
        return await future

    async def texts(self, steps: Steps) -> Tensor:
        """What a text job returns; see `label_features`."""
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._texts.append((steps, future))
        self._wake.set()
        return await future

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            jobs = self._take()
            if jobs:
                start = time.perf_counter()
                found = await loop.run_in_executor(self._thread, self._encode, jobs)
                took = (time.perf_counter() - start) / len(jobs)
                self._seconds = took if not self._seconds else 0.9 * self._seconds + 0.1 * took
                for job, result in zip(jobs, found, strict=True):
                    _settle(job.future, result)
            if self._texts:
                await self._text_step(loop)
            if not self._images and not self._texts:
                self._wake.clear()
                await self._wake.wait()

    def _take(self) -> list[_Job]:
        """Jobs that run together: at least one, further ones while they fit; those whose client is gone fall out."""
        jobs: list[_Job] = []
        count = 0
        while self._images:
            if self._images[0].future.done():
                self._images.popleft()
                continue
            size = len(self._images[0].pixels)
            if jobs and count + size > self.batch_size:
                break
            jobs.append(self._images.popleft())
            count += size
        return jobs

    async def _text_step(self, loop: asyncio.AbstractEventLoop) -> None:
        steps, future = self._texts.popleft()
        if future.done():
            steps.close()
            return
        result = await loop.run_in_executor(self._thread, self._step, steps)
        if result is None:
            self._texts.append((steps, future))  # behind the others: a long set doesn't hold up a short one
        else:
            _settle(future, result)

    def _encode(self, jobs: Sequence[_Job]) -> list[Any]:
        """In the model's thread: the result or the error of each job."""
        try:
            pixels = torch.cat([job.pixels for job in jobs]).to(self.model.device, self.model.dtype)
            parts = pixels.split(self.batch_size)
            for part in parts:
                self.metrics.batch_size.observe(len(part))
            features = torch.cat([self.model.encode_image(part) for part in parts])
        except Exception as error:
            return [error] * len(jobs)
        found: list[Any] = []
        for job, own in zip(jobs, features.split([len(job.pixels) for job in jobs]), strict=True):
            try:
                found.append(job.then(own))
            except Exception as error:
                found.append(error)
        return found

    def _step(self, steps: Steps) -> Tensor | Exception | None:
        """In the model's thread: one step; None while there are more."""
        try:
            next(steps)
            self.metrics.text_batches.inc()
        except StopIteration as end:
            return end.value
        except Exception as error:
            return error
        return None


def _settle(future: asyncio.Future[Any], result: Any) -> None:
    if future.done():  # its client went away meanwhile
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
