"""The process: its socket, uvicorn, signals, and a bound on how long a request's head may take."""

from __future__ import annotations

import asyncio
import signal
import socket
from functools import partial
from typing import Any

import typer
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vlm.apps.serve.config import ServeConfig
from vlm.apps.serve.middleware import json_logging
from vlm.errors import ConfigError


class HeadTimeout(HttpToolsProtocol):
    """uvicorn's protocol, which cuts a client that never finishes its request line and headers."""

    def __init__(self, *given: Any, seconds: float, **more: Any) -> None:
        """seconds: longest time between a connection (or a further request's first byte) and the end of its head."""
        super().__init__(*given, **more)
        self.seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; bytes after an answer begin the next head."""
        super().data_received(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._timer is None and not self.transport.is_closing():
            self._wait_for_head()

    def on_headers_complete(self) -> None:
        """The head is there: bodies have their own bound."""
        self._stop_waiting()
        super().on_headers_complete()

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
    protocol: Any = partial(HeadTimeout, seconds=config.head_timeout)
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
