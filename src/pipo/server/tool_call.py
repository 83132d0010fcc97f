"""One tool call inside `<tool_call>` … `</tool_call>`, read while it comes, in either form that Qwen templates teach:

    {"name": "weather", "arguments": {"city": "Bern"}}

    <function=weather>
    <parameter=city>
    Bern
    </parameter>
    </function>

Arguments go out as JSON text: the first form's as written, the second's parameter by parameter.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

END_CALL = "</tool_call>"
END_PARAMETER, END_FUNCTION = "</parameter>", "</function>"
JSON_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)')
XML_HEAD = re.compile(r"\s*<function=([^>\n]+)>\s*")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
STEP = re.compile(r'["\\{}\[\]]')


def is_text(schema: Any) -> bool:
    """Whether values of this schema are strings: it says so, or it says nothing."""
    if not isinstance(schema, Mapping):
        return True
    if "type" in schema:
        return bool(schema["type"] == "string")
    return not any(key in schema for key in ("anyOf", "oneOf", "allOf", "enum", "const", "$ref"))


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call. Its first has an id and the function's name."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class CallParser:
    """Reads one call. `rest` is what came after its end, once `done`.

    A text that is no call leaves `started` False: it is to be shown as it is (`leftover`).
    """

    def __init__(self, index: int, tools: Mapping[str, Mapping[str, Any]]) -> None:
        self._index = index
        self._tools = tools
        self._text = ""
        self._at = 0
        self._form: str | None = None
        self._properties: Mapping[str, Any] = {}
        self._num_parameters = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.started = False
        self.done = False
        self.rest = ""

    def feed(self, text: str) -> list[CallDelta]:
        """What `text` adds to the call."""
        self._text += text
        deltas = self._start() if self._form is None else []
        arguments = ""
        if self._form == "xml":
            arguments = self._read_parameters()
        elif self._form == "json":
            arguments = self._read_json()
        if self._form is not None and not self.done:
            self._look_for_end()
        if arguments:
            deltas.append(CallDelta(self._index, arguments))
        return deltas

    def leftover(self, mark: str) -> str:
        """The text of what turned out to be no call, its marks included; nothing for a call that was cut off."""
        if self.started:
            return ""
        return mark + self._text + (END_CALL if self.done else "")

    def _start(self) -> list[CallDelta]:
        if head := JSON_HEAD.match(self._text):
            self._form, name = "json", str(json.loads(head[1], strict=False))
        elif head := XML_HEAD.match(self._text):
            self._form, name = "xml", head[1].strip()
        else:
            return self._whole()
        self._at = head.end()
        return [self._begin(name)]

    def _begin(self, name: str) -> CallDelta:
        self.started = True
        self._properties = self._tools.get(name, {}).get("properties") or {}
        return CallDelta(self._index, "", id=f"call_{secrets.token_hex(12)}", name=name)

    def _whole(self) -> list[CallDelta]:
        """A call that begins like neither form, once it has ended: JSON in another order, or no call at all."""
        text, end, rest = self._text.partition(END_CALL)
        if not end:
            return []
        self.done, self._text, self.rest = True, text, rest
        try:
            value = json.loads(text)
            name, arguments = value["name"], value.get("arguments", value.get("parameters", {}))
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
        if not isinstance(name, str):
            return []
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [self._begin(name), CallDelta(self._index, written)]

    def _read_json(self) -> str:
        """The arguments' text as far as it goes; their end is where their brackets close."""
        start = self._at
        while self._form == "json" and self._at < len(self._text):
            if self._escaped:
                self._at, self._escaped = self._at + 1, False
                continue
            found = STEP.search(self._text, self._at)
            if found is None:
                self._at = len(self._text)
                break
            self._at = found.end()
            self._step(found[0])
        return self._text[start : self._at]

    def _step(self, character: str) -> None:
        if character == "\\":
            self._escaped = self._in_string
        elif character == '"':
            self._in_string = not self._in_string
            if not self._in_string and not self._depth:
                self._form = "closing"
        elif not self._in_string:
            self._depth += 1 if character in "{[" else -1
            if self._depth <= 0:
                self._form = "closing"
                if self._depth < 0:  # arguments that are a bare number or word end before the call's own bracket
                    self._at -= 1

    def _read_parameters(self) -> str:
        """The parameters that are whole, as the inside of a JSON object; its brackets with the first and after the last."""
        written = ""
        while True:
            head = PARAMETER.match(self._text, self._at)
            end = self._text.find(END_PARAMETER, head.end()) if head else -1
            if head is None or end < 0:
                break
            name = head[1].strip()
            value = self._value(name, self._text[head.end() : end].removesuffix("\n"))
            written += ", " if self._num_parameters else "{"
            written += f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}"
            self._num_parameters += 1
            self._at = end + len(END_PARAMETER)
        if self._text[self._at :].lstrip().startswith((END_FUNCTION, END_CALL)):
            written += "}" if self._num_parameters else "{}"
            self._form = "closing"
        return written

    def _value(self, name: str, text: str) -> Any:
        """A parameter's value: text, unless its schema says otherwise and it reads as JSON."""
        if is_text(self._properties.get(name)):
            return text
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _look_for_end(self) -> None:
        end = self._text.find(END_CALL, self._at) if self._form == "closing" else -1
        if end >= 0:
            self.done, self.rest = True, self._text[end + len(END_CALL) :]
