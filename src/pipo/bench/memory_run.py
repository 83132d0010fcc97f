"""One batch of one method in this process, for its memory. `memory.py` starts such processes."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from pipo.bench.grid import Point
from pipo.bench.meter import open_meter
from pipo.bench.sizes import model_sizes
from pipo.bench.subjects import Setting, Subject, open_subjects, random_prompts
from pipo.engine.sequence import Sequence as Sample
from pipo.errors import ConfigError, PipoError


def measure(setting: Setting, point: Point, num_steps: int) -> dict[str, int]:
    """The figures of :class:`pipo.bench.memory.MemoryRow`."""
    meter = open_meter(setting.device, exact=True)
    [subject] = open_subjects(setting, max_num_seqs=point.batch)
    subject.check_room(point.context, num_steps)
    if (reason := subject.why_too_many(point.batch, point.context, num_steps)) is not None:
        raise ConfigError(reason)
    for sample in _run(subject, Point(1, 2), 1):  # what libraries load and keep on their first step is not the batch's
        subject.llm.engine.abort(sample.request_id)
    meter.start()
    resting_bytes = meter.used_bytes()
    _run(subject, point, num_steps)
    cache = subject.llm.engine.runner.cache
    return {
        "cache_bytes": cache.num_bytes(),
        "predicted_bytes": predict_bytes(subject, point.batch, sum(cache.lengths)),
        "peak_bytes": meter.peak_bytes() - resting_bytes,
        "resting_bytes": resting_bytes,
    }


def _run(subject: Subject, point: Point, num_steps: int) -> list[Sample]:
    """Prefill and decode; the batch stays."""
    engine = subject.llm.engine
    samples = [subject.prepare(ids) for ids in random_prompts(subject.llm.vocab_size, point.batch, point.context)]
    engine.add(samples)
    while not all(sample.token_ids for sample in samples):
        engine.step()
    for _ in range(num_steps):
        engine.step()
    return samples


def predict_bytes(subject: Subject, num_rows: int, num_entries: int) -> int:
    """What `num_entries` positions of `num_rows` rows take in the cache: the engine drops no entry that has left a window."""
    sizes, itemsize = model_sizes(subject.config, subject.compressor), subject.llm.model.dtype.itemsize
    per_position = sum(layer.entries for layer in sizes.attention(subject.method)) * itemsize
    return int(num_entries * per_position + num_rows * sizes.state_bytes)


def main() -> None:
    """Measure what standard input asks for and print it as JSON; or why that can't be."""
    task: dict[str, Any] = json.load(sys.stdin)
    torch.set_num_threads(task["num_threads"])
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["setting"].items()
    }
    point = Point(task["batch"], task["context"])
    try:
        found: dict[str, Any] = dict(measure(Setting(**fields), point, task["num_steps"]))
    except PipoError as error:
        found = {"error": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
