"""What the engine remembers of finished work: caches of prompt prefixes. How replies were paired is in `pipo.pair_memory`.

An entry holds the keys and values of `n` pairs, and linear-attention states at some of the positions up to `n`. A new
prompt may go on from position `m` of an entry when its first `m` pairs are the entry's **and** the token 1 of its pair `m` is too:
the MTP block's entry `m-1` was computed from that token. So what is reused is exactly what would have been computed.
Keys and values can be cropped to any `m`; states can't, so there `m` must be a position that was kept: the end of an entry, or a
point where an earlier prompt was found to branch off.

Shape legend: N key-value heads, L positions, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipo.model.row_state import RowState, States
from pipo.pairing import Pair

Keys = npt.NDArray[np.int64]


def _keys(pairs: Sequence[Pair]) -> Keys:
    """One int64 per pair: token 1 above, token 2 (0 where empty) below."""
    return np.array([(t1 << 32) | (0 if t2 is None else t2 + 1) for t1, t2 in pairs], dtype=np.int64)


def _common(a: Keys, b: Keys) -> int:
    """Number of leading pairs that two sequences share."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


@dataclass(eq=False)
class PrefixEntry:
    """`keys`: the `n` cached pairs. `next_token1`: of pair `n`. `state`: their cache. `snapshots`: position → states there."""

    keys: Keys
    next_token1: int
    state: RowState
    snapshots: dict[int, States] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Memory held, snapshots included."""
        return self.state.num_bytes() + sum(RowState.bytes_of_states(s) for s in self.snapshots.values())

    def usable(self, keys: Keys) -> int:
        """Most positions that a prompt can take over, were states no obstacle."""
        common = min(_common(self.keys, keys), len(keys) - 1)
        next_token1 = self.next_token1 if common == len(self.keys) else int(self.keys[common] >> 32)
        return common if int(keys[common] >> 32) == next_token1 else max(0, common - 1)


@dataclass(frozen=True)
class PrefixMatch:
    """Take over the first `length` positions of `entry`."""

    entry: PrefixEntry
    length: int


class PrefixCache:
    """Finished prefixes within `max_bytes`, the least recently used dropped first.

    Args:
        has_states: whether the model has linear-attention layers, whose states exist at kept positions only.
    """

    def __init__(self, max_bytes: int, has_states: bool) -> None:
        self.max_bytes = max_bytes
        self.has_states = has_states
        self._entries: OrderedDict[int, PrefixEntry] = OrderedDict()
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything: after the weights have changed, nothing holds any more."""
        self._entries.clear()
        self.num_bytes = 0

    def find(self, pairs: Sequence[Pair]) -> tuple[PrefixMatch | None, int | None]:
        """The longest usable prefix, and where to keep states on the way because other prompts branch off there (or `None`)."""
        keys = _keys(pairs)
        best: PrefixMatch | None = None
        branch = 0
        for entry in self._entries.values():
            usable = entry.usable(keys)
            branch = max(branch, usable)
            length = max((p for p in entry.snapshots if p <= usable), default=0) if self.has_states else usable
            if length > 0 and (best is None or length > best.length):
                best = PrefixMatch(entry, length)
        if best is not None:
            self._entries.move_to_end(id(best.entry))
        reached = 0 if best is None else best.length
        return best, branch if self.has_states and branch > reached else None

    def count(self, hit: bool) -> None:
        """Note whether a prefill could go on from an entry."""
        self.num_hits += hit
        self.num_misses += not hit

    def store(
        self, pairs: Sequence[Pair], next_token1: int, state: RowState, snapshots: dict[int, States] | None = None
    ) -> None:
        """Keep the cache of `pairs`; entries that it covers are dropped, their snapshots taken over."""
        entry = PrefixEntry(_keys(pairs), next_token1, state, dict(snapshots or {}))
        if self.has_states:
            entry.snapshots[len(pairs)] = state.states
        if entry.num_bytes > self.max_bytes:
            return
        for key, old in list(self._entries.items()):
            shared = _common(old.keys, entry.keys)
            covered = shared == len(old.keys) and (
                shared == len(entry.keys) or int(entry.keys[shared] >> 32) == old.next_token1
            )
            if covered:
                entry.snapshots = {**old.snapshots, **entry.snapshots}
                self._drop(key)
        self._entries[id(entry)] = entry
        self.num_bytes += entry.num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: int) -> None:
        self.num_bytes -= self._entries.pop(key).num_bytes
