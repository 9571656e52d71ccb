"""What the service counts, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("vlm_requests", "Requests answered", ["route", "method", "status"], registry=registry)
        self.seconds = Histogram(
            "vlm_request_seconds", "Seconds from a request's head to its answer", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_size = Histogram("vlm_batch_size", "Pictures that ran at once", buckets=SIZES, registry=registry)
        self.queue_length = Gauge("vlm_queue_length", "Requests accepted and not yet answered", registry=registry)
        self.label_cache = Counter("vlm_label_cache", "Lookups of label sets", ["result"], registry=registry)
        self.text_batches = Counter("vlm_text_batches", "Runs of the text tower", registry=registry)
        self.dropped = Counter("vlm_dropped", "Requests dropped since their client was gone", registry=registry)
        for result in ("hit", "miss"):
            self.label_cache.labels(result)
