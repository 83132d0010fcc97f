"""A model's text, taken apart while it comes: reasoning, content, tool calls.

Reasoning stands between `<think>` and `</think>`; where the template opens it, the text begins inside. White space around the
marks belongs to neither part. What only looks like a mark stays text: nothing the model wrote is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipo.server.tool_call import CallDelta, CallParser

THINK, END_THINK, CALL = "<think>", "</think>", "<tool_call>"

State = Literal["start", "reasoning", "content", "call"]


@dataclass(frozen=True)
class Delta:
    """What a piece of text added to each part."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class ReplyParser:
    """Takes one reply's text piece by piece.

    Args:
        thinks: whether the template knows `<think>`; then a reply may begin with it.
        thinking: whether the prompt ends inside `<think>`.
        tools: parameter schemas of the functions that may be called, by name; `None`: calls stay text.
    """

    def __init__(
        self, *, thinks: bool = False, thinking: bool = False, tools: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self._state: State = "reasoning" if thinking else "start" if thinks else "content"
        self._tools = tools
        self._buffer = ""
        self._skip_space = thinking
        self._call: CallParser | None = None
        self.num_calls = 0
        self._reasoning, self._content = "", ""
        self._calls: list[CallDelta] = []

    @property
    def reasoning_now(self) -> bool:
        """Whether the text is inside the reasoning."""
        return self._state == "reasoning"

    def feed(self, text: str) -> Delta:
        """What `text` settles."""
        self._buffer += text
        while self._advance():
            pass
        return self._take()

    def finish(self) -> Delta:
        """What was held back."""
        if self._call is not None:
            self._content += self._call.leftover(CALL)
            self.num_calls += self._call.started
            self._call = None
        elif self._state == "reasoning":
            self._reasoning += self._buffer
        elif not (self._skip_space and self._buffer.isspace()):
            self._content += self._buffer
        self._buffer = ""
        return self._take()

    def _take(self) -> Delta:
        delta = Delta(self._reasoning, self._content, tuple(self._calls))
        self._reasoning, self._content, self._calls = "", "", []
        return delta

    def _advance(self) -> bool:
        """Settle what can be; whether the state changed."""
        if self._call is not None:
            return self._advance_call(self._call)
        if self._state == "start":
            return self._begin()
        if self._skip_space:
            self._buffer = self._buffer.lstrip()
            if not self._buffer:
                return False
            self._skip_space = False
        if self._state == "reasoning":
            self._reasoning += self._until(END_THINK)
            return self._entered(END_THINK, "content")
        if self._tools is None:
            self._content += self._buffer
            self._buffer = ""
            return False
        self._content += self._until(CALL)
        if self._entered(CALL, "call"):
            self._call = CallParser(self.num_calls, self._tools)
            return True
        return False

    def _begin(self) -> bool:
        text = self._buffer.lstrip()
        if THINK.startswith(text) and text != THINK:
            return False
        if text.startswith(THINK):
            self._buffer = text[len(THINK) :]
            self._state, self._skip_space = "reasoning", True
        else:
            self._state = "content"
        return True

    def _until(self, mark: str) -> str:
        """The text before `mark`, less what could still become it and the space before that; taken off the buffer."""
        at = self._buffer.find(mark)
        if at < 0:
            at = len(self._buffer) - open_length(self._buffer, mark)
        kept = self._buffer[:at].rstrip()
        self._buffer = self._buffer[len(kept) :]
        return kept

    def _entered(self, mark: str, state: State) -> bool:
        """Go on to `state` where the buffer is at `mark`."""
        rest = self._buffer.lstrip()
        if not rest.startswith(mark):
            return False
        self._buffer = rest[len(mark) :]
        self._state, self._skip_space = state, state == "content"
        return True

    def _advance_call(self, call: CallParser) -> bool:
        self._calls += call.feed(self._buffer)
        self._buffer = ""
        if not call.done:
            return False
        if call.started:
            self.num_calls += 1
            self._skip_space = True
        else:
            self._content += call.leftover(CALL)
        self._buffer = call.rest
        self._call, self._state = None, "content"
        return True


def open_length(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
