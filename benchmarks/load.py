"""Clients of an HTTP service on this machine: a fixed number of them, each asking again as soon as it is answered."""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"


@dataclass
class Outcome:
    """What came of a turn."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Seconds from a request's first byte to its answer's last, those of its waiting after a 429 included."""
    refused: int = 0
    """Answers of 429, each asked again after the seconds of its Retry-After."""
    lost: list[str] = field(default_factory=list)
    """Requests that were answered neither 200 nor, in the end, after a 429."""

    def summary(self) -> dict[str, Any]:
        """Requests per second and percentiles in ms."""
        cuts = statistics.quantiles(self.latencies, n=100) if len(self.latencies) > 1 else self.latencies * 99
        return {
            "requests": len(self.latencies),
            "seconds": self.seconds,
            "requests_per_second": len(self.latencies) / self.seconds,
            "p50_ms": 1000 * cuts[49],
            "p99_ms": 1000 * cuts[98],
            "refused": self.refused,
            "lost": len(self.lost),
        }


def form(port: int, path: str, picture: bytes, fields: dict[str, str]) -> bytes:
    """A whole request: a multipart form with a picture, ready to be written to a socket."""
    mark = uuid.uuid4().hex
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n'
    parts.append(head.encode() + b"Content-Type: image/jpeg\r\n\r\n" + picture + f"\r\n--{mark}--\r\n".encode())
    body = b"".join(parts)
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}:{port}", f"Content-Type: multipart/form-data; boundary={mark}"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode() + b"\r\n\r\n" + body


def run_clients(port: int, requests: Sequence[bytes], *, clients: int, seconds: float) -> Outcome:
    """`clients` ask for `seconds`, going round `requests`; what was asked is waited for."""
    return asyncio.run(_run(port, requests, clients, seconds))


def ask(port: int, request: bytes) -> bytes:
    """The body of one answer. Raises RuntimeError unless its status is 200."""

    async def once() -> tuple[int, dict[str, str], bytes]:
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            return await _exchange(reader, writer, request)
        finally:
            writer.close()

    status, _, body = asyncio.run(once())
    if status != 200:
        raise RuntimeError(f"status {status}: {body[:500]!r}")
    return body


async def _run(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Outcome:
    outcome = Outcome()
    start = time.perf_counter()
    await asyncio.gather(*(_client(port, requests, number, start + seconds, outcome) for number in range(clients)))
    outcome.seconds = time.perf_counter() - start
    return outcome


async def _client(port: int, requests: Sequence[bytes], number: int, end: float, outcome: Outcome) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        while (start := time.perf_counter()) < end:
            status, headers, body = await _exchange(reader, writer, requests[number % len(requests)])
            while status == 429:
                outcome.refused += 1
                await asyncio.sleep(float(headers["retry-after"]))
                status, headers, body = await _exchange(reader, writer, requests[number % len(requests)])
            if status == 200:
                outcome.latencies.append(time.perf_counter() - start)
            else:
                outcome.lost.append(f"status {status}: {body[:200]!r}")
            number += 1
    except (OSError, EOFError, asyncio.IncompleteReadError) as error:
        outcome.lost.append(repr(error))
    finally:
        writer.close()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, dict[str, str], bytes]:
    writer.write(request)
    await writer.drain()
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return int(head[0].split()[1]), headers, body
