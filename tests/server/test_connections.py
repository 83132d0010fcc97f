"""Connections that dawdle, on a real socket: heads that never end, clients that never read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipo import LLM
from pipo.server.app import create_app
from pipo.server.lifecycle import Process, configure, listen
from pipo.server.settings import ServerSettings
from server_process import raw


def request_of(ask: dict[str, Any], connection: str = "close") -> bytes:
    body = json.dumps(ask).encode()
    fields = (
        "Host: localhost",
        f"Connection: {connection}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", ""]).encode() + body


def with_server(llm: LLM, settings: ServerSettings, use: Callable[[Process, int], Awaitable[Any]]) -> Any:
    """What `use` returns, given a server in this process and its port."""

    async def run() -> Any:
        app = create_app(llm, settings)
        listener = listen(settings)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        process = Process(configure(app, settings), app)
        task = asyncio.create_task(process.serve(sockets=[listener]))
        try:
            return await use(process, listener.getsockname()[1])
        finally:
            process.should_exit = True
            await task

    return asyncio.run(run())


def test_a_head_that_never_ends_is_cut_off(llm: LLM) -> None:
    async def use(process: Process, port: int) -> None:
        started = time.perf_counter()
        first, later, nothing = await asyncio.gather(
            raw(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"),
            raw(port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea"),
            raw(port, b""),
        )
        assert (first, nothing) == (b"", b"")
        assert later.startswith(b"HTTP/1.1 200 OK")
        assert 0.2 < time.perf_counter() - started < 3

    with_server(llm, ServerSettings(port=0, header_timeout_s=0.3), use)


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_client_that_never_reads_is_cut_off_and_holds_nothing(llm: LLM, connection: str) -> None:
    """Its events stop where the socket's buffers are full; the time limit ends it, and the connection with it."""
    ask = {"model": "pipo", "prompt": "x", "stream": True, "max_tokens": 4000, "ignore_eos": True, "logprobs": 20}

    async def use(process: Process, port: int) -> None:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(request_of(ask, connection))
        started = time.perf_counter()
        while not llm.engine.has_work:
            await asyncio.sleep(0.01)
        while process.server_state.connections or process.server_state.tasks or llm.engine.has_work:
            await asyncio.sleep(0.02)
            assert time.perf_counter() - started < 10, "the connection is still there"
        client.close()

    with_server(llm, ServerSettings(port=0, request_timeout_s=1.0, body_timeout_s=0.5, drain_timeout_s=1.0), use)


def test_a_client_that_reads_slowly_gets_all(llm: LLM) -> None:
    ask = {
        "model": "pipo",
        "prompt": "x",
        "stream": True,
        "max_tokens": 300,
        "ignore_eos": True,
        "seed": 1,
        "logprobs": 5,
    }

    async def use(process: Process, port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(request_of(ask))
        got = b""
        while piece := await reader.read(16384):
            got += piece
            await asyncio.sleep(0.01)
        writer.close()
        return got

    answer = with_server(llm, ServerSettings(port=0), use)
    assert answer.count(b'"token_logprobs"') >= 150
    assert answer.rstrip().endswith(b"0")
    assert b"data: [DONE]" in answer
