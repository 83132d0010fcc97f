"""A short name for the weights of a checkpoint, by which an adapter knows the base that it was trained on.

Of each tensor it reads a few windows of bytes, so that it takes a second or so at 9 billion parameters. Layout is left out: shards,
the multimodal prefix and vision tensors change nothing. Two checkpoints that differ only between the windows look the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from pipo.errors import CheckpointError
from pipo.model.adapter import ADAPTER_WEIGHTS, is_adapter
from pipo.model.files import WEIGHTS, WeightFiles
from pipo.model.layout import is_vision, module_name

WINDOW_BYTES = 4096
"""Read at the start, in the middle and at the end of each tensor."""


def base_fingerprint(folder: Path) -> str:
    """SHA-256, as 64 hexadecimal digits, over each tensor's name, dtype, shape and some of its bytes, in the order of names.

    `folder` may hold a regular model, a PIPO model or an adapter (whose own weights are read, not its base's).

    Raises:
        CheckpointError: no safetensors here, or unreadable ones.
    """
    files = WeightFiles(folder, ADAPTER_WEIGHTS if is_adapter(folder) else WEIGHTS)
    parts: list[tuple[str, bytes]] = []
    for path in files.paths:
        try:
            with path.open("rb") as file:
                parts += _parts(file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} can't be read as safetensors: {error}") from error
    digest = hashlib.sha256()
    for name, part in sorted(parts):
        digest.update(f"{name}\n{len(part)}\n".encode())
        digest.update(part)
    return digest.hexdigest()


def _parts(file: BinaryIO) -> list[tuple[str, bytes]]:
    """`(name, dtype, shape and bytes)` of each tensor of a safetensors file: 8 bytes of length, a JSON header, the data."""
    header_bytes = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(header_bytes))
    start = 8 + header_bytes
    kept = {key: entry for key, entry in header.items() if key != "__metadata__" and not is_vision(key)}
    return [
        (
            module_name(key),
            f"{entry['dtype']} {entry['shape']}\n".encode() + _windows(file, start, entry["data_offsets"]),
        )
        for key, entry in kept.items()
    ]


def _windows(file: BinaryIO, start: int, offsets: tuple[int, int]) -> bytes:
    begin, end = offsets
    size = min(WINDOW_BYTES, end - begin)
    read = b""
    for at in (begin, begin + (end - begin - size) // 2, end - size):
        file.seek(start + at)
        read += file.read(size)
    return read
