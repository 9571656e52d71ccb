"""Requests per second of `vlm serve` against a plain FastAPI handler around transformers' pipeline, and a long load.

Both services are processes of their own on this machine, asked the same pictures and labels by the same clients,
turn by turn. With --load our service alone is asked by many clients for a while, with none to be lost. See README.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load import Outcome, ask, run_clients
from measure import listed, machine, median_interval, versions, write_results
from serve_sides import SIDE, Server, label_set, make_folder, our_server, peer_server, requests_for

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")
MODELS = {"vit-b-32": "vit-b-32", "tiny-clip": "tiny"}
"""What is served, and the preset of the peer's weights."""
AGREE = 0.02
"""Largest difference of probabilities on the same weights: both resize pictures in their own way."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    facts = {
        "command": shlex.join(["python", "benchmarks/serve.py", *words]),
        "machine": machine("cpu"),
        "versions": versions(*PACKAGES),
        "model": options.model,
        "clients": options.clients,
        "picture_side": SIDE,
    }
    if options.load:
        result = facts | measure_load(options)
        write_results(options.out, options.name or f"serve-load-{options.model}", result, load_page(result))
    else:
        result = facts | compare(options)
        name = options.name or f"serve-{options.model}-{options.labels}"
        write_results(options.out, name, result, page(result))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="vit-b-32")
    parser.add_argument("--labels", type=int, default=20, help="labels of a request")
    parser.add_argument("--clients", type=int, default=16, help="at most 400")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn, or of the load; at most 300")
    parser.add_argument("--rounds", type=int, default=6, help="times that each side has its turn")
    parser.add_argument("--load", action="store_true", help="ask our service alone, and count what is lost")
    parser.add_argument("--queue", type=int, default=512, help="places in our service's queue under --load")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", help="file name of the results, without its ending")
    options = parser.parse_args(arguments)
    for name, most in (("labels", 1000), ("clients", 400), ("seconds", 300), ("rounds", 100), ("queue", 10_000)):
        if not 0 < getattr(options, name) <= most:
            parser.error(f"--{name} must be above 0 and at most {most}")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Turns of both sides; who goes first alternates."""
    labels = label_set(options.labels)
    with tempfile.TemporaryDirectory() as folder:
        weights = make_folder(MODELS[options.model], Path(folder) / "clip")
        same = options.model == "vit-b-32"
        servers: dict[str, Server] = {}
        try:
            servers["vlm"] = our_server(weights if same else options.model)
            servers["transformers"] = peer_server(weights)
            requests = {name: requests_for(server, labels) for name, server in servers.items()}
            difference = largest_difference(servers, requests) if same else None
            turns = take_turns(options, servers, requests)
            memory = {name: server.peak_mb() for name, server in servers.items()}
        finally:
            for server in servers.values():
                server.end()
    ratios = [
        ours["requests_per_second"] / theirs["requests_per_second"]
        for ours, theirs in zip(turns["vlm"], turns["transformers"], strict=True)
    ]
    return {
        "labels": options.labels,
        "same_weights": same,
        "largest_difference": difference,
        "rounds": options.rounds,
        "seconds_of_a_turn": options.seconds,
        "turns": turns,
        "median": {name: medians(found) for name, found in turns.items()},
        "peak_mb": memory,
        "ratio": {"each": ratios} | median_interval(ratios),
    }


def take_turns(
    options: argparse.Namespace, servers: dict[str, Server], requests: dict[str, list[bytes]]
) -> dict[str, list[dict[str, Any]]]:
    """What each side did in each of its turns."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for name, server in servers.items():  # warm-up, with as many clients
        run_clients(server.port, requests[name], clients=options.clients, seconds=0.5)
    for turn in range(options.rounds):
        for name in sorted(servers, reverse=bool(turn % 2)):
            before = servers[name].cpu_seconds()
            outcome = run_clients(servers[name].port, requests[name], clients=options.clients, seconds=options.seconds)
            complain(name, outcome)
            spent = servers[name].cpu_seconds() - before
            turns[name].append(outcome.summary() | {"cpu_ms_per_request": 1000 * spent / len(outcome.latencies)})
    return turns


def complain(name: str, outcome: Outcome) -> None:
    """Stop where a request failed: its side would seem fast."""
    if outcome.lost:
        raise SystemExit(f"{name}: {len(outcome.lost)} requests failed, the first with {outcome.lost[0]}")


def medians(turns: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the turns of a side."""
    return {
        name: median_interval([turn[name] for turn in turns])["median"]
        for name in ("requests_per_second", "p50_ms", "p99_ms", "cpu_ms_per_request")
    }


