"""Taking a reply apart must not depend on where the pieces end, and must lose nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo.server.reply import ReplyParser

TOOLS: dict[str, Any] = {
    "f": {
        "properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "o": {"type": "object"}, "x": {"anyOf": [{}]}}
    }
}
XML = "<tool_call>\n<function=f>\n<parameter=s>\n{}\n</parameter>\n<parameter=n>\n7\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{{"name": "f", "arguments": {{"s": "{}", "n": 7}}}}\n</tool_call>'
PIECES = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "\n",
            " ",
            "a",
            "<",
            "</",
            XML.format("a"),
            JSON.format("b"),
            '{"name": "f", "arguments": {"a": "}',
            '"}}',
            "<function=f>",
            "</function>",
            "<parameter=s>",
            "</parameter>",
            "é",
        ]
    ),
    max_size=12,
).map("".join)


def parse(pieces: list[str], **settings: Any) -> tuple[str, str, list[tuple[str, str]], int]:
    parser = ReplyParser(**settings)
    reasoning = content = ""
    calls: list[tuple[str, str]] = []
    for delta in [*map(parser.feed, pieces), parser.finish()]:
        reasoning, content = reasoning + delta.reasoning, content + delta.content
        for call in delta.calls:
            if call.id is not None:
                assert call.index == len(calls)
                calls.append((str(call.name), ""))
            name, arguments = calls[call.index]
            calls[call.index] = (name, arguments + call.arguments)
    return reasoning, content, calls, parser.num_calls


@given(PIECES, st.booleans(), st.booleans(), st.booleans(), st.data())
def test_where_pieces_end_does_not_matter(
    text: str, thinks: bool, thinking: bool, tools: bool, data: st.DataObject
) -> None:
    settings: dict[str, Any] = {"thinks": thinks, "thinking": thinking, "tools": TOOLS if tools else None}
    whole = parse([text], **settings)
    assert parse(list(text), **settings) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert parse([text[:cut], text[cut:]], **settings) == whole


@given(PIECES)
def test_plain_text_passes_untouched(text: str) -> None:
    assert parse(list(text)) == ("", text, [], 0)


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        ("a</think>b", {"thinking": True}, ("a", "b")),
        ("\n a \n</think>\n\n b \n", {"thinking": True}, ("a", "b \n")),
        ("<think>\na\n</think>\n\nb", {"thinks": True}, ("a", "b")),
        ("<think>\na\n</think>\n\nb", {}, ("", "<think>\na\n</think>\n\nb")),
        (" <thinker", {"thinks": True}, ("", " <thinker")),
        ("a <think>", {"thinks": True}, ("", "a <think>")),
        ("never ends \n", {"thinking": True}, ("never ends \n", "")),
        ("</think>", {"thinking": True}, ("", "")),
        ("a</thin", {"thinking": True}, ("a</thin", "")),
    ],
)
def test_reasoning(text: str, settings: dict[str, Any], expected: tuple[str, str]) -> None:
    assert parse([text], **settings)[:2] == expected


@pytest.mark.parametrize("value", ["Bern", "two\nlines", "<b>", "5", '{"a": 1}', ""])
def test_the_forms_of_a_call_mean_the_same(value: str) -> None:
    _, content, calls, _ = parse([XML.format(value)], tools=TOOLS)
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"s": value, "n": 7})]
    written = json.dumps({"name": "f", "arguments": {"s": value, "n": 7}})
    _, content, calls, _ = parse([f"<tool_call>\n{written}\n</tool_call>"], tools=TOOLS)
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [("f", {"s": value, "n": 7})]


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        ('hi\n<tool_call>{"arguments": {"n": 1}, "name": "f"}</tool_call>\nbye', [("f", {"n": 1})], "hibye"),
        (
            '<tool_call>{"name": "f", "arguments": {"s": "</tool_call>"}}</tool_call>',
            [("f", {"s": "</tool_call>"})],
            "",
        ),
        ('<tool_call>{"name": "g", "arguments": {}}</tool_call>', [("g", {})], ""),
        ("<tool_call>\n<function=f>\n</function>\n</tool_call>", [("f", {})], ""),
        (
            "<tool_call>\n<function=f>\n<parameter=n>\nseven\n</parameter>\n</function>\n</tool_call>",
            [("f", {"n": "seven"})],
            "",
        ),
        (
            '<tool_call>\n<function=f>\n<parameter=o>\n{"a": [1]}\n</parameter>\n</function>\n</tool_call>',
            [("f", {"o": {"a": [1]}})],
            "",
        ),
        (
            "<tool_call>\n<function=f>\n<parameter=x>\n[1]\n</parameter>\n</function>\n</tool_call>",
            [("f", {"x": [1]})],
            "",
        ),
        ("<tool_call>nonsense</tool_call> then", [], "<tool_call>nonsense</tool_call> then"),
        ("<tool_call>[1]</tool_call>", [], "<tool_call>[1]</tool_call>"),
        ("a <tool_call>{", [], "a<tool_call>{"),
    ],
)
def test_calls(text: str, calls: list[Any], content: str) -> None:
    _, got, found, num_calls = parse([text], tools=TOOLS)
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert got == content
    assert num_calls == len(calls)


def test_a_call_that_is_cut_off_shows_what_came() -> None:
    _, content, calls, _ = parse(['<tool_call>{"name": "f", "arguments": {"s": "Ber'], tools=TOOLS)
    assert calls == [("f", '{"s": "Ber')]
    assert content == ""
