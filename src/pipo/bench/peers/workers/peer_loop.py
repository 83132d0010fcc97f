"""What every worker of `pipo.bench.peers` does. Workers run in the peer's environment: no import of ours, Python 3.10.

A worker reads JSON, a line each, and answers each line with one:

    the task            {"model": folder, "scratch": folder, "dtype", "device", "num_threads", "max_batch", "max_positions",
                         "cache_bytes", "options": {…}}
    → it is loaded      {"versions": {"vllm": "0.32.0", …}}
    a request           {"prompts": [[id, …], …], "num_tokens": n}
    → it is answered    {"first_s": …, "seconds": …, "tokens": [[id, …], …]}: until every prompt had its first token, and all of them
    → either failed     {"failed": "ValueError: …"} or {"missing": "vllm"}, and the worker ends
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts, int, Callable[[], None]], Prompts]
"""Continue each prompt greedily by so many tokens, whatever they are: the tokens of each.

The last argument is called when every prompt has its first token; only its first call counts.
"""


def serve(load: Callable[[dict[str, Any]], Generate], packages: Sequence[str]) -> None:
    """Answer a task and requests until the input ends. `packages`: whose versions to tell; the first is the peer's own."""
    # Libraries print to standard output: what they print goes where errors go, and answers have a way of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    try:
        generate = load(json.loads(sys.stdin.readline()))
        answer(versions={name: found for name in packages if (found := _version(name))})
        while line := sys.stdin.readline():
            request = json.loads(line)
            answer(**_timed(generate, **request))
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        answer(**({"missing": missing} if missing == packages[0].replace("-", "_") else {"failed": str(error)}))
    except Exception as error:  # noqa: BLE001 — told to the parent in words, whatever a library raises
        answer(failed=f"{type(error).__name__}: {error}")


def _timed(generate: Generate, prompts: Prompts, num_tokens: int) -> dict[str, Any]:
    moments: list[float] = []
    start = time.perf_counter()
    tokens = generate(prompts, num_tokens, lambda: moments.append(time.perf_counter()))
    seconds = time.perf_counter() - start
    return {"first_s": moments[0] - start, "seconds": seconds, "tokens": [list(row) for row in tokens]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
