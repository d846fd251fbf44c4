"""What the server counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Meter:
    """Counters of one server."""

    def __init__(self) -> None:
        """Make counters at zero.

        Raises:
            ValueError: where prometheus-client is not installed.
        """
        prometheus = _prometheus()
        self._registry = prometheus.CollectorRegistry()
        own = {"registry": self._registry}
        self._requests = prometheus.Counter(
            "gato_requests", "Requests by route and status.", ("route", "status"), **own
        )
        self._seconds = prometheus.Histogram(
            "gato_request_seconds", "Seconds per request.", ("route",), buckets=SECONDS, **own
        )
        self._tokens = prometheus.Counter(
            "gato_tokens", "Tokens read (in) and written (out).", ("direction",), **own
        )
        self._refused = prometheus.Counter(
            "gato_rejected", "Requests turned away by their head or size.", ("reason",), **own
        )
        self._prometheus = prometheus
        prometheus.ProcessCollector(registry=self._registry)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Let `value` tell a figure whenever somebody looks."""
        gauge = self._prometheus.Gauge(f"gato_{name}", about, registry=self._registry)
        gauge.set_function(value)

    def request(self, route: str, status: int, seconds: float | None) -> None:
        """Count an answered request, and how long it took if that is known."""
        self._requests.labels(route, str(status)).inc()
        if seconds is not None:
            self._seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count a request that was turned away by its head or size."""
        self._refused.labels(reason).inc()

    def tokens(self, read: int, written: int) -> None:
        """Count tokens."""
        self._tokens.labels("in").inc(read)
        self._tokens.labels("out").inc(written)

    def page(self) -> tuple[bytes, str]:
        """Return all figures, and the type of that text."""
        page: bytes = self._prometheus.generate_latest(self._registry)
        return page, str(self._prometheus.CONTENT_TYPE_LATEST)


def _prometheus() -> Any:
    try:
        import prometheus_client
    except ImportError as error:
        raise missing(error) from error
    return prometheus_client


def missing(error: ImportError) -> ValueError:
    """Return what to say where a package of the server is not installed."""
    return ValueError(
        f"serving needs packages that do not import ({error}). Install them: "
        f'pip install "gato[serve]"'
    )
