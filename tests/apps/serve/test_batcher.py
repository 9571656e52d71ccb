"""The queue: full, left by its clients, shared by texts and pictures, drained at the end."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from tests.tasks.small import colour_model
from vlm.apps.serve.batcher import Batcher
from vlm.apps.serve.errors import ApiError
from vlm.apps.serve.labels import LabelCache
from vlm.apps.serve.metrics import Metrics
from vlm.tasks.zero_shot import label_features


def picture(value: float, count: int = 1) -> torch.Tensor:
    return torch.full((count, 3, 8, 8), value)


class Gated:
    """A batcher whose model waits until it is let go."""

    def __init__(self, **settings: Any) -> None:
        self.model = colour_model()
        self.batcher = Batcher(self.model, Metrics(), **({"batch_size": 4, "queue": 3} | settings))
        self.gate, self.inside = threading.Event(), threading.Event()
        own = self.model.network.encode_image

        def wait(pixels):
            self.inside.set()
            self.gate.wait(20)
            return own(pixels)

        self.model.network.encode_image = wait
        self.batcher.start()

    async def begun(self) -> None:
        await asyncio.to_thread(self.inside.wait, 20)


def test_full_queue_says_when_to_come_back() -> None:
    batcher = Batcher(colour_model(), Metrics(), batch_size=4, queue=2)
    with batcher.accept(), batcher.accept():
        with pytest.raises(ApiError) as error, batcher.accept():
            raise AssertionError("accepted")
        assert error.value.status == 429 and int(error.value.headers["Retry-After"]) >= 1
    with batcher.accept():
        assert batcher.accepted == 1
    assert batcher.accepted == 0


def test_a_job_whose_client_left_never_runs() -> None:
    async def scenario() -> list[int]:
        gated = Gated()
        first = asyncio.ensure_future(gated.batcher.images(picture(1.0), len))
        await gated.begun()
        left = asyncio.ensure_future(gated.batcher.images(picture(0.5, 2), len))
        stays = asyncio.ensure_future(gated.batcher.images(picture(0.2, 3), len))
        await asyncio.sleep(0)
        left.cancel()
        gated.gate.set()
        assert await first == 1 and await stays == 3
        await gated.batcher.stop()
        return gated.model.network.image_rows

    assert asyncio.run(scenario()) == [1, 3]


def test_jobs_larger_than_a_batch_are_cut() -> None:
    async def scenario() -> list[int]:
        gated = Gated()
        gated.gate.set()
        assert (await gated.batcher.images(picture(1.0, 9), lambda found: found)).shape == (9, 3)
        await gated.batcher.stop()
        return gated.model.network.image_rows

    assert asyncio.run(scenario()) == [4, 4, 1]


def test_pictures_do_not_wait_for_a_long_label_set() -> None:
    async def scenario() -> None:
        gated = Gated(batch_size=1)
        gated.gate.set()
        order: list[str] = []
        names = tuple(f"label {number}" for number in range(50))
        steps = label_features(gated.model, names, ("{}",), batch_size=1)
        texts = asyncio.ensure_future(gated.batcher.texts(steps))
        texts.add_done_callback(lambda _: order.append("texts"))
        for _ in range(3):
            await gated.batcher.images(picture(1.0), len)
            order.append("picture")
        assert (await texts).shape == (50, 3)
        assert order == ["picture"] * 3 + ["texts"]
        await gated.batcher.stop()

    asyncio.run(scenario())


def test_the_event_loop_goes_on_while_the_model_runs() -> None:
    async def scenario() -> None:
        gated = Gated()
        job = asyncio.ensure_future(gated.batcher.images(picture(1.0), len))
        await gated.begun()
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert not job.done()
        gated.gate.set()
        assert await job == 1
        await gated.batcher.stop()

    asyncio.run(scenario())


def test_one_bad_job_does_not_fail_its_batch() -> None:
    def bad(found: torch.Tensor) -> None:
        raise ValueError("mine alone")

    async def scenario() -> None:
        gated = Gated()
        first = asyncio.ensure_future(gated.batcher.images(picture(1.0), len))
        await gated.begun()
        both = [gated.batcher.images(picture(0.5), bad), gated.batcher.images(picture(0.5), len)]
        waiting = asyncio.gather(*both, return_exceptions=True)
        await asyncio.sleep(0)
        gated.gate.set()
        await first
        error, fine = await waiting
        assert isinstance(error, ValueError) and fine == 1
        await gated.batcher.stop()

    asyncio.run(scenario())


def test_requests_for_one_label_set_share_its_run_and_leave_it_when_all_are_gone() -> None:
    async def scenario() -> None:
        gated = Gated()
        cache = LabelCache(gated.batcher, size=100)
        key = (("red", "blue"), ("{}",))
        blocking = asyncio.ensure_future(gated.batcher.images(picture(1.0), len))
        await gated.begun()
        asked = [asyncio.ensure_future(cache.features(*key)) for _ in range(5)]
        other = asyncio.ensure_future(cache.features(("green",), ("{}",)))
        await asyncio.sleep(0)
        other.cancel()
        asked[0].cancel()
        gated.gate.set()
        found = await asyncio.gather(*asked[1:])
        assert all(torch.equal(found[0], one) for one in found) and found[0].shape == (2, 3)
        await blocking
        await gated.batcher.stop()
        assert gated.model.network.text_rows == [2]
        assert list(cache.kept) == [key] and not cache._running and not cache._waiting

    asyncio.run(scenario())


def test_stop_finishes_what_is_queued() -> None:
    async def scenario() -> None:
        gated = Gated()
        jobs = [asyncio.ensure_future(gated.batcher.images(picture(1.0, 3), len)) for _ in range(4)]
        await gated.begun()
        ending = asyncio.ensure_future(gated.batcher.stop())
        await asyncio.sleep(0.05)
        assert not ending.done()
        gated.gate.set()
        await ending
        assert await asyncio.gather(*jobs) == [3] * 4

    asyncio.run(scenario())
