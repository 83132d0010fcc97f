"""Who may come in: keys, hosts, sizes, queues, origins; and what everything looks like from outside."""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Any

import httpx2
import pytest

from pipo import LLM
from pipo.errors import ConfigError
from pipo.server.app import create_app
from pipo.server.settings import ServerSettings
from server_client import client_of, ok, post

KEY = "sk-test"
ASK: dict[str, Any] = {"model": "pipo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


def get(client: httpx2.AsyncClient, path: str, **headers: str) -> httpx2.Response:
    return request(client, "GET", path, headers=headers)


def request(client: httpx2.AsyncClient, method: str, path: str, **more: Any) -> httpx2.Response:
    async def run() -> httpx2.Response:
        return await client.request(method, path, **more)

    return asyncio.run(run())


def test_the_key_protects_everything_but_health(llm: LLM) -> None:
    client = client_of(create_app(llm, ServerSettings(api_key=KEY)))
    assert get(client, "/health").json() == {"status": "ok"}
    paths = [
        "/v1/models",
        "/metrics",
        "/openapi.json",
        "/playground",
        "/playground/config",
        "/nowhere",
        "/health/x",
        "//health",
    ]
    for path in paths:
        for headers in (
            {},
            {"Authorization": "Bearer sk-tesT"},
            {"Authorization": "Basic !!!"},
            {"Authorization": "Bearer é"},
        ):
            response = get(client, path, **{k: v.encode() for k, v in headers.items()})  # type: ignore[arg-type]
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith(
                "Basic" if path.startswith("/playground") else "Bearer"
            )
    assert post(client, ASK).status_code == 401
    assert get(client, "/v1/models", Authorization=f"Bearer {KEY}").status_code == 200
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    assert get(client, "/playground/config", Authorization=f"Basic {basic}").json()["model"] == "pipo"


def test_without_a_key_only_this_machine_by_its_name(llm: LLM) -> None:
    """A page of another site can have a name that leads here; its requests carry that name."""
    client = client_of(create_app(llm, ServerSettings()))
    assert get(client, "/v1/models", Host="evil.example").status_code == 403
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80"):
        assert get(client, "/v1/models", Host=host).status_code == 200
    with_key = client_of(create_app(llm, ServerSettings(api_key=KEY)), Authorization=f"Bearer {KEY}")
    assert get(with_key, "/v1/models", Host="api.example").status_code == 200


def test_bodies_are_json_and_bounded(llm: LLM) -> None:
    client = client_of(create_app(llm, ServerSettings(max_body_bytes=1000)))

    def send(content: Any, kind: str = "application/json") -> httpx2.Response:
        return request(client, "POST", CHAT, content=content, headers={"Content-Type": kind})

    assert send(b"{}", "text/plain").status_code == 415
    assert send(b"x" * 1001).status_code == 413

    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * 300

    assert send(chunks()).status_code == 413
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"model": "pipo"',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"[" * 900,
    ):
        response = send(body)
        assert response.status_code == 400, body
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert (
        send(b'{"model": "pipo", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}').status_code
        == 400
    )


def test_slow_bodies_are_given_up(llm: LLM) -> None:
    client = client_of(create_app(llm, ServerSettings(body_timeout_s=0.05)))

    async def slowly() -> Any:
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    response = request(client, "POST", CHAT, content=slowly(), headers={"Content-Type": "application/json"})
    assert response.status_code == 408


def test_a_full_queue_turns_away(llm: LLM) -> None:
    app = create_app(llm, ServerSettings(max_queue=0, retry_after_s=7))
    client = client_of(app)
    desk = app.state.server.desk
    with desk.enter("pipo", 6):
        full = post(client, {**ASK, "n": 3})
        assert full.status_code == 429
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert full.headers["retry-after"] == "7"
        assert ok(post(client, {**ASK, "n": 2}))
    assert post(client, {**ASK, "n": 9}).status_code == 400
    desk.draining = True
    assert post(client, ASK).status_code == 503
    assert get(client, "/health").status_code == 503
    assert desk.num_samples == {"pipo": 0}


def test_a_request_that_takes_too_long(llm: LLM) -> None:
    app = create_app(llm, ServerSettings(request_timeout_s=0.2))
    long = {**ASK, "max_tokens": 4000, "ignore_eos": True}
    response = post(client_of(app), long)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    streamed = post(client_of(app), {**long, "stream": True})
    assert '"code":"timeout"' in streamed.text
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert app.state.server.desk.num_samples == {"pipo": 0}


