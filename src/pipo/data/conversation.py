"""Conversations to token ids: the one home of the chat template, for training and serving alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from pipo.errors import CheckpointError, DataError, RequestError
from pipo.model.files import has_tokenizer

Message = Mapping[str, Any]
Turn = tuple[list[int], bool]
"""Token ids, and whether they are supervised."""

ROLES = ("system", "developer", "user", "assistant", "tool")


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
    return _render(tokenizer, messages, True, template_options)


def _render(tokenizer: Any, messages: Sequence[Message], opens_turn: bool, options: Mapping[str, Any]) -> str:
    """The text of a conversation. `opens_turn`: with the beginning of the assistant's turn after it."""
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
        list(messages), tokenize=False, add_generation_prompt=opens_turn, **options
    )
    return text


def encode_text(tokenizer: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. A rendered chat already holds its special tokens: pass `add_special_tokens=False` for it."""
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=add_special_tokens)]


def encode_rendered(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each rendered text, as `encode_text` gives them, on all cores where the tokenizer can."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


# --- supervised turns ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnTexts:
    """An assistant's turn: the model is given `prompt` and `opening`, and is to write `answer`.

    `opening` is the thinking block's, where the template leaves it to the model. `answer` ends with what the template
    puts after a turn.
    """

    prompt: str
    opening: str
    answer: str


def conversation_turns(
    tokenizer: Any, messages: Sequence[Message], thinking_prefix: str, template_options: Mapping[str, Any]
) -> list[tuple[Turn, ...]]:
    """A conversation as training examples, each a sequence of turns for :func:`pipo.pairing.slots_from_turns`.

    Each turn of the assistant is supervised once, from the first token after the opening of the thinking block to the
    token that ends the turn, after exactly the ids that serving would read before it. A turn whose prompt begins with
    the ids of the turn before joins that one's example; where the template rewrites history (Qwen3 drops earlier
    thinking), an example of its own begins. What follows the last turn of the assistant is left out.

    Args:
        tokenizer: with a chat template.
        thinking_prefix: the opening of the thinking block (`<think>\\n`), which carries no label; may be empty.
        template_options: of the chat template, such as `enable_thinking`.

    Raises:
        DataError: the conversation can't be learned from, with the reason.
    """
    texts = turn_texts(tokenizer, messages, thinking_prefix, template_options)
    return join_turns(tokenizer, texts, encode_rendered(tokenizer, flat_texts(texts)))


def turn_texts(
    tokenizer: Any, messages: Sequence[Message], thinking_prefix: str, template_options: Mapping[str, Any]
) -> list[TurnTexts]:
    """The texts of each of the assistant's turns.

    Raises:
        DataError: the conversation can't be learned from, with the reason.
    """
    answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers:
        raise DataError("no message of the assistant: there is nothing to learn")
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise DataError(
                f"message {number} has the role {message.get('role')!r}, which is none of {', '.join(ROLES)}"
            )
    found = []
    for number in answers:
        _check_answer(messages, number)
        try:
            before = _render(tokenizer, messages[:number], False, template_options)
            prompt = _render(tokenizer, messages[:number], True, template_options)
            whole = _render(tokenizer, messages[: number + 1], False, template_options)
        except (TemplateError, TypeError, RequestError) as error:
            raise DataError(f"the chat template refuses this conversation: {error}") from error
        found.append(_split_turn(messages[number], number, before, prompt, whole, thinking_prefix))
    _check_kept(messages[: answers[-1]], found[-1].prompt)
    return found


def flat_texts(turns: Iterable[TurnTexts]) -> list[str]:
    """What `join_turns` needs the ids of, in its order."""
    return [
        text
        for turn in turns
        for text in (turn.prompt, turn.opening and turn.prompt + turn.opening, turn.prompt + turn.opening + turn.answer)
    ]


def join_turns(tokenizer: Any, turns: Sequence[TurnTexts], ids: Sequence[list[int]]) -> list[tuple[Turn, ...]]:
    """Examples from the ids of `flat_texts(turns)`. See :func:`conversation_turns`.

    Raises:
        DataError: nothing ends an answer.
    """
    examples: list[list[Turn]] = []
    read: list[int] = []
    for turn, at in zip(turns, range(0, len(ids), 3), strict=True):
        prompt, opened, whole = ids[at : at + 3]
        opening = _continuation(tokenizer, prompt, opened, turn.opening) if turn.opening else []
        answer = _up_to_end(tokenizer, _continuation(tokenizer, [*prompt, *opening], whole, turn.answer))
        if examples and prompt[: len(read)] == read:
            examples[-1].append((prompt[len(read) :], False))
        else:
            examples.append([(prompt, False)])
        if opening:
            examples[-1].append((opening, False))
        examples[-1].append((answer, True))
        read = [*prompt, *opening, *answer]
    return [tuple(example) for example in examples]


def _continuation(tokenizer: Any, read: list[int], whole: list[int], text: str) -> list[int]:
    """The ids of `text` after those `read`; `whole` are those of all text up to its end.

    SentencePiece puts a space before a text that it is given alone, so `whole` is cut where it can be: where nothing merges across.
    """
    return whole[len(read) :] if whole[: len(read)] == read else encode_rendered(tokenizer, [text])[0]


def _check_answer(messages: Sequence[Message], number: int) -> None:
    if number == 0:
        raise DataError("the conversation begins with the assistant: there is nothing to answer")
    message = messages[number]
    said = [message.get(key) for key in ("content", "reasoning_content", "tool_calls")]
    if not any(part.strip() if isinstance(part, str) else part for part in said):
        raise DataError(f"message {number}, the assistant's, is empty")


def _split_turn(message: Message, number: int, before: str, prompt: str, whole: str, prefix: str) -> TurnTexts:
    """Cut `whole`, the text up to the end of message `number`, after `prompt`; `before` is the prompt without its end."""
    if not whole.startswith(prompt):
        same = _num_shared(prompt, whole)
        raise DataError(
            f"message {number}: the chat template opens the assistant's turn with {prompt[same:][:40]!r}, but writes this answer as "
            f"{whole[same:][:40]!r}. Change the answer, or data.template_options (such as enable_thinking)"
        )
    turn = whole[_num_shared(before, prompt) :]
    for key in ("reasoning_content", "content"):
        text = message.get(key)
        if isinstance(text, str) and _squash(text) not in _squash(turn):
            raise DataError(
                f"message {number}: the chat template does not write the answer's {key} as it is, so a part of it would be lost"
            )
    content, mark = str(message.get("content")).lstrip(), prefix.strip()
    if mark and content.startswith(mark) and turn.count(mark) > content.count(mark):
        raise DataError(
            f"message {number}: the chat template writes {mark} once more than the answer does; is the answer's block closed?"
        )
    answer = whole[len(prompt) :]
    opening = prefix if answer.startswith(prefix) and not prompt.endswith(prefix) else ""
    return TurnTexts(prompt, opening, answer[len(opening) :])


def _check_kept(messages: Sequence[Message], prompt: str) -> None:
    squashed = _squash(prompt)
    for number, message in enumerate(messages):
        if message["role"] in ("system", "developer", "user") and _squash(message.get("content")) not in squashed:
            raise DataError(
                f"message {number}: the chat template leaves this {message['role']} message out, or changes its text"
            )


def _num_shared(a: str, b: str) -> int:
    """Characters at the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _squash(text: Any) -> str:
    """Templates trim and re-space what they write: texts are compared without white space."""
    return "".join(str(text or "").split())


def _up_to_end(tokenizer: Any, answer: list[int]) -> list[int]:
    """The answer's ids up to the token that ends the turn: the first special one of those, and of white space, at its end."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    end = None
    for at in range(len(answer) - 1, -1, -1):
        if answer[at] in special:
            end = at
        elif tokenizer.decode([answer[at]]).strip():
            break
    if end is None:
        raise DataError("the chat template ends the assistant's turn with no special token: nobody could learn to stop")
    return answer[: end + 1]
