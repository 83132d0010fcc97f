"""Tokens per second under load, and what each request waits for: requests come and go as a server's do.

Closed loop: a given number of requests is always in flight; where one ends, the next begins. Open loop: requests arrive at random, at a
given rate, whatever is in flight. Both go through `LLM.astream`'s own road, in the thread that steps the engine for servers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipo.bench.grid import Results
from pipo.bench.subjects import DRAFTERS, Setting, Subject, open_subjects
from pipo.engine.request import RequestOutput
from pipo.errors import ConfigError
from pipo.run_record import describe_session

OPEN_LOOP_SEQS = 64
"""Requests that decode together at most in an open loop; others wait."""
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How requests come. Either `concurrency` of them in flight, or `rate` a second on average.

    Lengths vary: each is drawn from `length · (1 ± vary)`, the same for every method; at 0 all requests of a loop would end together.
    """

    concurrency: int | None = None
    rate: float | None = None
    num_requests: int = 64
    prompt_tokens: int = 512
    reply_tokens: int = 128
    vary: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for what can't be."""
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("a load has a concurrency or a rate")
        for name in ("concurrency", "num_requests", "prompt_tokens", "reply_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name.removeprefix('num_')} must be at least 1, got {value}")
        if self.rate is not None and not self.rate > 0:
            raise ConfigError(f"rate must be above 0 requests a second, got {self.rate}")
        if not 0 <= self.vary < 1:
            raise ConfigError(f"vary is a share of a length, from 0 to below 1, got {self.vary}")

    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of prompt and reply, request by request."""
        generator = random.Random(f"{self.seed} lengths")
        means = (self.prompt_tokens, self.reply_tokens)

        def draw(mean: int) -> int:
            return max(1, round(mean * generator.uniform(1 - self.vary, 1 + self.vary)))

        return [(draw(means[0]), draw(means[1])) for _ in range(self.num_requests)]

    @property
    def longest(self) -> tuple[int, int]:
        """The longest prompt and reply that may come."""
        return round(self.prompt_tokens * (1 + self.vary)), round(self.reply_tokens * (1 + self.vary))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRow:
    """One method under one load. Percentiles are over requests; TTFT is from arrival, so it holds what a request waited."""

    method: str
    concurrency: int | None
    rate: float | None
    num_requests: int
    prompt_tokens: int
    """Means."""
    reply_tokens: int
    seconds: float
    """From the first arrival to the last token."""
    requests_per_s: float
    tokens_per_s: float
    """Visible tokens of replies."""
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    tpot_p99_s: float
    commit: float | None = None
    """Drafts kept / steps, as measured. `None` for a method without drafts."""
    draft_vocab: int | None = None


def bench_throughput(
    setting: Setting,
    loads: Sequence[Load],
    *,
    save: Callable[[Results[LoadRow]], None] = lambda results: None,
    report: Callable[[int], None] = lambda num_runs: None,
) -> Results[LoadRow]:
    """Run every load on every method, after a short one that warms up.

    Args:
        save: called with what there is after every run. report: called after every run with how many there are in all.

    Raises:
        ConfigError: a request that is beyond what a model can hold; nothing has been measured then.
    """
    subjects = open_subjects(setting, max(load.concurrency or OPEN_LOOP_SEQS for load in loads))
    for subject in subjects:
        for load in loads:
            subject.check_room(*load.longest)
    model = subjects[0].llm.model
    results: Results[LoadRow] = Results(
        kind="throughput",
        shape=setting.shape,
        models=setting.models,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        record=describe_session(),
    )
    for load in loads:
        for subject in subjects:
            run_load(subject, _warm(load))
            results = results.with_rows([*results.rows, run_load(subject, load)])
            save(results)
            report(len(loads) * len(subjects))
    results = results.completed()
    save(results)
    return results


def _warm(load: Load) -> Load:
    """As many rows at once, and little to do."""
    together = load.concurrency or 1
    few = {"prompt_tokens": min(16, load.prompt_tokens), "reply_tokens": min(4, load.reply_tokens)}
    return Load(concurrency=together, num_requests=together, vary=0.0, seed=load.seed, **few)


def run_load(subject: Subject, load: Load) -> LoadRow:
    """One load on one method, through the engine's own thread."""
    start = time.perf_counter()
    try:
        outputs = asyncio.run(_serve(subject, load))
    finally:
        subject.llm.wait_until_idle()
    seconds = time.perf_counter() - start
    num_tokens = sum(output.num_tokens for output in outputs)
    ttft = _percentiles([output.ttft_s for output in outputs])
    tpot = _percentiles([output.tpot_s for output in outputs])
    steps = sum(output.num_pairs for output in outputs)
    return LoadRow(
        method=subject.method,
        concurrency=load.concurrency,
        rate=load.rate,
        num_requests=len(outputs),
        prompt_tokens=load.prompt_tokens,
        reply_tokens=load.reply_tokens,
        seconds=seconds,
        requests_per_s=len(outputs) / seconds,
        tokens_per_s=num_tokens / seconds,
        ttft_p50_s=ttft[0],
        ttft_p90_s=ttft[1],
        ttft_p99_s=ttft[2],
        tpot_p50_s=tpot[0],
        tpot_p90_s=tpot[1],
        tpot_p99_s=tpot[2],
        commit=sum(output.num_committed for output in outputs) / steps if subject.method in DRAFTERS else None,
        draft_vocab=subject.draft_vocab,
    )


def _percentiles(values: Sequence[float | None]) -> list[float]:
    """A reply of one token has no time per token."""
    found = [value for value in values if value is not None]
    return [float(value) for value in np.percentile(found, PERCENTILES)] if found else [0.0] * len(PERCENTILES)


async def _serve(subject: Subject, load: Load) -> list[RequestOutput]:
    """All requests of a load, in the order of their ends."""
    requests = _requests(subject, load)
    done: list[RequestOutput] = []

    async def answer(request: tuple[list[int], int]) -> None:
        prompt, num_tokens = request
        done.extend(await subject.llm.agenerate({"prompt_token_ids": prompt}, subject.params(num_tokens)))

    async def keep_going() -> None:
        for request in requests:  # all workers take from one iterator
            await answer(request)

    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            for _ in range(load.concurrency):
                group.create_task(keep_going())
        else:
            gaps = random.Random(f"{load.seed} gaps")
            for request in requests:
                group.create_task(answer(request))
                await asyncio.sleep(gaps.expovariate(load.rate or 1.0))
    return done


def _requests(subject: Subject, load: Load) -> Iterator[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(load.seed)
    for prompt_tokens, reply_tokens in load.lengths():
        yield torch.randint(subject.llm.vocab_size, (prompt_tokens,), generator=generator).tolist(), reply_tokens
