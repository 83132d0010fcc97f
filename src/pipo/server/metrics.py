"""What `/metrics` tells Prometheus. Each app has a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipo.engine.llm import LLM
from pipo.engine.request import RequestOutput
from pipo.engine.runner import PipoRunner

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS_PER_STEP = tuple(1 + step / 10 for step in range(11))
RATES = tuple(step / 10 for step in range(11))
MODEL = ("model",)


class Metrics:
    """Counts of finished samples, and the engines' state at the moment of asking."""

    def __init__(self, models: Mapping[str, LLM]) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("pipo_requests", "Responses, by path and status", ("path", "status"), **kept)
        self.disconnects = Counter("pipo_disconnects", "Requests whose client went away first", **kept)
        self.finished = Counter("pipo_samples_finished", "Samples that ended, by reason", ("model", "reason"), **kept)
        self.prompt_tokens = Counter("pipo_prompt_tokens", "Prompt tokens of finished requests", MODEL, **kept)
        self.cached_tokens = Counter(
            "pipo_cached_prompt_tokens", "Those of them that were not prefilled again", MODEL, **kept
        )
        self.tokens = Counter("pipo_generated_tokens", "Visible tokens", MODEL, **kept)
        self.pairs = Counter("pipo_pairs", "Pairs written: decoding steps, and one for each prefill", MODEL, **kept)
        self.committed = Counter("pipo_drafts_committed", "Drafts that became text", MODEL, **kept)
        self.rejected = Counter("pipo_drafts_rejected", "Drafts that the gate turned down", MODEL, **kept)
        self.ttft = Histogram("pipo_ttft_seconds", "Arrival to first token", MODEL, buckets=SECONDS, **kept)
        self.tpot = Histogram(
            "pipo_tpot_seconds", "Per visible token after the first step", MODEL, buckets=SECONDS, **kept
        )
        self.latency = Histogram(
            "pipo_request_seconds", "Arrival to the end of the response", MODEL, buckets=SECONDS, **kept
        )
        self.tokens_per_step = Histogram(
            "pipo_tokens_per_step", "Visible tokens per pair, of a sample", MODEL, buckets=TOKENS_PER_STEP, **kept
        )
        self.commit_rate = Histogram(
            "pipo_commit_rate", "Committed drafts per pair, of a sample", MODEL, buckets=RATES, **kept
        )
        self.registry.register(EngineState(models))

    def count(self, model: str, output: RequestOutput) -> None:
        """Count a sample that ended."""
        self.finished.labels(model, output.finish_reason).inc()
        self.tokens.labels(model).inc(output.num_tokens)
        self.pairs.labels(model).inc(output.num_pairs)
        self.committed.labels(model).inc(output.num_committed)
        self.rejected.labels(model).inc(output.num_rejected)
        if output.ttft_s is not None:
            self.ttft.labels(model).observe(output.ttft_s)
        if output.tpot_s is not None:
            self.tpot.labels(model).observe(output.tpot_s)
        if output.num_pairs:
            self.tokens_per_step.labels(model).observe(output.tokens_per_step)
            self.commit_rate.labels(model).observe(output.commit_rate)

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class EngineState(Collector):
    """Queue, running samples and caches, read when asked for."""

    def __init__(self, models: Mapping[str, LLM]) -> None:
        self._models = models
        self._started_s = time.time()

    def collect(self) -> Iterator[Metric]:
        """One value per model of each."""
        running = GaugeMetricFamily("pipo_samples_running", "Samples that decode now", labels=MODEL)
        waiting = GaugeMetricFamily("pipo_samples_waiting", "Samples in the queue", labels=MODEL)
        reading = GaugeMetricFamily("pipo_samples_reading", "Samples whose long prompt is read in chunks", labels=MODEL)
        usage = GaugeMetricFamily(
            "pipo_cache_usage_ratio", "Share of the cache's memory that samples take", labels=MODEL
        )
        held = GaugeMetricFamily("pipo_prefix_cache_bytes", "Memory of kept prefixes", labels=MODEL)
        hits = CounterMetricFamily("pipo_prefix_cache_hits", "Prefills that went on from a kept prefix", labels=MODEL)
        misses = CounterMetricFamily("pipo_prefix_cache_misses", "Prefills that found none", labels=MODEL)
        for name, llm in self._models.items():
            engine = llm.engine
            rows = list(engine.running)
            running.add_metric([name], len(rows))
            waiting.add_metric([name], len(engine.waiting))
            reading.add_metric([name], len(engine.reading))
            usage.add_metric([name], cache_usage(llm))
            prefixes = engine.runner.prefixes if isinstance(engine.runner, PipoRunner) else None
            held.add_metric([name], prefixes.num_bytes if prefixes else 0)
            hits.add_metric([name], prefixes.num_hits if prefixes else 0)
            misses.add_metric([name], prefixes.num_misses if prefixes else 0)
        yield from (running, waiting, reading, usage, held, hits, misses)
        yield GaugeMetricFamily("pipo_start_time_seconds", "When the server started (Unix time)", self._started_s)


def cache_usage(llm: LLM) -> float:
    """Share of the cache's memory that samples take, those whose prompt is read included: rows are as long as the longest."""
    engine = llm.engine
    rows = [*engine.running, *engine.reading]
    length = max(map(engine.runner.num_positions, rows), default=0)
    budget = engine.budget
    return len(rows) * (budget.row_bytes + length * budget.position_bytes) / budget.total_bytes
