"""The process: its socket, uvicorn, signals, and bounds on how long a request's head may take and be."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import socket
import uuid
from functools import partial
from http import HTTPStatus
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vlm.apps.serve.config import ServeConfig
from vlm.apps.serve.errors import error_body
from vlm.apps.serve.middleware import json_logging
from vlm.errors import ConfigError

logger = logging.getLogger("vlm.serve")

HEAD_BYTES = 65_536
"""Longest request line and headers, apart from what one read of the socket brings."""

_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)


class BoundedHead(HttpToolsProtocol):
    """uvicorn's protocol, which cuts a client whose request line and headers never end, and answers it in JSON."""

    def __init__(self, *given: Any, seconds: float, **more: Any) -> None:
        """seconds: longest time between a connection (or a further request's first byte) and the end of its head."""
        super().__init__(*given, **more)
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._in_head, self._length = True, 0
        self._moved = False  # whether the last bytes ended a head or a body

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; bytes after an answer begin the next head."""
        self._moved = False
        super().data_received(_without_upgrade(data) if self._in_head else data)
        if self.transport.is_closing():
            return
        if self._in_head and not self._moved:
            self._length += len(data)
            if self._length > HEAD_BYTES:
                self._refuse(431, "head_too_large", f"the request's head is longer than {HEAD_BYTES:,} bytes")
                return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._timer is None:
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        """The head is there: bodies have their own bound."""
        self._stop_waiting()
        self._in_head, self._length, self._moved = False, 0, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """What comes now is the next head."""
        self._in_head, self._moved = True, True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what isn't HTTP in the form of all errors."""
        self._refuse(400, "bad_request", msg)

    def _refuse(self, status: int, code: str, message: str) -> None:
        request_id = uuid.uuid4().hex
        body = json.dumps(error_body(code, message, request_id)).encode()
        lines = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "content-type: application/json",
            f"content-length: {len(body)}", f"x-request-id: {request_id}", "connection: close", "", "",
        ]  # fmt: skip
        self.transport.write("\r\n".join(lines).encode() + body)
        self.transport.close()
        client = self.client[0] if self.client else None
        logger.info("refused", extra={"request_id": request_id, "status": status, "error": code, "client": client})

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _without_upgrade(data: bytes) -> bytes:
    """Bytes of a head without offers of another protocol (h2c of Java's client or curl --http2), which aren't taken.

    httptools would lose the body of such a request. A header is only removed where it stands whole in `data`.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"", head + end[:2]) + end[2:] + rest


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError when the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "") or error
        raise ConfigError(
            f"{host} port {port}: can't be listened on ({reason}); choose another --host or --port"
        ) from (error)


def run(app: FastAPI, config: ServeConfig, place: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, then answer what was accepted and return."""
    protocol: Any = partial(BoundedHead, seconds=config.head_timeout)
    settings = uvicorn.Config(
        app, http=protocol, ws="none", log_config=json_logging(), access_log=False, server_header=False,
        timeout_graceful_shutdown=config.shutdown_timeout, timeout_keep_alive=75,
    )  # fmt: skip
    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"{config.model} at http://{shown}:{port} (documentation at /docs, Ctrl-C ends)")
    # uvicorn raises the signal that ended it once more at the end; an orderly end is no failure.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        uvicorn.Server(settings).run(sockets=[place])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