def largest_difference(servers: dict[str, Server], requests: dict[str, list[bytes]]) -> float:
    """Of any probability of any picture between both sides, which run the same weights."""
    largest = 0.0
    for ours, theirs in zip(requests["vlm"], requests["transformers"], strict=True):
        found = json.loads(ask(servers["vlm"].port, ours))["results"][0]["predictions"]
        scores = {each["label"]: each["probability"] for each in found}
        for each in json.loads(ask(servers["transformers"].port, theirs)):
            largest = max(largest, abs(scores[each["label"]] - each["score"]))
    if largest > AGREE:
        raise SystemExit(f"both sides should answer alike, but probabilities differ by up to {largest:.3f}")
    return largest


def measure_load(options: argparse.Namespace) -> dict[str, Any]:
    """Many clients for a while; each asks again as Retry-After says when it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        own = options.model == "tiny-clip"
        model = options.model if own else make_folder(MODELS[options.model], Path(folder) / "clip")
        server = our_server(model, "--queue", str(options.queue))
        try:
            requests = requests_for(server, label_set(options.labels))
            ask(server.port, requests[0])
            outcome = run_clients(server.port, requests, clients=options.clients, seconds=options.seconds)
            memory = server.peak_mb()
        finally:
            server.end()
    found = outcome.summary() | {"lost_first": outcome.lost[:5]}
    return {"labels": options.labels, "queue": options.queue, "outcome": found, "peak_mb": {"vlm": memory}}


def page(result: dict[str, Any]) -> str:
    """The comparison as a small page."""
    ratio = result["ratio"]
    rows = [
        f"| {result['model']}, {result['labels']} labels | {name} | {values['requests_per_second']:.1f} "
        f"| {values['p50_ms']:,.0f} | {values['p99_ms']:,.0f} | {values['cpu_ms_per_request']:,.0f} "
        f"| {result['peak_mb'][name]:,.0f} | {times} |"
        for name, times in (
            ("vlm", f"**{ratio['median']:.1f}** [{ratio['low']:.1f}, {ratio['high']:.1f}]"),
            ("transformers", "1"),
        )
        for values in [result["median"][name]]
    ]
    weights = (
        f"the same random weights, answers alike to {result['largest_difference']:.4f}"
        if result["same_weights"]
        else "the shipped model against a CLIPModel of its shape"
    )
    return "\n".join(
        [
            f"# `vlm serve`, {result['model']}, {result['labels']} labels, {result['clients']} clients",
            "",
            "| | service | requests/s | p50, ms | p99, ms | CPU of a request, ms | peak memory, MB | times as many |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"{result['rounds']} rounds in turns of {result['seconds_of_a_turn']:g} s; ratio: median of the rounds and "
            f"{100 * ratio['coverage']:.0f} % interval; {weights}.",
            "",
            about(result),
            "",
        ]
    )


def load_page(result: dict[str, Any]) -> str:
    """The load as a small page."""
    found = result["outcome"]
    return "\n".join(
        [
            f"# `vlm serve`, {result['model']}, {result['clients']} clients at once",
            "",
            "| model | clients | queue | seconds | answered | told to come back (429) | lost | requests/s | p50, ms "
            "| p99, ms | peak memory, MB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            f"| {result['model']}, {result['labels']} labels | {result['clients']} | {result['queue']} "
            f"| {found['seconds']:.0f} | {found['requests']:,} | {found['refused']:,} | {found['lost']} "
            f"| {found['requests_per_second']:.1f} | {found['p50_ms']:,.0f} | {found['p99_ms']:,.0f} "
            f"| {result['peak_mb']['vlm']:,.0f} |",
            "",
            about(result),
            "",
        ]
    )


def about(result: dict[str, Any]) -> str:
    """Machine and versions in a line."""
    side = result["picture_side"]
    return f"{result['machine']}; pictures of {side} x {side} pixels; {listed(result['versions'])}."


if __name__ == "__main__":
    main()
