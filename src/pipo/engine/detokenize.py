"""Tokens to text while they come: whole characters only, and stop strings cut exactly.

The texts that a `Detokenizer` gives out add up to `tokenizer.decode` of all tokens so far, special tokens skipped, less
what has to be held back: half a character, an open run of byte tokens, and text that could still become a stop string.
The work per token does not grow with the text.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Self

from pipo.errors import RequestError

REPLACEMENT = "\ufffd"
"""What decoders show for bytes that are not a character (yet)."""

_CONTEXT_TOKENS = 8
"""Tokens that suffice to decode the next one after: more than the bytes of a character, and never no text at all."""
_WINDOW_TOKENS = 4 * _CONTEXT_TOKENS


class TextDecoder:
    """What decoding needs to know about a tokenizer; made once and shared by all requests."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = _special_ids(tokenizer)
        self.byte_of_id = _byte_tokens(tokenizer, self)
        """Tokens that stand for one byte each, in tokenizers that fall back to bytes."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of these tokens alone; special tokens are left out."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def is_silent(self, token_id: int) -> bool:
        """Whether decoding leaves this token out: a special one, or an id beyond the tokenizer's vocabulary."""
        return token_id in self.special_ids or self.tokenizer.convert_ids_to_tokens(token_id) is None


class StopMatcher:
    """Finds the stop string that a growing text completes first, and holds back what could still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.longest = max(map(len, self.stops), default=0)
        self.matched: str | None = None
        self.held = ""
        self.end = 0
        """Characters fed so far."""
        self.floor = 0
        """No match starts before this character."""

    def copy(self) -> Self:
        """An independent matcher in the same state."""
        other = type(self)(self.stops)
        other.__dict__.update(self.__dict__)
        return other

    def feed(self, text: str) -> str:
        """Take more text; return what is settled. A match cuts the text at its start and sets `matched`."""
        if self.matched is not None:
            return ""
        buffer = self.held + text
        self.end += len(text)
        first = max(0, self.floor - (self.end - len(buffer)))
        hits = [(start + len(s), start, s) for s in self.stops if (start := buffer.find(s, first)) >= 0]
        if hits:
            # The one that ends first, as if characters came one by one; of two, the one that starts first.
            _, start, self.matched = min(hits)
            self.held = ""
            return buffer[:start]
        keep = self._open_length(buffer, first)
        self.held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep]

    def _open_length(self, buffer: str, first: int) -> int:
        """Length of the longest end of `buffer` that begins a stop string."""
        for length in range(min(self.longest - 1, len(buffer) - first), 0, -1):
            end = buffer[len(buffer) - length :]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0


class Detokenizer:
    """The text of one request, token by token.

    Push every visible token but the one whose id stopped the text; then call `finish`. Without a tokenizer the text is
    always empty.

    Raises:
        RequestError: stop strings without a tokenizer.
    """

    def __init__(self, decoder: TextDecoder | None, stops: Sequence[str] = ()) -> None:
        if decoder is None and stops:
            raise RequestError(f"stop strings need a tokenizer, and this model has none: stop={list(stops)!r}")
        self._decoder = decoder
        self._matcher = StopMatcher(stops)
        self._pieces: list[str] = []
        self._window: list[int] = []
        self._num_done = 0
        """Characters of the window's text that the matcher has been fed."""
        self._run = _ByteRun()

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._pieces)

    @property
    def stop_string(self) -> str | None:
        """The stop string that the last pushed token completed; nothing is added to the text after it."""
        return self._matcher.matched

    def push(self, token_id: int, check_stop: bool = True) -> str:
        """Take one token; return the text that is now settled.

        `check_stop=False` (before min-tokens): stop strings that begin in the text so far do not count, ever.
        """
        if self._decoder is None or self.stop_string is not None or self._decoder.is_silent(token_id):
            return ""
        if not check_stop:
            self._matcher.floor = sys.maxsize
        byte = self._decoder.byte_of_id.get(token_id)
        if byte is None:
            self._window += [*self._run.ids, token_id]
            self._run = _ByteRun()
            text = self._advance()
        else:
            self._run.push(token_id, byte)
            text = self._look_into_run() if check_stop else ""
        if not check_stop:
            text += self._matcher.feed("")
            self._matcher.floor = self._matcher.end + self._run.num_chars
        return self._give(text)

    def push_all(self, token_ids: Iterable[int]) -> tuple[str, int]:
        """Push tokens until one completes a stop string: their text, and how many were taken (that one included)."""
        text, num_taken = "", 0
        for token_id in token_ids:
            text += self.push(token_id)
            num_taken += 1
            if self.stop_string is not None:
                break
        return text, num_taken

    def finish(self) -> str:
        """The text that was held back until now. Call once, when no more tokens come."""
        if self._decoder is None or self.stop_string is not None:
            return ""
        self._window += self._run.ids
        self._run = _ByteRun()
        text = self._matcher.feed(self._decoder.decode(self._window)[self._num_done :])
        if self.stop_string is None:
            text += self._matcher.held
        return self._give(text)

    def _give(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _advance(self) -> str:
        """Feed the matcher what the window's text has gained, and keep the window short."""
        assert self._decoder is not None
        text = self._decoder.decode(self._window)
        # At most the last character can be half of one.
        open_chars = int(text.endswith(REPLACEMENT))
        gained = text[self._num_done : len(text) - open_chars]
        self._num_done = max(self._num_done, len(text) - open_chars)
        if len(self._window) > _WINDOW_TOKENS:
            self._window = self._window[-_CONTEXT_TOKENS:]
            self._num_done = len(self._decoder.decode(self._window)) - open_chars
        return self._matcher.feed(gained)

    def _look_into_run(self) -> str:
        """Give the open run's text out at once where it completes a stop string, else hold all of it.

        A decoder shows a run of bytes as characters only if the whole run is valid, so nothing of it is settled
        before the run ends.
        """
        run = self._run
        if run.num_chars == run.num_seen or not run.is_whole:
            return ""
        if run.probe is None:
            run.probe = self._matcher.copy()
        run.probe.feed(run.chars[run.num_seen :])
        run.num_seen = run.num_chars
        if run.probe.matched is None:
            return ""
        assert self._decoder is not None
        matcher = self._matcher.copy()
        text = matcher.feed(self._decoder.decode([*self._window, *run.ids])[self._num_done :])
        if matcher.matched is None:
            return ""
        self._matcher = matcher
        return text


class _ByteRun:
    """Byte tokens in a row, and the characters that they make so far."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.chars = ""
        self.num_seen = 0
        """Characters that `probe` has been fed."""
        self.probe: StopMatcher | None = None
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._valid = True

    @property
    def num_chars(self) -> int:
        return len(self.chars)

    @property
    def is_whole(self) -> bool:
        """Whether the bytes so far are characters and nothing else."""
        return self._valid and self._utf8.getstate()[0] == b""

    def push(self, token_id: int, byte: int) -> None:
        self.ids.append(token_id)
        if self._valid:
            try:
                self.chars += self._utf8.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._valid = False


def _special_ids(tokenizer: Any) -> frozenset[int]:
    if getattr(tokenizer, "is_fast", False):
        return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(tokenizer.all_special_ids)


def _byte_tokens(tokenizer: Any, decoder: TextDecoder) -> dict[int, int]:
    """Ids of `<0x00>` … `<0xFF>` where the tokenizer decodes them as bytes."""
    ids = {byte: tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    known = {byte: i for byte, i in ids.items() if i is not None and i != tokenizer.unk_token_id}
    euro = [known[byte] for byte in "€".encode() if byte in known]
    if len(euro) != 3 or decoder.decode(euro) != "€":
        return {}
    return {token_id: byte for byte, token_id in known.items()}
