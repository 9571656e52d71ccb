"""Around every request: an id, a line in the log, counts, the length of its body and the time it may take to come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.apps.serve.errors import ApiError, error_response, unexpected
from vlm.apps.serve.metrics import Metrics

logger = logging.getLogger("vlm.serve")

SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
LINGER = 3.0
"""Seconds in which a client that was refused may go on sending, so that it comes to read why."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Gives a request its id, answers what the application let fall, logs and counts what came of it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        # HEAD is GET whose body the server leaves out, by its own scope, which keeps the method.
        method = scope["method"]
        scope = {**scope, "method": "GET" if method == "HEAD" else method, "log": {}}
        scope["request_id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = scope["request_id"]
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception:
            request = Request(scope)
            if status:  # the head is out: cut the connection rather than pass off half an answer as a whole one
                unexpected(request)
                raise
            await unexpected(request)(scope, receive, answer)
        finally:
            self._record(scope, method, status, time.perf_counter() - start)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, method, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        client = scope.get("client")
        fields = {
            "request_id": scope["request_id"], "method": method, "path": scope["path"][:200],
            "status": status, "ms": round(1000 * seconds, 1), "client": client[0] if client else None,
        }  # fmt: skip
        logger.info("request", extra=fields | scope["log"])


class BodyLimits:
    """Refuses a body that is too long (413), when its head says so or as it comes, or too slow (408)."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = False

        async def answer(message: Message) -> None:
            if refused and message["type"] == "http.response.body" and not message.get("more_body"):
                # Closing at once would reset the connection, and some clients (Node's) then never see the answer.
                await send({**message, "more_body": True})
                await _drain(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes:
            refused = True
            await error_response(Request(scope), self._too_long())(scope, receive, answer)
            return
        deadline = time.monotonic() + self.seconds
        seen, complete = 0, False

        async def bounded() -> Message:
            nonlocal seen, complete, refused
            if complete:  # what comes now is the client leaving, which may take as long as it likes
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError as error:
                text = f"the request did not arrive within {self.seconds:g} s"
                raise ApiError(408, "too_slow", text, headers={"Connection": "close"}) from error
            complete = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                refused = not complete
                raise self._too_long()
            return message

        await self.app(scope, bounded, answer)

    def _too_long(self) -> ApiError:
        # Without closing, the rest of the body would have to be read to find the next request.
        message = f"the request is longer than {self.max_bytes:,} bytes; send fewer or smaller pictures"
        return ApiError(413, "body_too_large", message, headers={"Connection": "close"})


async def _drain(receive: Receive) -> None:
    """Read and forget what still comes of a body, for LINGER seconds at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await receive()).get("more_body"):
                pass


def json_logging(level: int = logging.INFO) -> dict[str, Any]:
    """Logging settings: a JSON object a line on stderr, for this package and for uvicorn."""
    fields = ["asctime", "levelname", "name", "message"]
    formatter = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "fmt": " ".join(f"%({name})s" for name in fields),
        "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
    }
    own = {"handlers": ["stderr"], "level": level, "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json", "stream": "ext://sys.stderr"}},
        "loggers": {"vlm": own, "uvicorn": own, "uvicorn.access": own | {"handlers": [], "level": logging.ERROR}},
        "root": {"handlers": ["stderr"], "level": logging.WARNING},
    }
