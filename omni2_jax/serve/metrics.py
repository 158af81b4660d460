"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10)


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        self.sessions = Gauge("omni2_sessions", "Clients that are served now.", registry=registry)
        self.refused = Counter("omni2_refused", "Clients refused: full.", registry=registry)
        self.errors = Counter("omni2_event_errors", "Faulty events.", registry=registry)
        self.responses = Counter(
            "omni2_responses", "Responses, by how they ended.", ["status"], registry=registry
        )
        self.first_audio = Histogram(
            "omni2_first_audio_seconds",
            "From the end of the user's turn to the first audio of the answer.",
            buckets=SECONDS,
            registry=registry,
        )
