"""Memory of decoding, method by method: what caches hold, and the peak beyond the weights, beside what the sizes say.

Every point runs in a process of its own (`memory_run.py`), where nothing is left of the one before.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipo.bench.grid import Point, Results
from pipo.bench.subjects import Setting, methods_of
from pipo.errors import ConfigError
from pipo.run_record import describe_session


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """One method at one point, after `num_steps` decoding steps. A row with an `error` has no figures."""

    method: str
    batch: int
    context: int
    """Tokens of each prompt."""
    num_steps: int
    cache_bytes: int | None = None
    """Held for keys, values and states of all rows, what is reserved for their growth included."""
    predicted_bytes: int | None = None
    """What their entries take, by the model's sizes."""
    peak_bytes: int | None = None
    """At most, beyond what was there before the batch came: caches, and everything that prefill and steps need."""
    resting_bytes: int | None = None
    """There before the batch: the weights, and on a CPU what libraries took when they warmed up."""
    error: str | None = None
    """Why there are no figures."""


def bench_memory(
    setting: Setting,
    points: Sequence[Point],
    num_steps: int = 8,
    *,
    save: Callable[[Results[MemoryRow]], None] = lambda results: None,
    report: Callable[[int], None] = lambda num_runs: None,
) -> Results[MemoryRow]:
    """Measure a grid of points, one process each.

    Args:
        save: called with what there is after every point. report: called after every process with how many there are in all.
    """
    methods = methods_of(setting)
    results: Results[MemoryRow] = Results(
        kind="memory",
        shape=setting.shape,
        models=setting.models,
        device=setting.device,
        dtype=setting.dtype or "as stored",
        record=describe_session(),
    )
    for point in points:
        for method in methods:
            row = measure_memory(replace(setting, methods=(method,)), point, num_steps)
            results = results.with_rows([*results.rows, row])
            save(results)
            report(len(points) * len(methods))
    results = results.completed()
    save(results)
    return results


def measure_memory(setting: Setting, point: Point, num_steps: int) -> MemoryRow:
    """The row of the one method of a setting at one point."""
    [method] = setting.methods or ()
    about: dict[str, Any] = {"method": method, **asdict(point), "num_steps": num_steps}
    task = {**about, "setting": asdict(setting), "num_threads": torch.get_num_threads()}
    command = [sys.executable, "-m", "pipo.bench.memory_run"]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return MemoryRow(**about, error=last)
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise ConfigError(f"the process that measured {method} said {done.stdout!r} in place of figures") from None
    return MemoryRow(**about, **found)
