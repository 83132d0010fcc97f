"""Stock SGLang serving a tiny checkpoint, as a process of its own.

SGLang ends its whole process when one of its parts fails, so it must not be the tests' process.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

START_S = 900
REPLY_S = 240

SERVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.launch_server import run_server
from sglang.srt.server_args import ServerArgs
run_server(ServerArgs(**json.loads(sys.argv[1])))
"""
"""What `sglang serve` does, with its options as a dict: some have values that the command line cannot say."""

ON_CPU: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "dtype": "float32",
    "disable_cuda_graph": True,
    "skip_server_warmup": True,
    "sleep_on_idle": True,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "log_level": "warning",
    "random_seed": 0,
}
KEEPING_STATES: dict[str, Any] = {
    # Linear attention: states are kept for the prefix cache beside the running one, which overlap scheduling needs too.
    "mamba_radix_cache_strategy": "extra_buffer",
    "mamba_track_interval": 64,
    "max_mamba_cache_size": 64,
}


@dataclass(frozen=True)
class Reply:
    """What came back for one prompt."""

    token_ids: list[int]
    text: str
    meta: dict[str, Any]

    @property
    def num_cached(self) -> int:
        return int(self.meta["cached_tokens"])


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path

    def generate(
        self, prompts: Sequence[Sequence[int]], params: dict[str, Any] | Sequence[dict[str, Any]], **others: Any
    ) -> list[Reply]:
        """Send prompts (token ids) together; `params` for all, or one each."""
        each = params if isinstance(params, dict) else list(params)
        body = {"input_ids": [list(ids) for ids in prompts], "sampling_params": each, **others}
        response = requests.post(f"{self.url}/generate", json=body, timeout=REPLY_S)
        assert response.ok, f"{response.status_code}: {response.text}"
        return [Reply(out["output_ids"], out.get("text", ""), out["meta_info"]) for out in response.json()]

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, thresholds: Sequence[float] | float | None = None
    ) -> list[Reply]:
        """The most likely tokens, whatever they are; τ for all, one each, or the server's."""
        each = thresholds if isinstance(thresholds, Sequence) else [thresholds] * len(prompts)
        return self.generate(prompts, [greedy(max_tokens, tau) for tau in each])

    def forget(self) -> None:
        """Empty the prefix cache."""
        response = requests.post(f"{self.url}/flush_cache", params={"timeout": 30}, timeout=60)
        assert response.ok, response.text


def greedy(max_tokens: int, threshold: float | None = None, **others: Any) -> dict[str, Any]:
    """Sampling parameters."""
    gate = {} if threshold is None else {"custom_params": {"threshold": threshold}}
    return {"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True, **gate, **others}


def serving(
    folder: Path, environment: Mapping[str, str] | None = None, **arguments: Any
) -> AbstractContextManager[Server]:
    """Start a server and wait until it answers; in the end it is killed with all its processes.

    `arguments`: options of `sglang serve`, with underscores. The log lies beside the folder, under its name with `.log`.
    """
    port = _free_port()
    options = {**ON_CPU, "model_path": str(folder), "port": port, **arguments}
    return _running([sys.executable, "-c", SERVE, json.dumps(options)], port, folder.with_suffix(".log"), environment)


def serving_by_command(folder: Path, log: Path, **arguments: Any) -> AbstractContextManager[Server]:
    """The same by `sglang serve` itself, as a user types it. An option whose value is True is a flag."""
    port = _free_port()
    command = [str(Path(sys.executable).with_name("sglang")), "serve", "--model-path", str(folder), "--port", str(port)]
    for name, value in {**ON_CPU, **arguments}.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return _running(command, port, log)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_parent() -> None:
    """Have Linux kill this process when the tests' process ends, however it ends; SGLang's parts follow their parent."""
    set_death_signal = 1
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


@contextmanager
def _running(
    command: list[str], port: int, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(url, process, log)
        yield Server(url, log)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        try:
            if requests.get(f"{url}/model_info", timeout=5).ok:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        assert process.poll() is None, f"the server ended:\n{log.read_text()[-6000:]}"
        assert time.monotonic() < until, f"not up after {START_S} s:\n{log.read_text()[-6000:]}"
        time.sleep(0.2)
