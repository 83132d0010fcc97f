"""Prompts from the command line, from standard input and from files of JSON lines."""

from __future__ import annotations

import json
import sys
from typing import Any

from pipo.errors import RequestError

Message = dict[str, str]
Prompt = str | dict[str, list[int]] | list[Message]
"""A text, `{"prompt_token_ids": […]}` or chat messages: what `LLM.generate` takes."""

SHAPES = 'a JSON string, {"prompt": "…"}, {"prompt_token_ids": […]} or {"messages": […]}'


def collect_prompts(texts: list[str], file: str | None, chat: bool, system: str | None) -> list[Prompt]:
    """All prompts of a command line, in order: `--prompt` first, then the file's.

    Raises:
        RequestError: none was given, standard input was asked for twice, or a line of the file has no such shape.
    """
    if [*texts, file].count("-") > 1:
        raise RequestError("standard input can be read once only, but - was given more than once")
    if system is not None and not chat:
        raise RequestError("--system needs --chat: without it, a prompt is text as it stands")
    prompts: list[Prompt] = [sys.stdin.read() if text == "-" else text for text in texts]
    if file is not None:
        prompts += _read_file(file)
    if not prompts:
        raise RequestError("no prompt: give --prompt TEXT (or - for standard input) or --prompts-file FILE")
    return [as_chat(prompt, system) for prompt in prompts] if chat else prompts


def as_chat(prompt: Prompt, system: str | None) -> Prompt:
    """A text as the first message of a user; what is no text stays as it is."""
    if not isinstance(prompt, str):
        return prompt
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": prompt}]


def _read_file(name: str) -> list[Prompt]:
    if name == "-":
        lines = sys.stdin.read().splitlines()
    else:
        with open(name, encoding="utf-8") as stream:
            lines = stream.read().splitlines()
    return [_parse_line(line, f"{name}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _parse_line(line: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: not JSON ({error}); each line is {SHAPES}") from None
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        if isinstance(text := value.get("prompt"), str):
            return text
        if isinstance(ids := value.get("prompt_token_ids"), list):
            return {"prompt_token_ids": ids}
        if isinstance(messages := value.get("messages"), list):
            return messages
    raise RequestError(f"{where}: {line[:80]!r} is no prompt; each line is {SHAPES}")
