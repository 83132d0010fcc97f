"""A real server in a process of its own: faults, load, leaks, and the way out."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from byte_tokenizer import byte_config, save_tokenizer
from pipo import PipoForCausalLM
from server_client import events_of
from server_process import Served, raw, served

KEY = "sk-load"
AUTH = {"Authorization": f"Bearer {KEY}"}
POISON = 259
"""A token whose embedding is not finite, beyond the tokenizer's."""
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny: PipoForCausalLM) -> Path:
    folder = tmp_path_factory.mktemp("served") / "pipo"
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[POISON] = torch.nan
    tiny.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tiny() -> PipoForCausalLM:
    from pipo import PipoConfig

    config = byte_config(vocab_size=260, max_position_embeddings=4096, tie_word_embeddings=False)
    torch.manual_seed(5)
    model = PipoForCausalLM(PipoConfig(config))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    options = (
        "--max-num-seqs",
        "32",
        "--max-queue",
        "600",
        "--max-body-bytes",
        "100000",
        "--threshold",
        "0.45",
        "--allow-weight-updates",
    )
    with served(checkpoint, log, *options, PIPO_API_KEY=KEY) as running:
        yield running


def body(number: int, **changes: Any) -> dict[str, Any]:
    """A request of some kind, told apart by its number. All avoid the poisoned token."""
    rng = random.Random(number)
    settings: dict[str, Any] = {
        "model": "pipo",
        "seed": number,
        "max_tokens": rng.randrange(4, 40),
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "threshold": rng.choice([0.0, 0.45, 1.01]),
        "ignore_eos": rng.random() < 0.7,
        "logit_bias": {str(POISON): -100},
        "return_pairs": rng.random() < 0.2,
        "logprobs": 2 if number % 5 == 0 else None,
        "presence_penalty": rng.choice([0.0, 0.5]),
        "prompt": f"Request {number}: " + "so " * rng.randrange(0, 40),
    }
    if number % 7 == 0:
        schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object", "maxProperties": 1}}}
        settings |= {"response_format": schema, "messages": [{"role": "user", "content": settings.pop("prompt")}]}
        settings["logprobs"] = None
    return settings | changes


def path_of(ask: dict[str, Any]) -> str:
    return CHAT if "messages" in ask else TEXT


def text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"])
    return str((choice.get("message") or choice.get("delta"))["content"])


async def complete(client: httpx2.AsyncClient, ask: dict[str, Any]) -> str:
    response = await client.post(path_of(ask), json=ask)
    assert response.status_code == 200, response.text
    return text_of(response.json()["choices"][0])


async def streamed(client: httpx2.AsyncClient, ask: dict[str, Any], pause_s: float = 0.0) -> str:
    text = ""
    async with client.stream("POST", path_of(ask), json={**ask, "stream": True}) as response:
        assert response.status_code == 200
        async for event in events_of(response):
            text += text_of(event["choices"][0])
            await asyncio.sleep(pause_s)
    return text


# --- the key, from the environment --------------------------------------------------------------------


def test_the_key_of_the_environment_protects(server: Served) -> None:
    assert httpx2.get(f"{server.url}/health", trust_env=False).status_code == 200
    assert httpx2.get(f"{server.url}/v1/models", trust_env=False).status_code == 401
    assert httpx2.get(f"{server.url}/v1/models", headers=AUTH, trust_env=False).status_code == 200
    assert KEY not in server.log.read_text()
    assert "curl" in server.log.read_text()


# --- clients that go away -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slot_at_once(server: Served, stream: bool) -> None:
    ask = body(1, max_tokens=6000, ignore_eos=True, threshold=0.0, stream=stream, n=3)

    async def leave() -> None:
        text = json.dumps(ask)
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
        while not server.metrics(**AUTH)['pipo_samples_running{model="pipo"}']:
            await asyncio.sleep(0.01)
        writer.close()

    before = server.metrics(**AUTH)
    asyncio.run(leave())
    assert server.wait_until_idle(2.0, **AUTH) < 1.0
    after = server.metrics(**AUTH)
    aborted = 'pipo_samples_finished_total{model="pipo",reason="abort"}'
    assert after[aborted] - before.get(aborted, 0) == 3
    assert after["pipo_disconnects_total"] - before["pipo_disconnects_total"] == 1


# --- malformed requests -------------------------------------------------------------------------------


