"""Talking to a server in this process: requests, streams, and what must hold for every answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2


def client_of(app: Any, **headers: str) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers, timeout=60)


def post(client: httpx2.AsyncClient, body: dict[str, Any], path: str = "/v1/chat/completions") -> httpx2.Response:
    async def run() -> httpx2.Response:
        return await client.post(path, json=body)

    return asyncio.run(run())


def stream(client: httpx2.AsyncClient, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[Any]:
    async def run() -> list[Any]:
        async with client.stream("POST", path, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
            assert response.status_code == 200, response.text
            assert response.headers["content-type"].startswith("text/event-stream")
            return [event async for event in events_of(response)]

    return asyncio.run(run())


def ok(response: httpx2.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


async def events_of(response: httpx2.Response) -> AsyncIterator[Any]:
    """The JSON of each server-sent event, up to `[DONE]`, which must come last."""
    done = False
    async for line in response.aiter_lines():
        if not line:
            continue
        assert not done, f"after [DONE]: {line}"
        assert line.startswith("data: "), line
        done = line == "data: [DONE]"
        if not done:
            yield json.loads(line[6:])
    assert done, "the stream has no [DONE]"
