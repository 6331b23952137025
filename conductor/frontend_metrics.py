"""Shell: what the front end counts and measures, for Prometheus and for the admin API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from conductor.oscillation import Oscillation
from core.fit import Residual
from halfmoon.types import NodeId
from service.metrics import Metrics


class Events(Collector):
    """The process's plain counters as `halfmoon_conductor_events_total{event=...}`, read when the page is asked for.

    Their names are words of the code, so their number is bounded.

    Args:
        counters: the counters now; called in the page's thread.
    """

    def __init__(self, counters: Callable[[], Mapping[str, int]]) -> None:
        self._counters = counters

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily("halfmoon_conductor_events", "What happened, by name", labels=("event",))
        for name, count in sorted(self._counters().items()):
            family.add_metric((name,), count)
        yield family


class Costs(Collector):
    """How far each worker's cost models can be relied on, read when the page is asked for.

    Args:
        residuals: by node and model; called in the page's thread. There are at most `nodes_max` nodes.
    """

    def __init__(self, residuals: Callable[[], Mapping[NodeId, Mapping[str, Residual]]]) -> None:
        self._residuals = residuals

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        labels = ("node", "model")
        error = GaugeMetricFamily("halfmoon_cost_error_ratio", "Mean |actual - predicted| / actual", labels=labels)
        bias = GaugeMetricFamily("halfmoon_cost_bias_ratio", "Mean (actual - predicted) / actual", labels=labels)
        samples = CounterMetricFamily("halfmoon_cost_samples", "Measurements learned", labels=labels)
        refused = CounterMetricFamily("halfmoon_cost_samples_refused", "Measurements that cannot be", labels=labels)
        levels = CounterMetricFamily("halfmoon_cost_level_changes", "Times all became slower or faster", labels=labels)
        for node, models in sorted(self._residuals().items()):
            for model, found in models.items():
                error.add_metric((node, model), found.error)
                bias.add_metric((node, model), found.bias)
                samples.add_metric((node, model), found.samples)
                refused.add_metric((node, model), found.refused)
                levels.add_metric((node, model), found.levels)
        yield from (error, bias, samples, refused, levels)


class Pools(Collector):
    """The loads of the two pools and their swing, read when the page is asked for; the glossary defines both.

    Args:
        oscillation: as it is now; called in the page's thread.
    """

    def __init__(self, oscillation: Callable[[], Oscillation]) -> None:
        self._oscillation = oscillation

    def collect(self) -> Iterator[GaugeMetricFamily]:
        swing = self._oscillation()
        load = GaugeMetricFamily("halfmoon_pool_load_ratio", "Load of a pool; 1 is its limit", labels=("pool",))
        load.add_metric(("prefill",), swing.now.prefill)
        load.add_metric(("decode",), swing.now.decode)
        yield load
        deviation = GaugeMetricFamily("halfmoon_decode_load_deviation_ratio", "Standard deviation of the decode load")
        deviation.add_metric((), swing.decode_deviation)
        yield deviation
        if swing.correlation is not None:
            turns = GaugeMetricFamily("halfmoon_pool_load_correlation_ratio", "Of the two loads; -1: in anti-phase")
            turns.add_metric((), swing.correlation)
            yield turns


class FrontEndMetrics:
    """Plain counters for the admin API, mirrored in the process's Prometheus registry.

    `streams_OUTCOME` counts every Generate call once, by how it ended. `streams_rejected` is more than the machine's
    `requests_rejected` by those that were refused at the door: values out of range, too many streams, a drain.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.counters: Counter[str] = Counter()
        self._requests = metrics.counter("requests", "Requests by terminal event", ("outcome",))
        self._tokens = metrics.counter("output_tokens", "Tokens accepted into streams")
        self._dropped = metrics.counter("dropped_tokens", "Tokens that workers sent in vain", ("verdict",))
        self._ttft = metrics.seconds("ttft_seconds", "From a request's arrival to its first token")
        self._duration = metrics.seconds("request_seconds", "From a request's arrival to its terminal event")
        self._open = metrics.gauge("requests_open", "Requests that have not had their terminal event")

    def token(self, accepted: int) -> None:
        self._tokens.inc(accepted)

    def dropped(self, verdict: str) -> None:
        self.counters[f"tokens_{verdict}"] += 1
        self._dropped.labels(verdict).inc()

    def opened(self, num_open: int) -> None:
        self._open.set(num_open)

    def ended(self, outcome: str, *, ttft_s: float | None, total_s: float, num_open: int) -> None:
        self.counters[f"streams_{outcome}"] += 1
        self._requests.labels(outcome).inc()
        self._duration.observe(total_s)
        self._open.set(num_open)
        if ttft_s is not None:
            self._ttft.observe(ttft_s)
