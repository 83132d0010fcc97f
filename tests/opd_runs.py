"""A tiny world of files for OPD runs: a student's checkpoint, a teacher's, prompts with a grader; and configs on them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byte_tokenizer import byte_tokenizer
from pipo import LLM
from pipo.server.app import create_app
from pipo.server.lifecycle import Process, configure, listen
from pipo.server.settings import ServerSettings
from pipo.training.config import OpdConfig
from rollout_cases import make_student, make_teacher

PROMPT_TEXTS = ["ab", "abc", "hello", "x", "pair", "of tokens", "1 + 1", "why"]


def make_world(folder: Path) -> Path:
    """`student/`, `teacher/`, `other/` (another teacher) and `prompts.jsonl`."""
    make_student(0).save_pretrained(folder / "student")
    for name, seed in (("teacher", 1), ("other", 2)):
        make_teacher(seed).save_pretrained(folder / name)
    for name in ("student", "teacher", "other"):
        byte_tokenizer().save_pretrained(folder / name)
    rows = [{"messages": [{"role": "user", "content": text}], "grader": "long"} for text in PROMPT_TEXTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_config(world: Path, out: Path, **groups: Any) -> OpdConfig:
    """Four prompts a step, in float32 and without dropout; `groups` change settings within their group."""
    settings: dict[str, dict[str, Any]] = {
        "model": {"path": str(world / "student"), "dtype": "float32"},
        "data": {"train": str(world / "prompts.jsonl")},
        "run": {"out": str(out), "max_steps": 3, "batch_size": 2, "accumulation": 2, "device": "cpu", "save_every": 2},
        "teacher": {"path": str(world / "teacher"), "dtype": "float32"},
        "rollout": {"max_slots": 16, "threshold": 0.5, "cache_budget_bytes": 2**24},
        "divergence": {"k": 4},
        "tuning": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "optimizer": {"lr": 0.01, "warmup": 0},
    }
    for name, changes in groups.items():
        settings[name] = {**settings.get(name, {}), **changes}
    return OpdConfig.model_validate(settings)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The reports of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses_of(out: Path) -> list[float]:
    """Every loss of every step, in order."""
    names = (
        "loss",
        "backbone_loss",
        "mtp_loss",
        "confidence_loss",
        "grad_norm",
        "rollout_tokens",
        "rollout_commit_rate",
    )
    return [row[name] for row in rows_of(out) for name in names]


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[str]:
    """The address of a server of a checkpoint, in a thread of this process, which takes weight updates."""
    options = ServerSettings(port=0, allow_weight_updates=True, **settings)
    app = create_app(LLM(folder, device="cpu", prefix_cache_bytes=2**22), options)
    listener = listen(options)
    process = Process(configure(app, options), app)
    thread = threading.Thread(target=lambda: asyncio.run(process.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        process.should_exit = True
        thread.join()