def test_origins_only_where_asked(llm: LLM) -> None:
    closed = client_of(create_app(llm, ServerSettings()))
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in request(closed, "OPTIONS", CHAT, headers=preflight).headers
    opened = client_of(create_app(llm, ServerSettings(cors_origins=("https://a.example",), api_key=KEY)))
    assert (
        request(opened, "OPTIONS", CHAT, headers=preflight).headers["access-control-allow-origin"]
        == "https://a.example"
    )
    other = {**preflight, "Origin": "https://b.example"}
    assert "access-control-allow-origin" not in request(opened, "OPTIONS", CHAT, headers=other).headers


def test_errors_have_one_shape_everywhere(llm: LLM) -> None:
    client = client_of(create_app(llm, ServerSettings()))
    for method, path, status in (("GET", "/nowhere", 404), ("GET", CHAT, 405), ("GET", "/v1/models/gpt", 404)):
        response = request(client, method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"].startswith("req_")


def test_models_and_the_lane_beside(llm: LLM) -> None:
    models = {"big": llm, "beside": llm, "regular": llm}
    client = client_of(create_app(models, ServerSettings(model_name="big", threshold=0.7)))
    assert [model["id"] for model in get(client, "/v1/models").json()["data"]] == ["big", "beside", "regular"]
    assert get(client, "/v1/models/big").json()["max_model_len_unit"] == "pairs"
    config = get(client, "/playground/config").json()
    assert config == {
        "model": "big",
        "threshold": 0.7,
        "beside_model": "beside",
        "regular_model": "regular",
        "max_model_len": llm.engine.max_model_len,
        "max_model_len_unit": "pairs",
    }
    for name in ("regular", "beside"):
        assert ok(post(client, {**ASK, "model": name}))["model"] == name
    alone = get(client_of(create_app(llm, ServerSettings())), "/playground/config").json()
    assert (alone["beside_model"], alone["regular_model"]) == (None, None)


def test_metrics_tell_what_happened(llm: LLM) -> None:
    client = client_of(create_app(llm, ServerSettings()))
    usage = ok(post(client, {**ASK, "n": 2, "ignore_eos": True, "threshold": 0.0}))["usage"]
    post(client, {**ASK, "model": "gpt-5"})
    lines = dict(line.rsplit(" ", 1) for line in get(client, "/metrics").text.splitlines() if not line.startswith("#"))
    assert float(lines['pipo_generated_tokens_total{model="pipo"}']) == usage["completion_tokens"] == 8
    assert float(lines['pipo_drafts_committed_total{model="pipo"}']) == 4
    assert float(lines['pipo_pairs_total{model="pipo"}']) == 4
    assert float(lines['pipo_samples_finished_total{model="pipo",reason="length"}']) == 2
    assert float(lines['pipo_requests_total{path="/v1/chat/completions",status="404"}']) == 1
    assert float(lines['pipo_ttft_seconds_count{model="pipo"}']) == 2
    assert float(lines['pipo_tokens_per_step_sum{model="pipo"}']) == 4
    for name in ("samples_running", "samples_waiting", "samples_reading", "cache_usage_ratio", "prefix_cache_bytes"):
        assert f'pipo_{name}{{model="pipo"}}' in lines


def test_the_openapi_document_names_every_field(llm: LLM) -> None:
    document = get(client_of(create_app(llm, ServerSettings())), "/openapi.json").json()
    chat = document["components"]["schemas"]["ChatRequest"]
    assert {"messages", "threshold", "top_k", "min_p", "chat_template_kwargs", "return_pairs"} <= set(
        chat["properties"]
    )
    assert chat["additionalProperties"] is False
    references = str(document).count("$ref")
    assert references > 20
    for name in set(re.findall(r"#/components/schemas/(\w+)", str(document))):
        assert name in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"host": "0.0.0.0"}, "allow-unauthenticated"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "two words"}, "api_key"),
        ({"port": 70000}, "port"),
        ({"max_queue": -1}, "max_queue"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"threshold": float("nan")}, "threshold"),
        ({"model_name": " "}, "model_name"),
        ({"model_name": "regular"}, "regular"),
    ],
    ids=str,
)
def test_settings_name_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServerSettings(**changes).validate()


def test_beyond_this_machine_with_a_key_or_on_purpose() -> None:
    ServerSettings(host="0.0.0.0", api_key=KEY).validate()
    ServerSettings(host="0.0.0.0", allow_unauthenticated=True).validate()
