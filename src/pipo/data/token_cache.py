"""Tokenised examples on disk, read through memory maps: tokenised once, however many processes and runs read them.

A folder of caches holds one folder for each key, which is a hash over everything that decides the tokens: the rows' bytes, tokenizer,
chat template, settings, and the version of this format. So a stale cache is never found. A cache is written beside its place and
renamed when it is whole; a lock lets one process write while others wait for what it writes.

    tokens.bin    int32, all examples' token ids one after another
    offsets.npy   int64 [E + 1], where example i begins in tokens
    spans.npy     int64 [S, 2], supervised stretches, from and to, counted from the start of their example
    span_offsets.npy  int64 [E + 1], where example i begins in spans
    counts.npy    int64 [E, C], what the writer counted of each example
    meta.json     source and parts of the key; what the writer wants to say beside

Shape legend: E examples, S spans, C counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipo.data.conversation import Turn
from pipo.data.records import is_local, load_dataset
from pipo.errors import DataError

FORMAT = 1
"""Changes whenever the same rows would give other files."""
PARTIAL = ".partial"
READ_BYTES = 2**22


class TokenCache:
    """Examples of a whole cache, by number. Cheap to send to another process, which opens the files anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "meta": self.meta}

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """`[E + 1]`"""
        return self._array("offsets")

    @cached_property
    def spans(self) -> NDArray[np.int64]:
        """`[S, 2]`"""
        return self._array("spans")

    @cached_property
    def span_offsets(self) -> NDArray[np.int64]:
        """`[E + 1]`"""
        return self._array("span_offsets")

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """`[E, C]`"""
        return self._array("counts")

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """All examples' ids."""
        return np.memmap(self.folder / "tokens.bin", np.int32, "r")

    def turns(self, index: int) -> tuple[Turn, ...]:
        """The turns of an example, neighbours of the same kind as one."""
        start, end = (int(offset) for offset in self.offsets[index : index + 2])
        turns: list[Turn] = []
        at = start
        for first, last in self.spans_of(index):
            if at < start + first:
                turns.append((self.tokens[at : start + first].tolist(), False))
            turns.append((self.tokens[start + first : start + last].tolist(), True))
            at = start + last
        if at < end:
            turns.append((self.tokens[at:end].tolist(), False))
        return tuple(turns)

    def spans_of(self, index: int) -> list[tuple[int, int]]:
        """The supervised stretches of an example, from and to."""
        first, last = self.span_offsets[index : index + 2]
        return [(int(a), int(b)) for a, b in self.spans[first:last]]

    def _array(self, name: str) -> NDArray[np.int64]:
        array: NDArray[np.int64] = np.load(self.folder / f"{name}.npy")
        return array


class CacheWriter:
    """Writes a cache's files, example by example."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stream = (folder / "tokens.bin").open("wb")
        self._offsets = [0]
        self._spans: list[tuple[int, int]] = []
        self._span_offsets = [0]
        self._counts: list[Sequence[int]] = []

    @property
    def num_examples(self) -> int:
        """Examples so far."""
        return len(self._counts)

    def add(self, turns: Sequence[Turn], counts: Sequence[int] = ()) -> None:
        """Append an example. `counts`: as many of every example."""
        self._counts.append(counts)
        at = 0
        for ids, supervised in turns:
            self._stream.write(np.asarray(ids, np.int32).tobytes())
            if supervised and ids:
                if len(self._spans) > self._span_offsets[-1] and self._spans[-1][1] == at:
                    self._spans[-1] = (self._spans[-1][0], at + len(ids))
                else:
                    self._spans.append((at, at + len(ids)))
            at += len(ids)
        self._offsets.append(self._offsets[-1] + at)
        self._span_offsets.append(len(self._spans))

    def close(self, meta: Mapping[str, Any]) -> None:
        """Write what is left, with `meta` as the last file."""
        self._stream.close()
        np.save(self.folder / "offsets.npy", np.asarray(self._offsets, np.int64))
        np.save(self.folder / "spans.npy", np.asarray(self._spans, np.int64).reshape(-1, 2))
        np.save(self.folder / "span_offsets.npy", np.asarray(self._span_offsets, np.int64))
        np.save(self.folder / "counts.npy", np.asarray(self._counts, np.int64))
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in self.folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def abandon(self) -> None:
        """Let go of the files. What the last of it could not write is no matter any more."""
        with suppress(OSError):
            self._stream.close()


def open_cache(
    cache_dir: Path,
    source: str,
    key: Mapping[str, Any],
    write: Callable[[CacheWriter], dict[str, Any]],
    note: Callable[[str], None],
) -> TokenCache:
    """The cache of `key`, which is written first where there is none.

    Any number of processes may ask at once: one writes, the others wait.

    Args:
        source: what the rows are called, for notes.
        key: everything that decides the tokens, as JSON.
        write: adds all examples; what it returns is kept in `meta.json`.
        note: told why a cache is written.

    Raises:
        DataError: the folder can't be written or locked. Whatever `write` raises; nothing is left behind then.
    """
    key = {**key, "format": FORMAT}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_dir / digest
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{digest}.lock"):
            if not folder.is_dir():
                note(_reason(cache_dir, source, key))
                _write_whole(folder, {"source": source, "key": key}, write)
        return TokenCache(folder)
    except OSError as error:
        raise DataError(f"no cache of tokens can be kept in {cache_dir}: {error}. Choose another data.cache") from error


def _write_whole(folder: Path, meta: dict[str, Any], write: Callable[[CacheWriter], dict[str, Any]]) -> None:
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed: the lock says that none is at work
    partial.mkdir()
    writer = CacheWriter(partial)
    try:
        writer.close({**write(writer), **meta})
        partial.rename(folder)
    finally:
        writer.abandon()
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _reason(cache_dir: Path, source: str, key: Mapping[str, Any]) -> str:
    """Why a cache has to be written: what differs from the likest of those of the same source."""
    differing: list[list[str]] = []
    for path in cache_dir.glob("*/meta.json"):
        if path.parent.name.endswith(PARTIAL):
            continue
        other = json.loads(path.read_text(encoding="utf-8"))
        if other["source"] == source:
            names = sorted(key.keys() | other["key"].keys())
            differing.append([name for name in names if key.get(name) != other["key"].get(name)])
    if not differing:
        return f"tokenising {source}"
    nearest = min(differing, key=len)
    return f"tokenising {source} again: what {cache_dir} holds of it has other {', '.join(nearest)}"


# --- fingerprints -------------------------------------------------------------------------------------


def fingerprint_of_source(source: str, split: str, subset: str | None) -> str:
    """A hash over the rows: the bytes of a file, or of all files of a folder; a hub dataset's own fingerprint.

    Raises:
        DataError: it can't be read.
    """
    path = Path(source).expanduser()
    if not is_local(source):
        return str(load_dataset(source, split, subset)._fingerprint)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.relative_to(path) if path.is_dir() else file.name}\n{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while part := stream.read(READ_BYTES):
                    digest.update(part)
    except OSError as error:
        raise DataError(f"{source} can't be read: {error}") from error
    return digest.hexdigest()


def fingerprint_of_tokenizer(tokenizer: Any) -> str:
    """A hash over what decides a tokenizer's ids, and over its special tokens: templates write them, and one ends a turn."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    added = {str(token): str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    special = json.dumps([names, sorted(added.items())])
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{special}\n{content}".encode()).hexdigest()
