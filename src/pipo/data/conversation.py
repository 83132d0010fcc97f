"""Conversations to token ids: the one home of the chat template, for training and serving alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pipo.errors import CheckpointError, RequestError
from pipo.model.files import has_tokenizer

Message = Mapping[str, Any]


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a checkpoint folder; `None` where it has none.

    Raises:
        CheckpointError: there are tokenizer files, but they can't be read.
    """
    if not has_tokenizer(folder):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: its tokenizer can't be read: {error}") from error


def render_chat(tokenizer: Any, messages: Sequence[Message], **template_options: Any) -> str:
    """The prompt text of a conversation, up to where the assistant's turn begins.

    Raises:
        RequestError: no messages, a message without role or content, or a tokenizer without a chat template.
    """
    if not messages:
        raise RequestError("a chat needs at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise RequestError(f"message {number} of the chat has no role: {message!r}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"message {number} of the chat has no content: {message!r}")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise RequestError("this model has no chat template; pass a text or token ids instead of messages")
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **template_options
    )
    return text


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. A rendered chat already holds its special tokens: pass `add_special_tokens=False` for it."""
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=add_special_tokens)]
