"""From a checked request to its response: in one piece, or as server-sent events, one per decode step of each choice."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion as _Completion
from openai.types.completion_choice import CompletionChoice
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

import pipo
from pipo.server.api_error import ApiError, of_exception
from pipo.server.choice import ChatChoice, Choice, TextChoice, Wanted
from pipo.server.job import ClientGone, Desk, Job, while_connected
from pipo.server.metrics import Metrics

log = logging.getLogger("pipo.server")

Kind = Literal["chat", "text"]
DONE = b"data: [DONE]\n\n"
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""What Python, and so many a client, takes for the end of a line, though neither JSON nor server-sent events do."""
LAST_WORDS_S = 1.0
"""How long a client that reads too slowly is given to hear why it is cut off."""


class TextChunkChoice(CompletionChoice):
    """As a stream has it: not finished before its last."""

    finish_reason: Literal["stop", "length", "content_filter"] | None  # type: ignore[assignment]


class TextChunk(_Completion):
    """A chunk of a plain completion."""

    choices: list[TextChunkChoice]  # type: ignore[assignment]


WHOLE: dict[Kind, type[BaseModel]] = {"chat": ChatCompletion, "text": Completion}
CHUNK: dict[Kind, type[BaseModel]] = {"chat": ChatCompletionChunk, "text": TextChunk}
OBJECT: dict[Kind, tuple[str, str]] = {
    "chat": ("chat.completion", "chat.completion.chunk"),
    "text": ("text_completion", "text_completion"),
}
PREFIX: dict[Kind, str] = {"chat": "chatcmpl", "text": "cmpl"}


@dataclass
class Plan:
    """A job, and what of it the client wants to read."""

    kind: Kind
    job: Job
    wanted: list[Wanted]
    """One per prompt."""
    stream: bool
    include_usage: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    choices: list[Choice] = field(init=False)

    def __post_init__(self) -> None:
        maker: Callable[[int, Wanted], Choice] = ChatChoice if self.kind == "chat" else TextChoice
        n = len(self.job.requests[0])
        self.choices = [maker(index, self.wanted[index // n]) for index in range(self.job.num_choices)]

    async def whole(self) -> bytes:
        """The response in one piece."""
        async with aclosing(self.job.events()) as events:
            async for index, event in events:
                self.choices[index].chunk(event)
        return self._encode(WHOLE[self.kind], 0, [choice.whole() for choice in self.choices], {"usage": self._usage()})

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The response piece by piece, the mark of its end included."""
        more = {"usage": None} if self.include_usage else {}
        async with aclosing(self.job.events()) as events:
            async for index, event in events:
                yield self._chunk([self.choices[index].chunk(event)], more)
        if self.include_usage:
            yield self._chunk([], {"usage": self._usage()})
        yield DONE

    def _usage(self) -> dict[str, Any]:
        return self.job.usage(sum(choice.num_reasoning_tokens for choice in self.choices))

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        return b"data: " + self._encode(CHUNK[self.kind], 1, choices, more) + b"\n\n"

    def _encode(self, model: type[BaseModel], place: int, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        body = {
            "id": f"{PREFIX[self.kind]}-{self.id}",
            "object": OBJECT[self.kind][place],
            "created": self.created,
            "model": self.job.model,
            "choices": choices,
            "system_fingerprint": f"pipo-{pipo.__version__}",
            **more,
        }
        return model.model_validate(body).model_dump_json(exclude_unset=True).translate(LINE_ENDS).encode()


class Exchange(Response):
    """A response that does the work when it is sent: lets the request in, prepares it, runs it, and lets go of it.

    Args:
        prepare: makes the plan; runs in a thread.
        num_samples: that the request asks for.
        timeout_s: for all of it.
    """

    def __init__(
        self, desk: Desk, metrics: Metrics, model: str, num_samples: int, timeout_s: float, prepare: Callable[[], Plan]
    ) -> None:
        super().__init__()
        self._desk = desk
        self._metrics = metrics
        self._model = model
        self._num_samples = num_samples
        self._timeout_s = timeout_s
        self._prepare = prepare
        self._streaming = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Errors become responses, or the last event of a stream that has begun."""
        started_s = time.perf_counter()
        try:
            with self._desk.enter(self._model, self._num_samples):
                await while_connected(receive, self._answer(scope, receive, send))
        except ClientGone:
            self._metrics.disconnects.inc()
        except Exception as error:  # noqa: BLE001 (told to the client, and logged where it is not the client's)
            await self._fail(error, scope, receive, send)
        finally:
            self._metrics.latency.labels(self._model).observe(time.perf_counter() - started_s)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self._timeout_s):
            plan = await asyncio.to_thread(self._prepare)
            if plan.stream:
                await self._stream(plan, send)
            else:
                body = await plan.whole()
                await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, plan: Plan, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._streaming = True
        async with aclosing(plan.chunks()) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        if isinstance(error, TimeoutError):
            error = ApiError(504, f"the request took longer than {self._timeout_s:g} s", code="timeout")
        told = of_exception(error)
        if told.status >= 500 and told is not error:
            log.error("a request failed", exc_info=error)
        if not self._streaming:
            await told.response()(scope, receive, send)
            return
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                body = b"data: " + bytes(told.response().body) + b"\n\n" + DONE
                await send({"type": "http.response.body", "body": body, "more_body": False})
        except TimeoutError:
            cut = scope.get("extensions", {}).get("pipo.cut")
            if cut is not None:
                cut()
