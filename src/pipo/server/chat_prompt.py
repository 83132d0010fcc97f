"""From chat messages to a prompt, as the checkpoint's own template writes it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from pipo.data.conversation import encode_text, render_chat
from pipo.server.api_error import ApiError
from pipo.server.protocol import AssistantMessage, Content, Message, Tool, ToolMessage
from pipo.server.reply import CALL, THINK

CallForm = Literal["json", "xml"]


@dataclass(frozen=True)
class ChatFormat:
    """What a checkpoint's template knows: how it writes tool calls, if it does, and whether it has reasoning."""

    calls: CallForm | None
    thinks: bool

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Read off the template."""
        template = getattr(tokenizer, "chat_template", None) or ""
        text = "\n".join(template.values()) if isinstance(template, Mapping) else str(template)
        calls: CallForm | None = None
        if CALL in text:
            calls = "xml" if "<function=" in text else "json"
        return cls(calls, THINK in text)


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered chat. `thinking`: the reply begins inside the reasoning."""

    ids: list[int]
    thinking: bool


def build_prompt(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] | None, options: Mapping[str, Any]
) -> ChatPrompt:
    """Render and encode a chat.

    Raises:
        ApiError, RequestError: options that would change more than the template's wording, or what the template refuses.
    """
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"} if tokenizer else set()
    for name in options:
        if name in reserved:
            raise ApiError(
                400, f"chat_template_kwargs can't set {name!r}", param="chat_template_kwargs", code="invalid_value"
            )
    given = dict(options)
    if tools:
        given["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    listed = [as_template_message(message, number) for number, message in enumerate(messages)]
    try:
        text = render_chat(tokenizer, listed, **given)
    except (TemplateError, TypeError) as error:
        raise ApiError(
            400, f"the chat template refuses this chat: {error}", param="messages", code="invalid_value"
        ) from error
    ids = encode_text(tokenizer, text, add_special_tokens=False)
    return ChatPrompt(ids, text.rstrip().endswith(THINK))


def as_template_message(message: Message, number: int) -> dict[str, Any]:
    """A message as templates read it: plain text, reasoning under one name, arguments as a mapping."""
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": _text(message.content)}
    if message.name is not None:
        result["name"] = message.name
    if isinstance(message, ToolMessage):
        result["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage):
        reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
        if reasoning is not None:
            result["reasoning_content"] = reasoning
        if message.tool_calls:
            result["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, f"messages.{number}.tool_calls.{place}"),
                    },
                }
                for place, call in enumerate(message.tool_calls)
            ]
        elif message.content is None:
            where = f"messages.{number}.content"
            raise ApiError(
                400, f"{where}: an assistant message needs content or tool_calls", param=where, code="invalid_value"
            )
    return result


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ApiError(
            400, f"{where}: arguments must be a JSON object, got {text[:80]!r}", param=where, code="invalid_value"
        )
    return value
