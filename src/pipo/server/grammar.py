"""Grammars (Lark, as `llguidance` reads it) for replies whose form is asked for: JSON of a schema, or calls of tools.

Where the template lets the model think first, the grammar does too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipo.engine.constraint import WHITESPACE
from pipo.server.chat_prompt import CallForm
from pipo.server.protocol import FunctionDefinition
from pipo.server.tool_call import is_text

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
REASONING = "reasoning: thought /\\n{0,2}/\nthought[lazy]: /(.|\\n)*<\\/think>/"


def json_reply(schema: Mapping[str, Any], *, thinking: bool) -> dict[str, Any]:
    """Sampling parameters for a reply that is JSON of `schema`."""
    if not thinking:
        return {"json_schema": dict(schema)}
    return {"grammar": f"start: reasoning answer\n{REASONING}\nanswer: {_json(schema)}\n"}


def calls_reply(
    functions: Sequence[FunctionDefinition], form: CallForm, *, several: bool, thinking: bool
) -> dict[str, Any]:
    """Sampling parameters for a reply that is one call of one of these functions, or `several`."""
    rules = [_call_rules(number, function, form) for number, function in enumerate(functions)]
    choice = " | ".join(f"call_{number}" for number in range(len(functions)))
    start = "reasoning calls" if thinking else "calls"
    lines = [f"start: {start}", f"calls: call{' (more)*' if several else ''}", f"call: {choice}"]
    lines += [r'more: "\n" call'] if several else []
    lines += [REASONING] if thinking else []
    return {"grammar": "\n".join([*lines, *(line for block in rules for line in block)]) + "\n"}


def _call_rules(number: int, function: FunctionDefinition, form: CallForm) -> list[str]:
    schema = function.parameters or NO_PARAMETERS
    name = json.dumps(function.name)
    if form == "json":
        head = _quoted(f'<tool_call>\n{{"name": {name}, "arguments": ')
        end = _quoted("}\n</tool_call>")
        return [f"call_{number}: {head} arguments_{number} {end}", f"arguments_{number}: {_json(schema)}"]
    properties = schema.get("properties") or {}
    required = set(schema.get("required") or ())
    parts, rules = [], []
    for place, (parameter, kind) in enumerate(properties.items()):
        rule = f"parameter_{number}_{place}"
        parts.append(rule if parameter in required else f"{rule}?")
        rules += _parameter_rules(rule, parameter, kind, schema)
    head, end = _quoted(f"<tool_call>\n<function={function.name}>\n"), _quoted("</function>\n</tool_call>")
    return [f"call_{number}: {' '.join([head, *parts, end])}", *rules]


def _parameter_rules(rule: str, name: str, kind: Any, schema: Mapping[str, Any]) -> list[str]:
    head = _quoted(f"<parameter={name}>\n")
    if is_text(kind) and not (isinstance(kind, Mapping) and "enum" in kind):
        return [f"{rule}: {head} {rule}_text {_quoted(chr(10))}", rf"{rule}_text[lazy]: /(.|\n)*\n<\/parameter>/"]
    end = _quoted("\n</parameter>\n")
    if is_text(kind):
        values = " | ".join(_quoted(str(value)) for value in kind["enum"])
        return [f"{rule}: {head} ({values}) {end}"]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return [f"{rule}: {head} {rule}_value {end}", f"{rule}_value: {_json({**kind, **shared})}"]


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
