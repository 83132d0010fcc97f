"""A peer at work in a process of its own: started, asked, ended. `workers/peer_loop.py` has the other end and the protocol."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from pipo.bench.peers.peer import Peer
from pipo.errors import PeerError

LOAD_S = 900.0
"""To load a model, and compile what a peer compiles."""
REQUEST_S = 600.0
"""For one request."""
ENDED = ""
"""Stands for a line that no worker writes: its output has ended."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is to run, and how much at once."""

    model: str
    """Folder of a stock checkpoint."""
    scratch: str
    """A folder that it may write to."""
    dtype: str
    device: str
    num_threads: int
    max_batch: int
    """Requests at once, at most."""
    max_positions: int
    """Tokens of a request, prompt and reply, at most."""
    cache_bytes: int
    """Enough for the keys and values of all of them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a request took: `first_s` until every prompt had its first token, `seconds` until the last; and all tokens."""

    first_s: float
    seconds: float
    tokens: list[list[int]]

    @property
    def tpot_s(self) -> float:
        """Per token of each prompt after the first."""
        return (self.seconds - self.first_s) / (len(self.tokens[0]) - 1)


class PeerProcess:
    """A peer that has loaded a model. A context manager: it ends with its process and all that this one started.

    Args:
        load_s, request_s: seconds after which it is given up.

    Raises:
        PeerError: it is not installed, can't run this model, ended, or took too long; the message has its own words.
    """

    def __init__(self, peer: Peer, task: Task, load_s: float = LOAD_S, request_s: float = REQUEST_S) -> None:
        self.peer, self.request_s = peer, request_s
        self._lines: queue.Queue[str] = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 — for as long as the process
        # Settings of the environment that others read; our own is left as it is.
        settings = {
            "OMP_NUM_THREADS": task.num_threads,
            "HF_HUB_OFFLINE": 1,
            "VLLM_ENABLE_V1_MULTIPROCESSING": 0,
            "VLLM_NO_USAGE_STATS": 1,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        command = ["env", *(f"{name}={value}" for name, value in settings.items()), str(peer.python), str(peer.worker)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            process_group=0,  # to end it with all that it started; in our session, since schedulers give each its share
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            content = {**asdict(task), "options": dict(peer.options)}
            self.versions: dict[str, str] = self._ask(content, "loading the model", load_s)["versions"]
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Reply:
        """Continue each prompt greedily by `num_tokens`, all of them together.

        Raises:
            PeerError: it failed, or wrote another number of tokens.
        """
        doing = f"{len(prompts)} prompts of {len(prompts[0]):,} tokens"
        found = self._ask({"prompts": prompts, "num_tokens": num_tokens}, doing, self.request_s)
        reply = Reply(found["first_s"], found["seconds"], found["tokens"])
        counts = [len(row) for row in reply.tokens]
        if counts != [num_tokens] * len(prompts):
            raise PeerError(f"{self.peer.name} wrote {counts} tokens instead of {num_tokens} for each of {doing}")
        return reply

    def _ask(self, content: dict[str, Any], doing: str, limit_s: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which reading tells
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            raise PeerError(f"{self.peer.name}: no answer after {limit_s:g} s of {doing}") from None
        if line == ENDED:
            status = self._process.wait()
            raise PeerError(f"{self.peer.name} ended with status {status} at {doing}: {self._last_words()}")
        try:
            found = json.loads(line)
        except ValueError:
            found = line
        match found:
            case {"versions": dict()} | {"first_s": float(), "seconds": float(), "tokens": list()}:
                return dict(found)
            case {"missing": package}:
                raise PeerError(
                    f"{self.peer.name} is not installed: {self.peer.python} has no {package}; "
                    f"name another interpreter by --peer-python {self.peer.name}=PATH (docs/benchmarking.md)"
                )
            case {"failed": words}:
                raise PeerError(f"{self.peer.name} failed at {doing}: {words}")
        raise PeerError(f"{self.peer.name} gave an answer that is none at {doing}: {line.strip()[:200]!r}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(ENDED)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        # After an error of one of its processes, an engine may say at length that it ends.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
        return (errors or lines or ["it said nothing"])[-1]

    def close(self) -> None:
        """End the process, at work or not, with those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._errors):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
