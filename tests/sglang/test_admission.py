"""What PIPO on SGLang does not serve is answered with a 400 that says so, and the server goes on."""

import json

import openai
import pytest
import requests

from checkpoints import VOCAB, expected, prompt, save_pipo
from servers import greedy, serving

PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("admission") / "model"
    model = save_pipo(folder, "llama", max_position_embeddings=128)
    with serving(folder) as server:
        yield model, server


@pytest.fixture(autouse=True)
def goes_on(served):
    """Nothing that a client asks for stops the server."""
    yield
    model, server = served
    ids = prompt(5, seed=1)
    assert server.greedy([ids], 6, 0.0)[0].token_ids == expected(model, ids, 6, 0.0)


def refused(server, path, body):
    response = requests.post(f"{server.url}{path}", json=body, timeout=60)
    assert response.status_code == 400, f"{response.status_code}: {response.text}"
    return response.text


NATIVE = [
    ({"return_logprob": True, "logprob_start_len": 0}, "log-probabilities of the prompt"),
    ({"return_logprob": True, "logprob_start_len": 2, "stream": True}, "log-probabilities of the prompt"),
    ({"image_data": [PICTURE]}, "pictures"),
    ({"session_params": {"id": "one"}}, "sessions"),
    ({"custom_logit_processor": "{}"}, "custom logit processors"),
    ({"return_hidden_states": True}, "hidden states"),
    ({"return_sampling_mask": True}, "sampling masks"),
    ({"bootstrap_host": "::1", "bootstrap_port": 1, "bootstrap_room": 0}, "different servers"),
    ({"sampling_params": {**greedy(4), "beam_width": 2}}, "beam search"),
    ({"sampling_params": greedy(0), "return_logprob": True}, "scoring"),
    ({"sampling_params": greedy(4, "high")}, "finite number, got 'high'"),
    ({"sampling_params": greedy(4, True)}, "finite number, got True"),
    ({"sampling_params": {"max_new_tokens": 4, "custom_params": "0.5"}}, "must be an object"),
    ({"input_ids": [3, VOCAB]}, f"token id {VOCAB} is not in the vocabulary"),
    ({"input_ids": [3, -1]}, "token id -1 is not in the vocabulary"),
    ({"input_ids": []}, "empty"),
]


@pytest.mark.parametrize(("asked", "says"), NATIVE, ids=[says for _, says in NATIVE])
def test_the_native_interface_says_what_is_not_served(served, asked, says):
    _, server = served
    body = {"input_ids": prompt(5), "sampling_params": greedy(4), **asked}
    if body.get("stream"):
        response = requests.post(f"{server.url}/generate", json=body, timeout=60)
        assert says in response.text
        return
    assert says in refused(server, "/generate", body)


@pytest.mark.parametrize("tau", ["NaN", "Infinity", "-Infinity"])
def test_a_threshold_is_a_finite_number(served, tau):
    _, server = served
    body = json.dumps({"input_ids": prompt(5), "sampling_params": greedy(4, 0.123456)}).replace("0.123456", tau)
    response = requests.post(
        f"{server.url}/generate", data=body, headers={"content-type": "application/json"}, timeout=60
    )
    assert response.status_code in (400, 422)


def test_one_request_of_a_batch_is_enough_to_refuse_it(served):
    _, server = served
    body = {"input_ids": [prompt(5), prompt(6)], "sampling_params": [greedy(4, 0.5), greedy(4, "low")]}
    assert "got 'low'" in refused(server, "/generate", body)


CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
PLAIN = {"model": "m", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
OPENAI = [
    ("/v1/completions", {**PLAIN, "echo": True, "logprobs": 2}, "log-probabilities of the prompt"),
    ("/v1/completions", {**PLAIN, "custom_params": {"threshold": []}}, "finite number"),
    ("/v1/completions", {**PLAIN, "custom_params": {"threshold": []}, "stream": True}, "finite number"),
    ("/v1/chat/completions", {**CHAT, "custom_params": {"threshold": "x"}}, "finite number"),
    ("/v1/chat/completions", {**CHAT, "return_hidden_states": True}, "hidden states"),
    ("/v1/embeddings", {"model": "m", "input": "Hello"}, ""),
    ("/v1/score", {"model": "m", "query": "a", "items": ["b"], "label_token_ids": [1, 2]}, "scor"),
]


@pytest.mark.parametrize(("path", "body", "says"), OPENAI, ids=[f"{path} {says}" for path, _, says in OPENAI])
def test_openais_interface_says_what_is_not_served(served, path, body, says):
    _, server = served
    assert says in refused(server, path, body)


def test_a_picture_in_a_chat_is_not_left_out_in_silence(served):
    _, server = served
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    refused(server, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": content}]})


def test_the_openai_client_sends_a_threshold(served):
    """In chats and completions; each request has its own."""
    _, server = served
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    ids = prompt(8, seed=3)
    for tau in (0.0, 0.5, 1.5):
        extra = {"custom_params": {"threshold": tau}, "ignore_eos": True, "return_spec_tokens_details": True}
        out = client.completions.create(model="m", prompt=ids, max_tokens=12, temperature=0, extra_body=extra)
        assert out.usage.completion_tokens == 12
        drafts = out.sglext["spec_tokens_details"]["spec_num_correct_drafts"]
        assert drafts == (6 if tau == 0.0 else 0) or tau == 0.5
        chat = client.chat.completions.create(
            model="m", messages=CHAT["messages"], max_tokens=12, temperature=0, extra_body=extra
        )
        assert chat.usage.completion_tokens == 12


def test_what_only_echoes_text_is_served(served):
    _, server = served
    body = {**PLAIN, "echo": True, "ignore_eos": True}
    response = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.json()["choices"][0]["text"].startswith("Hello")