def test_malformed_requests_are_answered_or_cut_off(server: Served) -> None:
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n".encode()
    )
    close = b"Connection: close\r\n"
    cases = [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\nConnection: close\r\n\r\n", b"401"),
        (head + close + b"Content-Length: 3\r\n\r\n{}x", b"400"),
        (head + b"Content-Length: -5\r\n\r\n", b"400"),
        (head + b"Content-Length: 999999999\r\n\r\n", b"413"),
        (head + b"X: " + b"y" * 200_000 + b"\r\n\r\n", b"400"),
        (head + close + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ]

    async def run() -> list[bytes]:
        return await asyncio.gather(*(raw(server.port, data) for data, _ in cases))

    for (data, status), answer in zip(cases, asyncio.run(run()), strict=True):
        # Where the server stops reading early, its answer can get lost on the way.
        allowed = [[status], []] if len(data) > 100_000 else [[status]]
        assert answer.split(b" ")[1:2] in allowed, (data[:60], answer[:200])


# --- load ---------------------------------------------------------------------------------------------


def test_load_and_faults(server: Served) -> None:
    """Hundreds at once: the ones that stay say what they say alone, whatever happens beside them, and nothing is left."""
    rng = random.Random(0)
    numbers = list(range(60))

    async def unloaded() -> dict[int, str]:
        async with server.client(**AUTH) as client:
            return {number: await complete(client, body(number)) for number in numbers}

    alone = asyncio.run(unloaded())
    server.wait_until_idle(5, **AUTH)
    files, resident = server.num_open_files(), server.resident_bytes()

    async def survivor(client: httpx2.AsyncClient, number: int) -> None:
        kind = rng.randrange(3)
        text = await (
            streamed(client, body(number), pause_s=0.02 * (kind == 2)) if kind else complete(client, body(number))
        )
        assert text == alone[number], f"request {number} says something else under load"

    async def leaver(client: httpx2.AsyncClient, number: int) -> None:
        ask = body(number, max_tokens=3000, ignore_eos=True, n=rng.choice([1, 2]))
        try:
            async with asyncio.timeout(rng.uniform(0.05, 3)):
                await (streamed(client, ask) if rng.random() < 0.5 else complete(client, ask))
        except TimeoutError:
            return

    async def poisoned(client: httpx2.AsyncClient, number: int) -> None:
        ask = {"model": "pipo", "prompt": [72 + number, POISON, 73], "max_tokens": 20}
        response = await client.post(TEXT, json=ask)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "not_finite"

    async def refused(client: httpx2.AsyncClient, number: int) -> None:
        kinds: list[dict[str, Any]] = [
            {"prompt": "x" * 9000},
            {"nonsense": 1},
            {"prompt": "x" * 200_000},
            {"model": "other"},
            {"temperature": -1},
        ]
        ask = {"model": "pipo", "prompt": "x"} | kinds[number % len(kinds)]
        assert (await client.post(TEXT, json=ask)).status_code in (400, 404, 413)

    async def malformed(client: httpx2.AsyncClient, number: int) -> None:
        headers = {"Content-Type": "application/json"}
        assert (await client.post(CHAT, content=b'{"model": "pipo", "messages": [', headers=headers)).status_code == 400

    async def load() -> float:
        kinds = [survivor] * 120 + [leaver] * 80 + [poisoned] * 20 + [refused] * 40 + [malformed] * 20
        rng.shuffle(kinds)
        started = time.perf_counter()
        async with server.client(**AUTH) as client, asyncio.TaskGroup() as group:
            for number, kind in enumerate(kinds):
                group.create_task(kind(client, number % len(numbers)))
                await asyncio.sleep(rng.uniform(0, 0.01))
        return time.perf_counter() - started

    took_s = asyncio.run(load())
    assert took_s < 40
    server.wait_until_idle(3, **AUTH)
    time.sleep(0.3)
    assert server.num_open_files() <= files + 5
    assert server.resident_bytes() < resident + 200 * 2**20
    metrics = server.metrics(**AUTH)
    assert metrics['pipo_samples_finished_total{model="pipo",reason="error"}'] == 20
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


def test_a_poisoned_request_says_what_it_was(server: Served) -> None:
    async def run() -> tuple[httpx2.Response, list[Any]]:
        async with server.client(**AUTH) as client:
            ask = {"model": "pipo", "prompt": [72, POISON], "max_tokens": 4}
            whole = await client.post(TEXT, json=ask)
            async with client.stream("POST", TEXT, json={**ask, "stream": True}) as response:
                return whole, [event async for event in events_of(response)]

    whole, events = asyncio.run(run())
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "not_finite"
    assert events[-1]["error"]["code"] == "not_finite"


# --- the way out --------------------------------------------------------------------------------------


def test_sigterm_drains(checkpoint: Path, tmp_path: Path) -> None:
    """What runs and what waits is finished, nobody new is let in, and then the process ends by itself."""
    with served(checkpoint, tmp_path / "log", "--max-num-seqs", "2") as server:
        asks = [body(number, max_tokens=300, ignore_eos=True, threshold=1.01, logprobs=None) for number in (1, 2, 3, 4)]

        async def run() -> list[str]:
            async with server.client() as client:
                tasks = [asyncio.create_task(streamed(client, ask)) for ask in asks]
                while server.metrics()['pipo_samples_running{model="pipo"}'] < 2:
                    await asyncio.sleep(0.01)
                server.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                with pytest.raises(httpx2.ConnectError):
                    await client.get("/health")
                return await asyncio.gather(*tasks)

        texts = asyncio.run(run())
        assert all(texts)
        assert server.process.wait(10) == 0


def test_other_machines_only_with_a_key(checkpoint: Path) -> None:
    from typer.testing import CliRunner

    from pipo.cli.main import app

    result = CliRunner().invoke(app, ["serve", str(checkpoint), "--host", "0.0.0.0"], env={"PIPO_API_KEY": None})
    assert result.exit_code == 2
    assert "--allow-unauthenticated" in result.output


def test_the_flag_opens_the_way_for_other_weights(server: Served, tmp_path: Path) -> None:
    answer = httpx2.post(
        f"{server.url}/update_weights_from_disk", json={"model_path": str(tmp_path)}, headers=AUTH, trust_env=False
    )
    assert answer.status_code == 400
    assert "config.json" in answer.json()["error"]["message"]
