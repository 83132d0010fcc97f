"""How replies were paired: a reply is read again, as part of the next turn's prompt, in the pairs in which it was written.

Without that the pairing of the two would part at the first rejected draft, and a cache of prefixes could be used no further. No torch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from pipo.pairing import Pair, pairs_from_tokens


class PairMemory:
    """How replies were paired, for at most `max_tokens` remembered tokens; the oldest are forgotten first. Any thread may use it."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._lock = threading.Lock()
        self._texts: OrderedDict[tuple[int, ...], list[Pair]] = OrderedDict()
        self._num_tokens = 0

    def remember(self, prompt_pairs: Sequence[Pair], reply_pairs: Sequence[Pair]) -> None:
        """Keep the pairing of a finished text. Its last pair is left out: the next turn may complete it."""
        pairs = [*prompt_pairs, *reply_pairs[:-1]]
        if all(pair.token2 is not None for pair in pairs):
            return  # what packing two by two gives anyway
        tokens = tuple(token for pair in pairs for token in pair if token is not None)
        with self._lock:
            if len(tokens) > self.max_tokens or tokens in self._texts:
                return
            self._texts[tokens] = pairs
            self._num_tokens += len(tokens)
            while self._num_tokens > self.max_tokens:
                forgotten, _ = self._texts.popitem(last=False)
                self._num_tokens -= len(forgotten)

    def pack(self, tokens: Sequence[int]) -> list[Pair]:
        """Pairs of a prompt: as remembered as far as the longest remembered text goes, then two by two."""
        prompt = tuple(tokens)
        best: tuple[int, ...] = ()
        with self._lock:
            for text in self._texts:
                if len(best) < len(text) < len(prompt) and prompt[: len(text)] == text:
                    best = text
            if not best:
                return pairs_from_tokens(prompt)
            self._texts.move_to_end(best)
            return [*self._texts[best], *pairs_from_tokens(prompt[len(best) :])]
