"""The service as an ASGI application: routes, and how a request goes through the model."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import ClientDisconnect
from torch import Tensor

from vlm import __version__
from vlm.apps.serve.batcher import Batcher
from vlm.apps.serve.config import ServeConfig
from vlm.apps.serve.errors import CLIENT_GONE, ApiError, ErrorBody, add_handlers, picture_error
from vlm.apps.serve.inputs import Question, read_embed, read_question
from vlm.apps.serve.labels import LabelCache
from vlm.apps.serve.metrics import Metrics
from vlm.apps.serve.middleware import BodyLimits, RequestLog
from vlm.apps.serve.schemas import (
    CLASSIFY_FORM,
    EMBED_FORM,
    ClassifyAnswer,
    ClassifyBody,
    EmbedAnswer,
    EmbedBody,
    Health,
    ModelInfo,
    ModelList,
    request_body,
)
from vlm.data.images import ImageLimits, decode_image
from vlm.errors import DataError
from vlm.tasks.zero_shot import best, probabilities, text_features
from vlm.weights.loaded import VisionLanguageModel

logger = logging.getLogger("vlm.serve")

T = TypeVar("T")
Rows = list[list[float]]
PAGE = Path(__file__).parent / "page"
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src blob: data:; connect-src 'self'"
FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "The body can't be taken apart",
        401: "The key is missing or wrong",
        408: "The request came too slowly",
        413: "The body, or a picture, is too large",
        415: "Not JSON or a form, or not a picture of a known format",
        422: "A field is wrong, or a picture is damaged",
        429: "The queue is full; Retry-After says when to come back",
    }.items()
}


class Service:
    """A model with what surrounds it: queue, label cache, decoders, counts."""

    def __init__(self, model: VisionLanguageModel, config: ServeConfig, templates: tuple[str, ...]) -> None:
        self.model, self.config, self.templates = model, config, templates
        self.metrics = Metrics()
        self.batcher = Batcher(model, self.metrics, batch_size=config.batch_size, queue=config.queue)
        self.labels = LabelCache(self.batcher, size=config.cached_labels)
        self.limits = ImageLimits(max_bytes=config.max_bytes, max_pixels=config.max_pixels)
        self.ready = False
        self.waits_for = ("not_ready", "the model is being warmed up")
        """Code and message of /readyz until the model is warm."""
        self.dimensions = 0
        """Length of a feature; known after the warm-up."""

    async def start(self) -> None:
        """Begin to take requests; the model warms up meanwhile."""
        self.decoders = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decode")
        self.batcher.start()
        self.warming = asyncio.create_task(self.warm_up())

    async def stop(self) -> None:
        """Finish what is queued, then end."""
        self.ready = False
        self.warming.cancel()
        await asyncio.gather(self.warming, return_exceptions=True)
        await self.batcher.stop()
        self.decoders.shutdown()

    async def warm_up(self) -> None:
        """Run both towers once, so that the first request finds them ready."""
        try:
            await self._run_once()
        except Exception:
            self.waits_for = ("model_failed", "the model can't be run; the service's log says why")
            logger.exception("the model can't be run; /readyz will stay at 503")

    async def _run_once(self) -> None:
        size = self.model.transform.size
        features = await self.batcher.images(torch.zeros(1, 3, size, size), lambda found: found)
        await self.batcher.texts(text_features(self.model, ["a picture"], batch_size=1))
        self.dimensions = features.shape[1]
        self.ready = True
        logger.info("ready", extra={"model": self.model.name, "device": str(self.model.device)})

    async def pixels(self, images: Sequence[bytes]) -> Tensor:
        """Decoded and preprocessed pictures (n, 3, H, W). Raises ApiError that names the picture."""
        loop = asyncio.get_running_loop()
        work = [
            loop.run_in_executor(self.decoders, self._decode, content, f"image {number}")
            for number, content in enumerate(images, 1)
        ]
        try:
            return torch.stack(await asyncio.gather(*work))
        except DataError as error:
            for other in work:
                other.cancel()
            raise picture_error(error) from error

    def _decode(self, content: bytes, name: str) -> Tensor:
        return self.model.transform(decode_image(content, limits=self.limits, name=name))

    async def classify(self, request: Request) -> dict[str, Any]:
        """The answer of ``/v1/classify``."""
        self.batcher.check_room()
        clock = Clock()
        question = await read_question(request, self.config)
        request.scope["log"] |= {"pictures": len(question.images), "labels": len(question.labels)}
        with self.batcher.accept():
            results = await while_connected(request, self._classify(question, clock))
        return {"model": self.model.name, "results": results, "timings": clock.timings()}

    async def _classify(self, question: Question, clock: Clock) -> list[dict[str, Any]]:
        templates = question.templates or self.templates
        if len(question.labels) * len(templates) > self.config.max_sentences:
            message = (
                f"{len(question.labels):,} labels with {len(templates)} templates are more than "
                f"{self.config.max_sentences:,} sentences; give fewer of either"
            )
            raise ApiError(422, "too_many_sentences", message)
        pixels = await self.pixels(question.images)
        clock.lap("read")
        labels = await self.labels.features(question.labels, templates)
        clock.lap("labels")
        rank = partial(self._rank, labels=labels, names=question.labels, top_k=question.top_k)
        results = await self.batcher.images(pixels, rank)
        clock.lap("model")
        return results

    def _rank(self, features: Tensor, labels: Tensor, names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
        found = best(probabilities(self.model, features, labels), names, top_k)
        return [{"predictions": [{"label": p.label, "probability": p.score} for p in row]} for row in found]

    async def embed(self, request: Request) -> dict[str, Any]:
        """The answer of ``/v1/embed``."""
        self.batcher.check_room()
        clock = Clock()
        images, texts = await read_embed(request, self.config)
        request.scope["log"] |= {"pictures": len(images), "texts": len(texts)}
        with self.batcher.accept():
            image_rows, text_rows = await while_connected(request, self._embed(images, texts, clock))
        dimensions = len((image_rows or text_rows)[0])
        answer = {"model": self.model.name, "dimensions": dimensions, "images": image_rows, "texts": text_rows}
        return answer | {"timings": clock.timings()}

    async def _embed(self, images: list[bytes], texts: list[str], clock: Clock) -> tuple[Rows, Rows]:
        image_rows: Rows = []
        text_rows: Rows = []
        if images:
            pixels = await self.pixels(images)
            clock.lap("read")
            image_rows = await self.batcher.images(pixels, lambda found: found.float().tolist())
        if texts:
            steps = text_features(self.model, texts, batch_size=self.config.batch_size)
            text_rows = (await self.batcher.texts(steps)).tolist()
        clock.lap("model")
        return image_rows, text_rows

    def info(self) -> ModelInfo:
        """What ``/v1/models`` says of the model."""
        names = ("max_bytes", "max_pixels", "max_images", "max_labels", "max_label_length", "max_sentences")
        return ModelInfo(
            name=self.model.name,
            family=self.model.family,
            image_size=self.model.transform.size,
            dimensions=self.dimensions,
            templates=list(self.templates),
            limits={name: getattr(self.config, name) for name in names},
        )


class Clock:
    """Milliseconds of the parts of a request."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.parts = {"read": 0.0, "labels": 0.0, "model": 0.0}

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a part."""
        now = time.perf_counter()
        self.parts[name] += 1000 * (now - self.last)
        self.last = now

    def timings(self) -> dict[str, float]:
        """All parts and the whole."""
        found = self.parts | {"total": 1000 * (time.perf_counter() - self.start)}
        return {name: round(value, 2) for name, value in found.items()}


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` on a request that was read; cancelled when its client leaves, with ApiError 499."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_GONE, "client_gone", "the client went away")
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has left; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


def create_app(model: VisionLanguageModel, config: ServeConfig, *, templates: tuple[str, ...]) -> FastAPI:
    """The service around a loaded model. templates: of requests that name none."""
    service = Service(model, config, templates)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPIOffline(
        title="vlm", version=__version__, lifespan=lifespan, redoc_url=None, redirect_slashes=False,
        description="Zero-shot classification and features of pictures and texts.",
    )  # fmt: skip
    app.state.service = service
    add_handlers(app)
    app.add_middleware(BodyLimits, max_bytes=config.max_bytes, seconds=config.body_timeout)
    app.add_middleware(RequestLog, metrics=service.metrics)
    key = Depends(_key_check(config.api_key)) if config.api_key else None
    _add_verbs(app, service, [key] if key else [])
    _add_state(app, service, [key] if key else [])
    _add_page(app)
    return app


def _add_verbs(app: FastAPI, service: Service, guards: list[Any]) -> None:
    async def run(work: Coroutine[Any, Any, dict[str, Any]]) -> JSONResponse:
        try:
            return JSONResponse(await work)
        except ClientDisconnect as error:
            service.metrics.dropped.inc()
            raise ApiError(CLIENT_GONE, "client_gone", "the client went away while it sent") from error
        except ApiError as error:
            if error.status == CLIENT_GONE:
                service.metrics.dropped.inc()
            raise

    @app.post(
        "/v1/classify", response_model=ClassifyAnswer, responses=ERRORS, dependencies=guards,
        openapi_extra=request_body(ClassifyBody, CLASSIFY_FORM),
    )  # fmt: skip
    async def classify(request: Request) -> JSONResponse:
        """Classify pictures among labels given as words."""
        return await run(service.classify(request))

    @app.post(
        "/v1/embed", response_model=EmbedAnswer, responses=ERRORS, dependencies=guards,
        openapi_extra=request_body(EmbedBody, EMBED_FORM),
    )  # fmt: skip
    async def embed(request: Request) -> JSONResponse:
        """Unit-norm features of pictures and texts; their products are cosine similarities."""
        return await run(service.embed(request))

    @app.get("/v1/models", responses={401: ERRORS[401]}, dependencies=guards)
    async def models() -> ModelList:
        """The model that answers, and what a request to it may hold."""
        return ModelList(models=[service.info()])


def _add_state(app: FastAPI, service: Service, guards: list[Any]) -> None:
    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the process answers."""
        return Health(status="ok")

    @app.get("/readyz", responses={503: {"model": ErrorBody, "description": "Not yet warm"}})
    async def readyz() -> Health:
        """Whether the model has run once, so that a request won't wait for its first steps."""
        if not service.ready:
            raise ApiError(503, *service.waits_for)
        return Health(status="ready")

    @app.get(
        "/metrics", dependencies=guards, response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, 401: ERRORS[401]},
    )  # fmt: skip
    async def metrics() -> Response:
        """Counts in Prometheus' form."""
        return Response(generate_latest(service.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_page(app: FastAPI) -> None:
    def file(name: str) -> Any:
        async def answer() -> FileResponse:
            return FileResponse(PAGE / name, headers={"content-security-policy": PAGE_POLICY})

        return answer

    for path, name in FILES.items():
        app.add_api_route(path, file(name), methods=["GET"], include_in_schema=False)


def _key_check(key: str) -> Any:
    expected = hashlib.sha256(key.encode()).digest()

    def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]) -> None:
        # Hashes are of one length, so the comparison tells nothing, not even how long the key is.
        brought = hashlib.sha256((given.credentials if given else "").encode("utf-8", "surrogateescape")).digest()
        if not hmac.compare_digest(brought, expected):
            text = "this service needs a key: send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, "unauthorized", text, headers={"WWW-Authenticate": "Bearer"})

    return check
