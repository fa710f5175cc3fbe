"""What the server counts, under TensorFlow Serving's names, as a page for Prometheus."""

import bisect
import contextlib
import os
import threading
import time
from collections.abc import Iterator

from align_tf.server import protos
from align_tf.server.status_codes import RequestError

DEFAULT_PATH = "/monitoring/prometheus/metrics"
CONTENT_TYPE = "text/plain"


def _exponential(scale: float, growth: float, count: int) -> list[float]:
    return [scale * growth**power for power in range(count)]


_LATENCY_LIMITS = _exponential(10, 1.8, 33)  # microseconds
# metric: its labels, a histogram's bucket limits; a counter has none
_METRICS = {
    "request_count": (("model_name", "status"), None),
    "request_latency": (("model_name", "API", "entrypoint"), _LATENCY_LIMITS),
    "runtime_latency": (("model_name", "API", "runtime"), _LATENCY_LIMITS),
    "batching_session:queuing_latency": (("thread_pool_name",), _exponential(100, 1.2, 52)),
    "batching_session:wrapped_run_count": ((), None),
}
_PREFIX = ":tensorflow:serving:"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class _Histogram:
    def __init__(self, limits: list[float]):
        self.counts, self.sum = [0] * (len(limits) + 1), 0.0


class Metrics:
    """Counters and histograms that several threads may add to."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters: dict[str, dict[tuple[str, ...], int]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], _Histogram]] = {}

    def count(self, name: str, *labels: str) -> None:
        """Adds one to a counter.

        Args:
            name: a counter of _METRICS.
            labels: a value for each of its labels.
        """
        with self._lock:
            values = self._counters.setdefault(name, {})
            values[labels] = values.get(labels, 0) + 1

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """Adds a duration to a histogram, which is of microseconds.

        Args:
            name: a histogram of _METRICS.
            seconds: how long it took.
            labels: a value for each of its labels.
        """
        limits, micros = _METRICS[name][1], seconds * 1e6
        with self._lock:
            values = self._histograms.setdefault(name, {})
            histogram = values.setdefault(labels, _Histogram(limits))
            histogram.counts[bisect.bisect_left(limits, micros)] += 1
            histogram.sum += micros

    @contextlib.contextmanager
    def request(self, model: str, api: str, entrypoint: str) -> Iterator[None]:
        """Surrounds a request: counts it by its status, and times it if it succeeds."""
        started, status = time.monotonic(), "INTERNAL"
        try:
            yield
            status = "OK"
            self.observe("request_latency", time.monotonic() - started, model, api, entrypoint)
        except RequestError as error:
            status = error.code
            raise
        except MemoryError:
            status = "RESOURCE_EXHAUSTED"
            raise
        finally:
            self.count("request_count", model, status)

    def page(self) -> bytes:
        """Returns all of them in Prometheus's text format."""
        lines = []
        with self._lock:
            for name, (keys, limits) in _METRICS.items():
                if limits is None and name in self._counters:
                    lines.append(f"# TYPE {_PREFIX}{name} counter")
                    for labels, value in self._counters[name].items():
                        lines.append(f"{_PREFIX}{name}{{{_pairs(keys, labels)}}} {value}")
                elif name in self._histograms:
                    lines.append(f"# TYPE {_PREFIX}{name} histogram")
                    for labels, histogram in self._histograms[name].items():
                        lines += _histogram_lines(name, _pairs(keys, labels), limits, histogram)
        return ("\n".join(lines) + "\n").encode()


def _pairs(keys: tuple[str, ...], values: tuple[str, ...]) -> str:
    escaped = [value.translate(_ESCAPES) for value in values]
    return ",".join(f'{key}="{value}"' for key, value in zip(keys, escaped, strict=True))


def _histogram_lines(
    name: str, labels: str, limits: list[float], histogram: _Histogram
) -> list[str]:
    lines, total = [], 0
    for limit, count in zip([*limits, None], histogram.counts, strict=True):
        total += count
        le = "+Inf" if limit is None else f"{limit:g}"
        lines.append(f'{_PREFIX}{name}_bucket{{{labels},le="{le}"}} {total}')
    lines.append(f"{_PREFIX}{name}_sum{{{labels}}} {histogram.sum:.17g}")
    lines.append(f"{_PREFIX}{name}_count{{{labels}}} {total}")
    return lines


def read_monitoring_config(path: str | os.PathLike) -> str | None:
    """Reads TensorFlow Serving's monitoring config file.

    Returns:
        The path under which the page is served; None if the file does not enable it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not parse, or the path is not one.
    """
    kind = "monitoring config"
    proto = protos.read_text_proto(path, protos.MonitoringConfig(), kind)
    if not proto.prometheus_config.enable:
        return None
    served_at = proto.prometheus_config.path or DEFAULT_PATH
    if not served_at.startswith("/") or served_at.lower().startswith("/v1/"):
        raise ValueError(f'{path}: path is "{served_at}", expected one like "{DEFAULT_PATH}"')
    return served_at
