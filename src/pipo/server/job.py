"""A request at work: let in, run on the engine, counted, and out again, whatever happens to its client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.types import Message

from pipo.engine.llm import LLM
from pipo.engine.request import RequestOutput, StreamEvent
from pipo.engine.sequence import Sequence
from pipo.server.api_error import ApiError
from pipo.server.metrics import Metrics
from pipo.server.settings import ServerSettings

T = TypeVar("T")

SAMPLE_ERRORS = {
    "not_finite": (500, "the model's numbers were not finite, and the sample ended"),
    "grammar": (400, "the grammar or schema allowed no token, and the sample ended"),
}


class ClientGone(Exception):
    """The client went away before its response was complete."""


class Desk:
    """Lets requests in: as many samples as may run and wait, and none while the server drains."""

    def __init__(self, settings: ServerSettings, models: Mapping[str, LLM]) -> None:
        self._retry_after = {"Retry-After": str(settings.retry_after_s)}
        self._capacity = {name: llm.engine.max_num_seqs + settings.max_queue for name, llm in models.items()}
        self.num_samples = dict.fromkeys(models, 0)
        """Samples that wait, run or are being prepared, per model."""
        self.draining = False

    @contextlib.contextmanager
    def enter(self, model: str, num_samples: int) -> Iterator[None]:
        """Count `num_samples` in for as long as the body runs.

        Raises:
            ApiError: there is no room (429), there never would be (400), or the server drains (503).
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers=self._retry_after)
        capacity = self._capacity[model]
        if num_samples > capacity:
            raise ApiError(
                400,
                f"prompts × n is {num_samples}; this server holds {capacity} at most",
                param="n",
                code="invalid_value",
            )
        if self.num_samples[model] + num_samples > capacity:
            raise ApiError(
                429,
                f"the queue is full ({capacity} samples run or wait); try again",
                code="queue_full",
                headers=self._retry_after,
            )
        self.num_samples[model] += num_samples
        try:
            yield
        finally:
            self.num_samples[model] -= num_samples


@dataclass
class Job:
    """The prepared prompts of one HTTP request and, once it has run, how its samples ended (by choice index)."""

    model: str
    llm: LLM
    requests: list[list[Sequence]]
    metrics: Metrics
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    @property
    def num_choices(self) -> int:
        """Samples in all."""
        return sum(map(len, self.requests))

    async def events(self) -> AsyncGenerator[tuple[int, StreamEvent], None]:
        """The choice's index and what happened to it, step by step. Closing ends what still runs.

        Raises:
            ApiError: a sample ended with an error.
        """
        n = len(self.requests[0])
        try:
            async with contextlib.aclosing(self.llm.run_requests(self.requests)) as letters:
                async for number, event in letters:
                    index = number * n + event.index
                    if event.finish_reason is not None:
                        self._ended(index, event.output)
                    yield index, event
        finally:
            for _ in range(self.num_choices - len(self.outputs)):
                self.metrics.finished.labels(self.model, "abort").inc()

    def _ended(self, index: int, output: RequestOutput) -> None:
        self.outputs[index] = output
        self.metrics.count(self.model, output)
        if len(self.outputs) == self.num_choices:
            usage = self.usage(0)
            self.metrics.prompt_tokens.labels(self.model).inc(usage["prompt_tokens"])
            self.metrics.cached_tokens.labels(self.model).inc(usage["prompt_tokens_details"]["cached_tokens"])
        if output.finish_reason == "error":
            status, message = SAMPLE_ERRORS[output.error or "not_finite"]
            raise ApiError(status, message, code=output.error)
        if output.finish_reason == "abort":
            raise ApiError(503, "the sample was aborted", code="aborted")

    def usage(self, num_reasoning_tokens: int) -> dict[str, Any]:
        """OpenAI's usage, once all samples have ended. Prompts count once, whatever `n`."""
        firsts = [samples[0] for samples in self.requests]
        prompt_tokens = sum(len(first.prompt_ids) for first in firsts)
        cached = sum(first.num_cached_tokens for first in firsts)
        outputs = self.outputs.values()
        tokens = sum(output.num_tokens for output in outputs)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(output.num_committed for output in outputs),
                "rejected_prediction_tokens": sum(output.num_rejected for output in outputs),
                "reasoning_tokens": num_reasoning_tokens,
            },
        }


async def while_connected(receive: Callable[[], Awaitable[Message]], work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled at once when the client goes away.

    Raises:
        ClientGone
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnect(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
