"""What Prometheus is told: counts and times, nothing of any image, no label of any prediction."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for each number, of when it was first counted


class Metrics:
    """One server's numbers, in a registry of their own.

    How often each label was said is left out on purpose: read before and after one request, it would tell one
    patient's finding.
    """

    def __init__(self) -> None:
        self.registry = all_ = CollectorRegistry()
        timed = partial(Histogram, buckets=_SECONDS, registry=all_)
        self.requests = Counter("zoo_requests", "Requests by route and status.", ["route", "status"], registry=all_)
        self.seconds = timed("zoo_request_seconds", "Head of a request to its answer.", ["route"])
        self.queue = Gauge("zoo_queue_images", "Images accepted and not answered yet.", registry=all_)
        self.batch = Histogram("zoo_batch_images", "Images computed together.", buckets=_SIZES, registry=all_)
        self.decode_seconds = timed("zoo_decode_seconds", "Checking, decoding and resizing an image.")
        self.inference_seconds = timed("zoo_inference_seconds", "A batch in the network.", ["model"])
        self.images = Counter("zoo_images", "Images by model and outcome.", ["model", "outcome"], registry=all_)
        self.full = Counter("zoo_queue_full", "Requests sent away because the queue was full.", registry=all_)
        self.closed = Counter("zoo_connections_closed", "Connections closed on clients.", ["why"], registry=all_)
        self.connections = Gauge("zoo_connections", "Open connections.", registry=all_)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)
