"""Who holds how much memory, and when: a count of the bytes of every tensor storage that operations make, until it is freed.

It works on real tensors and on fake ones (`torch._subclasses.FakeTensorMode`), which have sizes and no data: a training step of
any size can be run on fake tensors to see what it would take.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryLedger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live bytes by the part that was at work when their storage was made. Tensors from before it are not counted.

    `live_bytes`, `peak_bytes`: now, and at most since :meth:`reset_peak`. `parts_at_peak`: part → bytes at that moment.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self.parts: Counter[str] = Counter()
        self.parts_at_peak: Counter[str] = Counter()
        self._part = "other"
        self._part_of: dict[int, str] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Storages that are made inside belong to `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def reset_peak(self) -> None:
        """Start looking for the peak anew."""
        self.peak_bytes, self.parts_at_peak = self.live_bytes, self.parts.copy()

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage under another part from now on."""
        storage = tensor.untyped_storage()
        before = self._part_of.get(storage._cdata)
        if before is not None:
            self._part_of[storage._cdata] = part
            self.parts[before] -= storage.nbytes()
            self.parts[part] += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes: views and results in place share a storage that was there before."""
        out = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)]
        if new := [storage for storage in storages if storage._cdata not in self._part_of]:
            given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for storage in new:
                if storage._cdata not in given:
                    self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._part_of:  # twice among an operation's results
            return
        self._part_of[key] = self._part
        self.live_bytes += size
        self.parts[self._part] += size
        if self.live_bytes > self.peak_bytes:
            self.reset_peak()
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live_bytes -= size
        self.parts[self._part_of.pop(key)] -= size
