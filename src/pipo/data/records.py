"""Files of rows: JSON lines (also `.gz`), parquet, folders of either, datasets on the hub. No torch.

Reading names each row that is wrong, and never drops one unheard. `pipo.data.writing` writes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import ValidationError

from pipo.data.rows import Message, OpdRow, Question, RolloutRow, Row, SftRow, SourceItem, explain
from pipo.data.writing import LineWriter, write_rows
from pipo.errors import DataError

__all__ = [
    "BadRow",
    "LineWriter",
    "Message",
    "OpdRow",
    "Question",
    "RolloutRow",
    "Row",
    "RowFile",
    "SftRow",
    "SourceItem",
    "count_rows",
    "is_local",
    "load_dataset",
    "read_rows",
    "read_values",
    "refuse_bad",
    "write_rows",
]

R = TypeVar("R", bound=Row)
JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET = (".parquet",)
NAMED_ROWS = 5
"""Bad rows that an error names one by one."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used."""

    line: int
    """Line of a text file, or row of parquet or of a dataset, from 1."""
    reason: str


class RowFile(Generic[R]):
    """The rows of a source, checked as they are read: iterate for `(line, row)`.

    Rows that are wrong are left out and stand in `bad`, of the latest iteration. `num_read` counts both.
    """

    def __init__(self, source: str | Path, kind: type[R], split: str = "train", subset: str | None = None) -> None:
        self.source = str(source)
        self.kind = kind
        self.split = split
        self.subset = subset
        self.bad: list[BadRow] = []
        self.num_read = 0

    def __iter__(self) -> Iterator[tuple[int, R]]:
        self.bad, self.num_read = [], 0
        for line, value in read_values(self.source, split=self.split, subset=self.subset):
            self.num_read += 1
            row = self._check(line, value)
            if row is not None:
                yield line, row

    def _check(self, line: int, value: Any) -> R | None:
        reason = value.reason if isinstance(value, BadRow) else None
        if reason is None and not isinstance(value, dict):
            reason = f"should be a JSON object, but is {json.dumps(value)[:40]}"
        if reason is None:
            try:
                return self.kind.model_validate(value)
            except ValidationError as error:
                reason = explain(error)
        self.bad.append(BadRow(line, str(reason)))
        return None

    def rows(self) -> list[R]:
        """All rows.

        Raises:
            DataError: any is wrong; the message names the first of them by line.
        """
        rows = [row for _, row in self]
        self.check()
        return rows

    def check(self) -> None:
        """Refuse what the latest iteration found wrong.

        Raises:
            DataError: any row was; the message names the first of them by line.
        """
        refuse_bad(self.source, self.bad, self.num_read, self.kind.__name__)


def refuse_bad(source: str, bad: list[BadRow], num_read: int, kind: str) -> None:
    """Refuse rows that are wrong.

    Raises:
        DataError: there are any; the message names the first of them by line.
    """
    if bad:
        named = "; ".join(f"line {row.line}: {row.reason}" for row in bad[:NAMED_ROWS])
        more = f"; … ({len(bad)} in all)" if len(bad) > NAMED_ROWS else ""
        raise DataError(f"{source}: {len(bad)} of {num_read} rows are no {kind}: {named}{more}")


def read_rows(source: str | Path, kind: type[R], *, split: str = "train", subset: str | None = None) -> RowFile[R]:
    """The rows of a file, a folder or a dataset on the hub.

    Args:
        source: a file of JSON lines or parquet; or a folder or hub id (`owner/name`) that `datasets` loads, without remote code.
        kind: what each row should be.
        split, subset: of a folder or a dataset.

    Raises:
        DataError, while iterating: the source can't be read at all. Rows that are wrong stand in `bad` instead.
    """
    return RowFile(source, kind, split, subset)


def is_local(source: str | Path) -> bool:
    """Whether `source` names a place on this machine, and not a dataset on the hub."""
    text = str(source)
    looks_local = text.startswith((".", "/", "~")) or text.endswith((*JSON_LINES, *PARQUET)) or text.count("/") != 1
    return Path(source).expanduser().exists() or looks_local


def read_values(source: str | Path, *, split: str = "train", subset: str | None = None) -> Iterator[tuple[int, Any]]:
    """`(line, value)` of each row, unchecked; the value of a line that is no JSON is a `BadRow`.

    Raises:
        DataError: the source can't be read.
    """
    path = Path(source).expanduser()
    if not is_local(source) or path.is_dir():
        return _read_dataset(str(path) if path.is_dir() else str(source), split, subset)
    if not path.is_file():
        raise DataError(f"{source} is neither a file, nor a folder, nor a dataset on the hub (owner/name)")
    if path.name.endswith(PARQUET):
        return _read_parquet(path)
    if path.name.endswith(JSON_LINES):
        return _read_lines(path)
    raise DataError(f"{source}: a file of rows ends in one of {', '.join((*JSON_LINES, *PARQUET))}")


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    # Only \n ends a line: other characters that Unicode calls line ends may stand in JSON strings.
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1 and path.suffix == ".json" and line.lstrip().startswith(b"["):
                    raise DataError(
                        f"{path} is one JSON list; rows are one JSON object a line. jq -c '.[]' makes lines of a list"
                    )
                if not line.strip():
                    continue
                yield number, _parse(number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}") from error


def _parse(number: int, line: bytes) -> Any:
    try:
        value = json.loads(line)
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        return BadRow(number, "holds half of a surrogate pair, which is no text")
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"no JSON: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: parquet needs more packages: pip install 'pipo-llm[train]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} can't be read as parquet: {error}") from error


def _read_dataset(name: str, split: str, subset: str | None) -> Iterator[tuple[int, Any]]:
    yield from enumerate(load_dataset(name, split, subset), 1)


def load_dataset(name: str, split: str, subset: str | None) -> Any:
    """A folder or a dataset on the hub, as `datasets` loads it.

    Raises:
        DataError: it can't be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name}: datasets need more packages: pip install 'pipo-llm[train]'") from error
    try:
        return datasets.load_dataset(name, subset, split=split)
    except (
        OSError,
        ValueError,
        RuntimeError,
        HfHubHTTPError,
        HFValidationError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise DataError(
            f"dataset {name} (subset {subset or 'default'}, split {split}) can't be loaded: {error}. "
            "On a machine without network, bring it first: pipo fetch"
        ) from error


def count_rows(source: str | Path, *, split: str = "train", subset: str | None = None) -> int:
    """How many rows a source has, right or wrong.

    Raises:
        DataError: the source can't be read.
    """
    path = Path(source).expanduser()
    if not is_local(source) or path.is_dir():
        return len(load_dataset(str(path) if path.is_dir() else str(source), split, subset))
    return sum(1 for _ in read_values(source, split=split, subset=subset))
