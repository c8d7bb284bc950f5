"""What Prometheus reads: per adapter, and of the slots."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loralab.serving.store import AdapterState, Report, StoreEvent

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PROOF_STATES = ("proved", "unproved", "refused")


class Metrics:
    """Counters by adapter. Only names of adapters that exist become labels."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        one = ["adapter"]
        self.requests = self._counter("requests", "Answered requests", ["adapter", "outcome"])
        self.tokens = self._counter("tokens", "Tokens read and written", ["adapter", "kind"])
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to the first token", one
        )
        self.lease_seconds = self._histogram(
            "slot_wait_seconds", "From the request until its adapters were in the model", one
        )
        self.load_seconds = self._histogram(
            "adapter_load_seconds", "Attaching and proving an adapter", one
        )
        self.loads = self._counter("adapter_loads", "Adapters put into a slot", one)
        self.evictions = self._counter("adapter_evictions", "Adapters taken out of a slot", one)
        self.refusals = self._counter("adapter_refusals", "Adapters refused on loading", one)
        self.running = self._gauge("requests_running", "Answers being written", one)
        self.waiting = self._gauge("requests_waiting", "Requests in the engine's queue", one)
        self.slot_queue = self._gauge("slot_queue", "Requests that wait for a slot", [])
        self.proof = self._gauge("adapter_proof", "1 for what was found", [*one, "state"])
        self.proof_ms = self._gauge("adapter_proof_ms", "What the last proof took", one)
        self.slots = self._gauge("slots", "Slots for adapters", [])
        self.distinct = self._gauge("working_set_adapters", "Adapters in the last requests", [])
        self.hit_rate = self._gauge(
            "working_set_hit_rate", "Of the last requests, with so many slots", ["slots"]
        )

    def hear(self, event: StoreEvent) -> None:
        """Counts what happens in the store."""
        if event.kind == "loaded":
            self.loads.labels(event.name).inc()
            self.load_seconds.labels(event.name).observe(event.seconds)
        elif event.kind == "evicted":
            self.evictions.labels(event.name).inc()
        else:
            self.refusals.labels(event.name).inc()

    def set_adapters(self, states: Iterable[AdapterState]) -> None:
        """What is known of the adapters now."""
        self.proof.clear()
        self.proof_ms.clear()
        for state in states:
            found = "refused" if state.refused else state.proof.state if state.proof else None
            if found is not None:
                for name in PROOF_STATES:
                    self.proof.labels(state.name, name).set(name == found)
            if state.proof is not None:
                self.proof_ms.labels(state.name).set(state.proof.proof_ms)

    def set_working_set(self, report: Report) -> None:
        """The slots against the last requests."""
        self.slots.set(report.num_slots)
        self.distinct.set(report.num_distinct)
        self.hit_rate.clear()
        for slots, rate in report.hit_rates.items():
            self.hit_rate.labels(str(slots)).set(rate)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, labels: list[str]) -> Counter:
        return Counter(f"loralab_{name}", about, labels, registry=self._registry)

    def _gauge(self, name: str, about: str, labels: list[str]) -> Gauge:
        return Gauge(f"loralab_{name}", about, labels, registry=self._registry)

    def _histogram(self, name: str, about: str, labels: list[str]) -> Histogram:
        return Histogram(f"loralab_{name}", about, labels, registry=self._registry, buckets=SECONDS)
