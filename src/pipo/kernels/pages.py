"""Weights in huge pages: with small ones a processor looks up an address every 4 KiB, and reads memory at half its rate.

Linux only, and only where the system leaves the choice to programs or makes all pages huge; elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

HUGE_BYTES = 2**21
ALIGNMENT = 64
ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def advise(tensor: Tensor) -> bool:
    """Ask for huge pages for memory that nobody has written to yet; whether the system takes the advice."""
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, end = -(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
    if ADVICE is None or tensor.device.type != "cpu" or end <= start:
        return False
    return _libc().madvise(start, end - start, ADVICE) == 0  # type: ignore[no-any-return]


def zeros(*shape: int, like: Tensor) -> Tensor:
    """Zeros of `like`'s dtype and device, in huge pages where they are large enough for some."""
    made = like.new_empty(shape)
    advise(made)
    return made.zero_()


def gather(parameters: Iterable[nn.Parameter]) -> int:
    """Move the weights of a model that nobody else uses into one stretch of huge pages; how many bytes, 0 where there are none.

    Each parameter stays the object that it is; what shared memory with another shares it still.
    """
    found = {id(p): p for p in parameters if p.device.type == "cpu" and p.is_contiguous()}
    places: dict[tuple[int, int], int] = {}
    total = 0
    for parameter in found.values():
        key = (parameter.data_ptr(), parameter.nbytes)
        if key not in places:
            places[key] = total
            total += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    if total < HUGE_BYTES:
        return 0
    arena = torch.empty(total + HUGE_BYTES, dtype=torch.uint8, device="cpu")
    if not advise(arena):
        return 0
    first = -arena.data_ptr() % HUGE_BYTES
    copied: set[int] = set()
    for parameter in found.values():
        start = first + places[parameter.data_ptr(), parameter.nbytes]
        view = arena[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        if start not in copied:
            view.copy_(parameter.data)
            copied.add(start)
        parameter.data = view
    return total
