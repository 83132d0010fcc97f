"""Time to first token and time per token of a batch, method beside method, with the floor that the machine allows.

A round runs every method once, one right after the other, so that what else the machine does hits all alike. Each run is a fresh batch
through the engine: `engine.add`, then `engine.step` as `LLM.generate` calls it. Decoding is timed from `SETTLE_STEPS` steps after the
last request's first token, when caches have their size, over a given number of steps; then the batch is called off. Engines of others
(`peers`) take their turns like methods of ours.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any, cast

import torch

from pipo.bench.cost import COST_METHODS, Machine, StepCost, decode_cost, prefill_cost
from pipo.bench.grid import Point, Results, Row
from pipo.bench.machine import ReadingRate, measure_machine
from pipo.bench.peers import Peer, PeerSubject, open_peers
from pipo.bench.sizes import ModelSizes, model_sizes
from pipo.bench.subjects import DRAFTERS, METHODS, Setting, Subject, open_subjects, random_prompts
from pipo.errors import ConfigError, PeerError
from pipo.run_record import describe_session

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
    middle: float = 0.0
    """Tokens that a row held amid the timed steps, on average."""
    bytes_per_s: float | None = None
    """What the memory was read at right afterwards."""


def bench_latency(
    setting: Setting,
    points: Sequence[Point],
    effort: Effort,
    *,
    peers: Sequence[Peer] = (),
    save: Callable[[Results[Row]], None] = lambda results: None,
    report: Callable[[int], None] = lambda num_runs: None,
) -> Results[Row]:
    """Measure a grid of points, the machine before and after it.

    Args:
        peers: engines of others, which run the regular model.
        save: called with what there is after every point, and at the end.
        report: called after every run with how many there are in all, those that warm up included.

    Raises:
        ConfigError: a point that is beyond what a model can hold; nothing has been measured then.
    """
    subjects = open_subjects(setting, max_num_seqs=max(point.batch for point in points))
    num_steps = SETTLE_STEPS + effort.num_steps
    for subject in subjects:
        for point in points:
            subject.check_room(point.context, num_steps)
    num_runs = (len(subjects) + len(peers)) * len(points) * (1 + effort.num_rounds)
    sizes = model_sizes(subjects[0].config, subjects[-1].compressor)
    device, dtype = subjects[0].llm.model.device, subjects[0].llm.model.dtype
    machine = measure_machine(device, dtype)
    results: Results[Row] = Results(
        kind="latency",
        shape=setting.shape,
        models=setting.models,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        machine=asdict(machine),
        record=describe_session(),
    )
    with open_peers(peers, setting, sizes, dtype, points, num_steps) as others:
        for point in points:
            rows = _measure_point([*subjects, *others], point, effort, lambda: report(num_runs))
            rows = [with_floor(row, sizes, machine, dtype.itemsize) for row in rows]
            versions = {"peers": {one.method: one.versions for one in others}} if others else {}
            results = replace(results.with_rows([*results.rows, *rows]), record={**results.record, **versions})
            save(results)
    after = measure_machine(device, dtype)
    best = best_of(machine, after)
    rows = [with_floor(row, sizes, best, dtype.itemsize) for row in results.rows]
    results = replace(results, rows=tuple(rows), machine_after=asdict(after), complete=True)
    save(results)
    return results


def best_of(first: Machine, second: Machine) -> Machine:
    """What a machine could do at its better of two times: a floor is of what it can do."""
    return replace(
        first,
        bytes_per_s=max(first.bytes_per_s, second.bytes_per_s),
        flops_per_s=max(first.flops_per_s, second.flops_per_s),
    )


def _measure_point(
    subjects: Sequence[Subject | PeerSubject], point: Point, effort: Effort, report: Callable[[], None]
) -> list[Row]:
    num_steps, errors = SETTLE_STEPS + effort.num_steps, dict.fromkeys((s.method for s in subjects), "")
    for subject in subjects:
        if isinstance(subject, Subject):
            errors[subject.method] = subject.why_too_many(point.batch, point.context, num_steps) or ""
    rounds: dict[str, list[Timing]] = {subject.method: [] for subject in subjects}
    first = next((subject for subject in subjects if isinstance(subject, Subject)), None)
    rate = ReadingRate(first.llm.model.parameters()) if first is not None and _on_cpu(first) else None
    for turn in range(effort.num_rounds + 1):
        for subject in subjects:
            if not errors[subject.method]:
                where, steps = (point, effort.num_steps) if turn else (_warm(subject, point), 1)
                try:
                    timing = _time(subject, where, steps)
                except torch.OutOfMemoryError as error:
                    errors[subject.method] = str(error).splitlines()[0]
                except PeerError as error:
                    errors[subject.method] = str(error)
                else:
                    moment = None if rate is None else rate.measure()
                    rounds[subject.method] += [replace(timing, bytes_per_s=moment)] if turn else []
            report()
    return [_row(subject, point, effort, rounds[subject.method], errors[subject.method]) for subject in subjects]


def _time(subject: Subject | PeerSubject, point: Point, num_steps: int) -> Timing:
    if isinstance(subject, Subject):
        return time_batch(subject, point, num_steps)
    reply = subject.time_batch(point, num_steps)
    return Timing(reply.first_s, reply.tpot_s, 1.0, point.context + 1 + num_steps / 2)


def _warm(subject: Subject | PeerSubject, point: Point) -> Point:
    return replace(point, context=min(point.context, WARM_CONTEXT)) if _on_cpu(subject) else point


def _on_cpu(subject: Subject | PeerSubject) -> bool:
    device = subject.llm.model.device if isinstance(subject, Subject) else torch.device(subject.task.device)
    return device.type == "cpu"


def time_batch(subject: Subject, point: Point, num_steps: int) -> Timing:
    """Run one batch from a fresh engine; nothing of it is left behind."""
    engine = subject.llm.engine
    prompts = random_prompts(subject.llm.vocab_size, point.batch, point.context)
    gc.collect()
    start = time.perf_counter()
    samples = [subject.prepare(prompt) for prompt in prompts]
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
        if len(engine.running) < point.batch:
            raise ConfigError(
                f"only {len(engine.running)} of {point.batch} requests of {point.context} tokens run together: ask for less"
            )
    finally:
        for sample in samples:
            engine.abort(sample.request_id)
    middle = point.context + before / point.batch + per_row / 2
    return Timing(first - start, (end - begin) / per_row, per_row / num_steps, middle)


def _row(subject: Subject | PeerSubject, point: Point, effort: Effort, timings: list[Timing], error: str) -> Row:
    if error:
        return Row(method=subject.method, batch=point.batch, context=point.context, error=error)
    commit = fmean(timing.tokens_per_step for timing in timings) - 1 if subject.method in DRAFTERS else None
    drafts = subject if isinstance(subject, Subject) else None
    if drafts is not None:
        _check_commit(drafts, commit, effort)
    rates = [timing.bytes_per_s for timing in timings]
    return Row.from_rounds(
        subject.method,
        point,
        [timing.ttft_s for timing in timings],
        [timing.tpot_s for timing in timings],
        commit=commit,
        draft_vocab=None if drafts is None else drafts.draft_vocab,
        num_steps=effort.num_steps,
        middle=fmean(timing.middle for timing in timings),
        bytes_per_s=None if None in rates else median(cast(list[float], rates)),
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


def with_floor(row: Row, sizes: ModelSizes, machine: Machine, bytes_per: float) -> Row:
    """The row with its floors and ceilings on `machine`; a peer's are those of regular decoding.

    Args:
        bytes_per: of a number, in weights and cache.
    """
    method = row.method if row.method in METHODS else "regular"
    if row.error is not None or method not in COST_METHODS:
        return row
    if row.bytes_per_s is not None:
        machine = replace(machine, bytes_per_s=row.bytes_per_s)
    regular, cost = (_costs(sizes, name, row, bytes_per) for name in ("regular", method))
    prefill_s, regular_prefill_s = machine.floor_s(cost[0]), machine.floor_s(regular[0])
    return replace(
        row,
        floor_s=machine.token_floor_s(cost[1]),
        ceiling=machine.ceiling(cost[1], regular[1]),
        ttft_floor_s=prefill_s,
        ttft_ceiling=regular_prefill_s / prefill_s,
    )


def _costs(sizes: ModelSizes, method: str, row: Row, bytes_per: float) -> tuple[StepCost, StepCost]:
    """Of the prefill, and of a step in the middle of what was timed."""
    commit = 1.0 if row.commit is None else min(1.0, max(0.0, row.commit))
    more: dict[str, Any] = {"commit": commit, "draft_vocab": row.draft_vocab}
    more |= {"weight_bytes_per": bytes_per, "cache_bytes_per": bytes_per}
    prefill = prefill_cost(sizes, method, row.batch, row.context, **more)
    return prefill, decode_cost(sizes, method, row.batch, row.middle or row.context, **more)
