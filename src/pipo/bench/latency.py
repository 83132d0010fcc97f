"""Time to first token and time per token of a batch, method beside method, with the floor that the machine allows.

A round runs every method once, one right after the other, so that what else the machine does hits all alike. Each run is a fresh batch
through the engine: `engine.add`, then `engine.step` as `LLM.generate` calls it. Decoding is timed from `SETTLE_STEPS` steps after the
last request's first token, when caches have their size, over a given number of steps; then the batch is called off.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from pipo.bench.cost import COST_METHODS, Machine, StepCost, decode_cost, prefill_cost
from pipo.bench.grid import Point, Row
from pipo.bench.subjects import DRAFTERS, Subject, random_prompts
from pipo.errors import ConfigError

SETTLE_STEPS = 2
WARM_CONTEXT = 128
"""Tokens of a prompt that warms a CPU up. A GPU is warmed up with the point's own, for which it may choose kernels."""
COMMIT_TOLERANCE = 0.02


@dataclass(frozen=True)
class Effort:
    """How much is measured at each point: `num_rounds` rounds of `num_steps` decoding steps."""

    num_steps: int = 32
    num_rounds: int = 3

    def __post_init__(self) -> None:
        """Raise `ConfigError` for less than one."""
        for name in ("num_steps", "num_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name.removeprefix('num_')} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Timing:
    """One run of one batch. `tokens_per_step`: visible tokens of a row in a decoding step."""

    ttft_s: float
    tpot_s: float
    tokens_per_step: float


def check_points(subjects: Sequence[Subject], points: Sequence[Point], effort: Effort) -> None:
    """Raise `ConfigError` for a point that is beyond what a model can hold."""
    for subject in subjects:
        for point in points:
            subject.check_room(point.context, SETTLE_STEPS + effort.num_steps)


def measure_points(
    subjects: Sequence[Subject], points: Sequence[Point], effort: Effort, report: Callable[[], None] = lambda: None
) -> Iterator[list[Row]]:
    """The rows of each point in turn, without floors; `report` is called after every run, `runs_of` times in all."""
    for point in points:
        yield _measure_point(subjects, point, effort, report)


def runs_of(subjects: Sequence[Subject], points: Sequence[Point], effort: Effort) -> int:
    """How many runs that takes, those that warm up included."""
    return len(subjects) * len(points) * (1 + effort.num_rounds)


def _measure_point(
    subjects: Sequence[Subject], point: Point, effort: Effort, report: Callable[[], None]
) -> list[Row]:
    num_steps = SETTLE_STEPS + effort.num_steps
    errors = {s.method: s.why_too_many(point.batch, point.context, num_steps) for s in subjects}
    rounds: dict[str, list[Timing]] = {subject.method: [] for subject in subjects}
    for turn in range(effort.num_rounds + 1):
        for subject in subjects:
            if errors[subject.method] is None:
                try:
                    timing = time_batch(subject, _warm(subject, point), 1) if turn == 0 else time_batch(subject, point, effort.num_steps)
                except torch.OutOfMemoryError as error:
                    errors[subject.method] = str(error).splitlines()[0]
                else:
                    rounds[subject.method] += [timing] if turn else []
            report()
    return [_row(subject, point, effort, rounds[subject.method], errors[subject.method]) for subject in subjects]


def _warm(subject: Subject, point: Point) -> Point:
    on_cpu = subject.llm.model.device.type == "cpu"
    return replace(point, context=min(point.context, WARM_CONTEXT)) if on_cpu else point


def time_batch(subject: Subject, point: Point, num_steps: int) -> Timing:
    """Run one batch from a fresh engine; nothing of it is left behind."""
    engine = subject.llm.engine
    prompts = random_prompts(subject.llm.vocab_size, point.batch, point.context)
    max_tokens = 2 * (SETTLE_STEPS + num_steps + 2)
    gc.collect()
    start = time.perf_counter()
    samples = [subject.prepare(prompt, max_tokens) for prompt in prompts]
    try:
        engine.add(samples)
        while not all(sample.token_ids for sample in samples):
            engine.step()
        first = time.perf_counter()
        for _ in range(SETTLE_STEPS):
            engine.step()
        before, begin = sum(len(sample.token_ids) for sample in samples), time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        end = time.perf_counter()
        per_row = (sum(len(sample.token_ids) for sample in samples) - before) / point.batch
    finally:
        for sample in samples:
            engine.abort(sample.request_id)
        engine.runner.reset()
    return Timing(first - start, (end - begin) / per_row, per_row / num_steps)


def _row(subject: Subject, point: Point, effort: Effort, timings: list[Timing], error: str | None) -> Row:
    if error is not None:
        return Row(method=subject.method, batch=point.batch, context=point.context, error=error)
    commit = fmean(timing.tokens_per_step for timing in timings) - 1 if subject.method in DRAFTERS else None
    _check_commit(subject, commit, effort)
    return Row.from_rounds(
        subject.method,
        point,
        [timing.ttft_s for timing in timings],
        [timing.tpot_s for timing in timings],
        commit=commit,
        draft_vocab=subject.draft_vocab,
        num_steps=effort.num_steps,
    )


def _check_commit(subject: Subject, commit: float | None, effort: Effort) -> None:
    """A rate that was asked for and is not there would make every figure one of something else."""
    if commit is None or subject.commit is None:
        return
    if abs(commit - subject.commit) > COMMIT_TOLERANCE + 1 / effort.num_steps:
        raise ConfigError(
            f"{subject.method} was to keep a share of {subject.commit:g} of its drafts, and kept {commit:.3f}: the engine did not ask "
            "the gate that the benchmark steers"
        )


# --- floors -----------------------------------------------------------------------------------------------------------


def with_floors(rows: Sequence[Row], subjects: Sequence[Subject], machine: Machine) -> list[Row]:
    """The rows with their floors and ceilings on `machine`; those of peers are as regular decoding's."""
    by_method = {subject.method: subject for subject in subjects}
    return [_with_floor(row, by_method.get(row.method), subjects[0], machine) for row in rows]


def _with_floor(row: Row, subject: Subject | None, any_subject: Subject, machine: Machine) -> Row:
    method = "regular" if subject is None else subject.method
    if row.error is not None or method not in COST_METHODS:
        return row
    about = subject or any_subject
    regular, cost = _costs(about, "regular", row), _costs(about, method, row)
    prefill_s, regular_prefill_s = machine.floor_s(cost[0]), machine.floor_s(regular[0])
    return replace(
        row,
        floor_s=machine.token_floor_s(cost[1]),
        ceiling=machine.ceiling(cost[1], regular[1]),
        ttft_floor_s=prefill_s,
        ttft_ceiling=regular_prefill_s / prefill_s,
    )


def _costs(subject: Subject, method: str, row: Row) -> tuple[StepCost, StepCost]:
    """Of the prefill, and of a step in the middle of what was timed."""
    size = subject.llm.model.dtype.itemsize
    commit = 1.0 if row.commit is None else min(1.0, max(0.0, row.commit))
    more = {"commit": commit, "draft_vocab": row.draft_vocab, "compressor": subject.compressor}
    sizes = {"weight_bytes_per": float(size), "cache_bytes_per": float(size)}
    middle = row.context + (SETTLE_STEPS + (row.num_steps or 0) / 2) * (1 + (0 if method == "regular" else commit))
    prefill = prefill_cost(subject.config, method, row.batch, row.context, **more, **sizes)  # type: ignore[arg-type]
    return prefill, decode_cost(subject.config, method, row.batch, middle, **more, **sizes)  # type: ignore[arg-type]
