"""What a benchmark of decoding found: a row for each method at each point of a grid, in one file of JSON. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Generic, Self, TypeVar

from pipo.errors import ConfigError, DataError
from pipo.run_record import describe_session, write_json

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Point:
    """`batch` requests at once, each with a prompt of `context` tokens."""

    batch: int
    context: int


def grid_points(batches: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """Every context at every batch, the smallest first.

    Raises:
        ConfigError: a number below 1, or none at all.
    """
    for name, numbers in (("batch", batches), ("context", contexts)):
        wrong = [number for number in numbers if number < 1]
        if wrong or not numbers:
            raise ConfigError(f"{name} must be at least 1, got {wrong[0] if wrong else 'nothing'}")
    return [Point(batch, context) for batch in sorted(set(batches)) for context in sorted(set(contexts))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method at one point. Seconds are medians over rounds; a row with an `error` has no figures.

    Times of a batch are those of all its rows together: the last row's first token, and a step of all rows.
    """

    method: str
    """`regular`, `mtp`, `speculative`, `pipo`, or a peer such as `hf-generate`, `vllm`."""
    batch: int
    """Requests that run together."""
    context: int
    """Tokens of each prompt; decoding starts there."""
    ttft_s: float | None = None
    """From submission to the first token of the last request."""
    tpot_s: float | None = None
    """Of each request, per visible token after that."""
    tokens_per_s: float | None = None
    """Visible tokens of all requests, per second of decoding: batch / `tpot_s`."""
    floor_s: float | None = None
    """The least `tpot_s` that bytes and FLOPs of a step allow on this machine, as it was measured in the same run."""
    ceiling: float | None = None
    """`floor_s` of regular decoding over this one's: how many times faster this method can be at most."""
    spread: float | None = None
    """Of `tpot_s` over the rounds: (slowest − fastest) / median."""
    ttft_floor_s: float | None = None
    """The least `ttft_s`, likewise."""
    ttft_ceiling: float | None = None
    """The ratio of those to regular's."""
    ttft_spread: float | None = None
    """As `spread`."""
    commit: float | None = None
    """Drafts kept / steps, as measured. `None` for a method without drafts."""
    draft_vocab: int | None = None
    """Token ids that drafts are drawn from; `None`: all."""
    num_steps: int | None = None
    """Decoding steps of a round."""
    middle: float | None = None
    """Tokens that a row held amid those steps, on average: where the floor is computed."""
    bytes_per_s: float | None = None
    """How fast a CPU read the weights right after each round, the median: the floor is of that. `None`: of the machine's measurement."""
    tpot_rounds_s: tuple[float, ...] = ()
    """Of each round, in order; round for round, methods ran one right after the other."""
    ttft_rounds_s: tuple[float, ...] = ()
    """The same."""
    error: str | None = None
    """Why there are no figures."""

    @classmethod
    def from_rounds(
        cls, method: str, point: Point, ttft_rounds_s: Sequence[float], tpot_rounds_s: Sequence[float], **more: Any
    ) -> Self:
        """The row of what each round took: medians and spreads."""
        tpot_s = median(tpot_rounds_s)
        return cls(
            method=method,
            batch=point.batch,
            context=point.context,
            ttft_s=median(ttft_rounds_s),
            tpot_s=tpot_s,
            tokens_per_s=point.batch / tpot_s,
            spread=spread(tpot_rounds_s),
            ttft_spread=spread(ttft_rounds_s),
            tpot_rounds_s=tuple(tpot_rounds_s),
            ttft_rounds_s=tuple(ttft_rounds_s),
            **more,
        )

    @property
    def point(self) -> Point:
        """Where in the grid."""
        return Point(self.batch, self.context)


def gain(row: Row, base: Row, *, first: bool = False) -> float | None:
    """How many times faster than `base` a row is: the median of the rounds, in each of which both ran one right after the other.

    Args:
        first: of the times to the first token, instead of those per token.
    """
    slower_s, faster_s = ((one.ttft_rounds_s if first else one.tpot_rounds_s) for one in (base, row))
    if not slower_s or len(slower_s) != len(faster_s):
        return None
    return median([slower / faster for slower, faster in zip(slower_s, faster_s, strict=True)])


def spread(values: Sequence[float]) -> float:
    """(Largest − smallest) / median."""
    return (max(values) - min(values)) / median(values)


@dataclass(frozen=True, kw_only=True)
class Results(Generic[R]):
    """A run of a benchmark, as its file holds it; `record` has the command line, revision, versions and hardware."""

    kind: str
    """`latency`, `throughput` or `memory`: what the rows are."""
    shape: str | None
    """The named shape; `None` where checkpoints ran."""
    models: tuple[str, ...] = ()
    """The checkpoints."""
    device: str
    dtype: str
    rows: tuple[R, ...] = ()
    machine: Mapping[str, Any] | None = None
    """What the machine was measured to do before the rows: fields of :class:`pipo.bench.cost.Machine`."""
    machine_after: Mapping[str, Any] | None = None
    """The same after them; `None` where the run was cut short."""
    complete: bool = False
    """Whether every row that was asked for is there."""
    record: Mapping[str, Any] = field(default_factory=dict)

    def with_rows(self, rows: Sequence[R]) -> Self:
        """The same run with these rows."""
        return replace(self, rows=tuple(rows))

    def completed(self) -> Self:
        """The same run, with all rows there."""
        return replace(self, complete=True)


def write_results(path: Path, results: Results[Any]) -> None:
    """Write a run's file whole, or leave the one that is there; of a run without a record, this process's."""
    content = asdict(results)
    record = content.pop("record") or describe_session()
    write_json(path, {**record, **content})


def read_results(path: Path, kind: str, row_type: type[R]) -> Results[R]:
    """Read what :func:`write_results` wrote.

    Raises:
        DataError: not such a file, or one of another kind.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read as the results of a benchmark: {error}") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} must hold what `pipo bench {kind} --json` writes, and is of the kind {found!r}")
    own = {one.name for one in fields(Results)} - {"rows", "record", "models"}
    try:
        rows = tuple(_row(row, row_type) for row in content["rows"])
        known = {name: content[name] for name in own}
        record = {name: value for name, value in content.items() if name not in own | {"rows", "models"}}
        return Results(**known, rows=rows, models=tuple(content["models"]), record=record)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks what the results of a benchmark hold: {error}") from error


def _row(content: Mapping[str, Any], row_type: type[R]) -> R:
    """JSON has no tuples."""
    return row_type(**{name: tuple(value) if isinstance(value, list) else value for name, value in content.items()})


def check_writable(paths: Sequence[Path | None]) -> None:
    """Find out before a run whether its files can be written.

    Raises:
        ConfigError: naming the first that can't, and why.
    """
    for path in _given(paths):
        folder = path.parent
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; name a file in it")
        if not folder.is_dir():
            raise ConfigError(f"{path} can't be written: there is no folder {folder}")
        if not os.access(path if path.exists() else folder, os.W_OK) or not os.access(folder, os.W_OK):
            raise ConfigError(f"{path} can't be written: permission denied")


def _given(paths: Sequence[Path | None]) -> Iterator[Path]:
    return (path for path in paths if path is not None)
