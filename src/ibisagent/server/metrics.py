"""What Prometheus sees of a server, by area: the first part of an address."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily

from ibisagent.server.service import Service

MONAI_PATHS = ("/info/", "/infer/", "/session/", "/datastore/", "/activelearning/", "/train/", "/logs/", "/auth/")
_STATE_AREAS = ("health", "ready", "metrics", "docs")
_WORK_AREAS = ("segment", "sessions", "scans", "worklist", "teaching", "jobs", "models", "mcp")
_AREAS = frozenset((*_STATE_AREAS, *_WORK_AREAS, *(path.strip("/") for path in MONAI_PATHS)))


class Metrics:
    """What Prometheus sees; a registry of its own, so that multiple servers fit in one process."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._service = service
        self._requests = Counter(
            "ibisagent_requests",
            "Requests by method, area and status",
            ["method", "area", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "ibisagent_request_seconds", "Time to answer", ["method", "area"], registry=self.registry
        )
        self.turns = Counter("ibisagent_agent_turns", "Turns that the agent took", registry=self.registry)
        sessions = Gauge("ibisagent_sessions", "Open sessions", registry=self.registry)
        sessions.set_function(lambda: len(service.session_ids))
        waiting = Gauge("ibisagent_waiting_turns", "Turns that wait for the model", registry=self.registry)
        waiting.set_function(lambda: service.policy.waiting)
        self.registry.register(self)

    def collect(self) -> list[GaugeMetricFamily]:
        """Batches of the shared model."""
        batches, turns = self._service.batches
        mean = GaugeMetricFamily("ibisagent_mean_batch", "Turns that are answered together, on average")
        mean.add_metric([], turns / batches if batches else 0.0)
        return [mean]

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count one request. Only known words become labels, so that strangers cannot make new ones."""
        parts = path.strip("/").split("/")
        area = parts[1] if parts[0] == "v1" and len(parts) > 1 else parts[0]
        area = area if area in _AREAS else "other"
        method = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE") else "other"
        self._requests.labels(method, area, str(status)).inc()
        self._seconds.labels(method, area).observe(seconds)
