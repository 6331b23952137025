"""Shell: Prometheus metrics: one registry per process, bounded label values, an HTTP page if a setting asks for it.

Names are `halfmoon_<what>_<unit>`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from halfmoon.errors import ConfigError, Conflict

LABEL_VALUES_MAX = 200  # twice the nodes of the largest cluster designed for; more is a peer's doing
OTHER = "other"
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class BoundedLabel:
    """Lets the first `limit` distinct values through and calls the rest "other": peers cannot grow the registry."""

    def __init__(self, limit: int = LABEL_VALUES_MAX) -> None:
        self._limit = limit
        self._seen: set[str] = set()

    def __call__(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) >= self._limit:
            return OTHER
        self._seen.add(value)
        return value


class Metrics:
    """The metrics of one process. Making a metric twice is a bug (ValueError)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, namespace="halfmoon", registry=self.registry)

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, namespace="halfmoon", registry=self.registry)

    def seconds(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
        """A histogram of durations; `name` ends in `_seconds`."""
        assert name.endswith("_seconds"), name
        return Histogram(name, text, labels, namespace="halfmoon", registry=self.registry, buckets=SECONDS_BUCKETS)

    def serve(self, address: str) -> tuple[str, Callable[[], None]]:
        """Expose the registry at http://address/metrics from a thread; ("host:port" as bound, close).

        Raises:
            Conflict: the port is in use.
            ConfigError: not a host:port of this machine.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(key="metrics_address", value=address, expected="host:port")
        try:
            server, thread = start_http_server(int(port), host, self.registry)
        except OSError as error:
            raise Conflict(f"metrics address {address}: {error.strerror}") from error
        return f"{host}:{server.server_port}", lambda: _close(server, thread)


def _close(server: Any, thread: Any) -> None:
    server.shutdown()
    server.server_close()
    thread.join(timeout=5.0)
