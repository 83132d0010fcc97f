"""How replies were paired: a reply is read again, as part of the next turn's prompt, in the pairs in which it was written.

Without that the pairing of the two would part at the first rejected draft, and a cache of prefixes could be used no further. No torch.

Texts are kept as bytes, sorted. What shares most with a prompt is then next to where the prompt itself would stand, so that finding it
takes two comparisons whatever is kept.

Shape legend: T tokens, L pairs.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipo.pairing import Pair, num_pairs, pairs_from_sizes

Sizes = npt.NDArray[np.uint8]
"""`[L]`: how many tokens each pair holds, 1 or 2."""
TOKEN_BYTES = 4
BYTES_PER_TOKEN = TOKEN_BYTES + 1
"""Most that is kept for one token, beside some hundred bytes a text."""


def plain_sizes(num_tokens: int) -> Sizes:
    """`[L]` of a text that is packed two by two."""
    sizes = np.full(num_pairs(num_tokens), 2, dtype=np.uint8)
    sizes[num_tokens // 2 :] = 1
    return sizes


class PairMemory:
    """How replies were paired, for at most `max_tokens` remembered tokens; the oldest are forgotten first. Any thread may use it.

    What it answers depends on what it was asked and told before, in that order, and on nothing else: processes that see the same
    requests end in the same order pair alike.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._lock = threading.Lock()
        self._sizes: OrderedDict[bytes, Sizes] = OrderedDict()  # the least recently used first
        self._sorted: list[bytes] = []

    def remember(self, pairs: Sequence[Pair]) -> None:
        """Keep the pairing of a finished text, all but its last pair: the next turn may complete that."""
        if self.max_tokens == 0:
            return
        tokens = [token for pair in pairs[:-1] for token in pair if token is not None]
        self.remember_sizes(tokens, [1 + (pair.token2 is not None) for pair in pairs[:-1]])

    def remember_sizes(self, tokens: Sequence[int], sizes: Sequence[int] | Sizes) -> None:
        """Keep the pairing of a text as it is: `tokens [T]` in pairs of `sizes [L]`."""
        kept = np.array(sizes, dtype=np.uint8)
        if (kept == 2).all() or len(tokens) > self.max_tokens:
            return  # two by two is what comes without remembering
        text = _text(tokens)
        with self._lock:
            at = bisect_left(self._sorted, text)
            if at < len(self._sorted) and self._sorted[at].startswith(text):
                return
            self._sorted.insert(at, text)
            self._sizes[text] = kept
            self.num_tokens += len(tokens)
            while at > 0 and text.startswith(self._sorted[at - 1]):  # an earlier turn: this text tells more
                at -= 1
                self._drop(self._sorted[at])
            while self.num_tokens > self.max_tokens:
                self._drop(next(iter(self._sizes)))

    def pack(self, tokens: Sequence[int]) -> list[Pair]:
        """Pairs of a prompt, as :meth:`sizes` has them."""
        return pairs_from_sizes(tokens, self.sizes(tokens).tolist())

    def sizes(self, tokens: Sequence[int]) -> Sizes:
        """`[L]` for a prompt: as remembered as far as it agrees with a remembered text, then two by two."""
        as_before = self._find(_text(tokens))
        return np.concatenate([as_before, plain_sizes(len(tokens) - int(as_before.sum()))])

    def clear(self) -> None:
        """Forget everything: after the weights have changed no cache holds any of it."""
        with self._lock:
            self._sizes.clear()
            self._sorted.clear()
            self.num_tokens = 0

    # --- inner

    def _find(self, prompt: bytes) -> Sizes:
        """The pairs that the prompt can share with the text that agrees with it longest."""
        with self._lock:
            at = bisect_left(self._sorted, prompt)
            beside = self._sorted[max(0, at - 1) : at + 1]
            if not beside:
                return np.empty(0, dtype=np.uint8)
            agreeing = [_num_agreeing(prompt, text) for text in beside]
            num_tokens = max(agreeing)
            text = beside[agreeing.index(num_tokens)]
            sizes = self._sizes[text]
            self._sizes.move_to_end(text)
        # A cache entry of a pair is computed from the next pair's first token, too: that must agree as well, where it is known.
        side: Literal["left", "right"] = "right" if num_tokens * TOKEN_BYTES == len(text) else "left"
        return sizes[: np.searchsorted(sizes.cumsum(dtype=np.int64), num_tokens, side=side)]

    def _drop(self, text: bytes) -> None:
        del self._sizes[text]
        del self._sorted[bisect_left(self._sorted, text)]
        self.num_tokens -= len(text) // TOKEN_BYTES


def _text(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.uint32).tobytes()


def _num_agreeing(one: bytes, other: bytes) -> int:
    """Leading tokens that two texts share."""
    length = min(len(one), len(other)) // TOKEN_BYTES
    a, b = (np.frombuffer(text, dtype=np.uint32, count=length) for text in (one, other))
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else length
