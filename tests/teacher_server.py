"""An endpoint that scores prompts, as vLLM and SGLang do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from pipo import BaseForCausalLM


@contextmanager
def scoring(teacher: BaseForCausalLM, refuse: list[int] | None = None) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers as vLLM and SGLang do, from a real model. `refuse`: statuses to give first."""
    asked: list[Any] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.answer({"data": [{"id": "big"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((self.path, body))
                status = refuse.pop(0) if refuse else 200
                if status != 200:
                    self.answer({"error": {"message": "no"}}, status)
                elif self.path == "/v1/completions":
                    self.answer({"choices": [{"text": "x", "prompt_logprobs": self.as_vllm(body)}]})
                else:
                    self.answer({"text": "x", "meta_info": self.as_sglang(body)})

        def answer(self, content: Any, status: int = 200) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_probs(self, ids: list[int]) -> torch.Tensor:
            with torch.no_grad():
                return teacher(torch.tensor([ids]), return_logits=True).logits[0].log_softmax(-1)

        def as_vllm(self, body: Any) -> list[Any]:
            ids, found = body["prompt"], self.log_probs(body["prompt"])
            entries: list[Any] = [None]
            for at in range(1, len(ids)):
                tokens = {*found[at - 1].topk(body["prompt_logprobs"]).indices.tolist(), ids[at]}
                entries.append(
                    {str(t): {"logprob": float(found[at - 1, t]), "rank": 1, "decoded_token": "?"} for t in tokens}
                )
            return entries

        def as_sglang(self, body: Any) -> dict[str, Any]:
            ids, start, found = body["input_ids"], body["logprob_start_len"], self.log_probs(body["input_ids"])
            own: list[Any] = [[None, ids[start], None]]
            best: list[Any] = [None]
            for at in range(start + 1, len(ids)):
                own.append([float(found[at - 1, ids[at]]), ids[at], None])
                top = found[at - 1].topk(body["top_logprobs_num"])
                best.append([[float(v), int(t), None] for v, t in zip(top.values, top.indices, strict=True)])
            return {"input_token_logprobs": own, "input_top_logprobs": best}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
