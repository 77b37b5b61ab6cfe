"""Counters and histograms of one node's API, as Prometheus text.

Each app has its own registry, so that several nodes in one process do not mix. Facts about the
swarm are read from `Service.status()` when somebody asks, never on a timer.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from covey.node.service import Finished

# From a LAN of fast machines to a Raspberry Pi behind a relay.
TTFT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TPOT_BUCKETS_S = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """What the API counts; call from the node's event loop only."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "covey_http_requests_total",
            "Answered requests.",
            ["route", "status"],
            registry=registry,
        )
        self.generations = Counter(
            "covey_generations_total",
            "Generations that ended, by stop, length, refused, failed or cancelled.",
            ["outcome"],
            registry=registry,
        )
        self.active = Gauge("covey_active_generations", "Generations now.", registry=registry)
        self.tokens = Counter("covey_generated_tokens_total", "Tokens made.", registry=registry)
        self.prompt_tokens = Counter(
            "covey_prompt_tokens_total", "Tokens of admitted prompts.", registry=registry
        )
        self._ttft = Histogram(
            "covey_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=TTFT_BUCKETS_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "covey_time_per_output_token_seconds",
            "Mean over the tokens after the first of one generation.",
            buckets=TPOT_BUCKETS_S,
            registry=registry,
        )
        registry.register(_SwarmCollector(status))

    def observe(self, finished: Finished) -> None:
        """Take the times of a generation that ended well."""
        if finished.completion_tokens > 0:
            self._ttft.observe(finished.ttft_s)
        if finished.completion_tokens > 1:
            self._tpot.observe(finished.decode_s / (finished.completion_tokens - 1))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestMeter:
    """ASGI middleware: counts answers by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on and count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted_send)
        finally:
            # The template, not the path: anybody can invent paths.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status or 500)).inc()


class _SwarmCollector(Collector):
    """Members, and the link to each, from `members` of the status: `peer_id`, `is_live`, `link`.

    What is missing there is missing here; a scrape never fails for it.
    """

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance, or registering would ask for the status."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """What the status says now."""
        rows = self._status().get("members")
        # By peer id: Prometheus refuses the same sample twice.
        members = {
            str(row.get("peer_id")): row
            for row in (rows if isinstance(rows, list) else ())
            if isinstance(row, Mapping)
        }
        links = {
            peer_id: link
            for peer_id, member in members.items()
            if isinstance(link := member.get("link"), Mapping)
        }
        n_live = sum(member.get("is_live") is True for member in members.values())
        by_state = GaugeMetricFamily("covey_members", "Members of the swarm.", labels=["state"])
        by_state.add_metric(["live"], n_live)
        by_state.add_metric(["silent"], len(members) - n_live)
        yield by_state
        by_kind = GaugeMetricFamily("covey_links", "Open links.", labels=["kind"])
        for kind, count in sorted(Tally(str(link.get("kind")) for link in links.values()).items()):
            by_kind.add_metric([kind], count)
        yield by_kind
        rtt = GaugeMetricFamily("covey_link_rtt_seconds", "Round trip.", labels=["peer_id"])
        sent = CounterMetricFamily("covey_link_sent_bytes", "Sent.", labels=["peer_id"])
        received = CounterMetricFamily("covey_link_received_bytes", "Received.", labels=["peer_id"])
        for family, name in ((rtt, "rtt_s"), (sent, "bytes_sent"), (received, "bytes_received")):
            for peer_id, link in links.items():
                if isinstance(value := link.get(name), (int, float)):
                    family.add_metric([peer_id], value)
            yield family
