"""`pipo chat`: commands, history, and drafts in colour."""

import pytest
from rich.console import Console
from rich.text import Text

from pipo.cli.chat import COMMITTED, REJECTED, DraftPainter
from pipo.engine.request import PairRecord, RequestOutput, StreamEvent


def event(text, ids, committed=True, draft=None, finish_reason=None):
    """A step after which the visible tokens are `ids`, and which lets `text` out."""
    pair = PairRecord(ids[-1], draft, 0.5, committed, None, None)
    output = RequestOutput([], ids, "", finish_reason, 1, 0, 0)
    return StreamEvent(text, tuple(ids[-2:]), pair, finish_reason, output)


def spans(painted: Text, style: str) -> list[str]:
    return [
        painted.plain[span.start : span.end] for span in painted.spans if span.style == style and span.end > span.start
    ]


@pytest.fixture(scope="module")
def tokenizer(base_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_folder)


def test_second_tokens_are_coloured(tokenizer):
    ids = tokenizer.encode("abcd")
    painter = DraftPainter(tokenizer)
    first = painter.paint(event("ab", ids[:2]))
    second = painter.paint(event("c", ids[:3], committed=False, draft=ids[0]))
    third = painter.paint(event("d", ids[:4], committed=False))
    assert spans(first, COMMITTED) == ["b"]
    assert (second.plain, spans(second, REJECTED), spans(second, COMMITTED)) == ("ca", ["a"], [])
    assert spans(third, COMMITTED) == []


def test_held_back_text_keeps_its_colour(tokenizer):
    ids = tokenizer.encode("abcd")
    painter = DraftPainter(tokenizer)
    first = painter.paint(event("a", ids[:2]))
    second = painter.paint(event("bcd", ids[:4]))
    assert spans(first, COMMITTED) == []
    assert spans(second, COMMITTED) == ["b", "d"]


def test_a_letter_of_two_tokens_is_coloured_whole(tokenizer):
    ids = tokenizer.encode("aé")
    assert len(ids) == 3
    painter = DraftPainter(tokenizer)
    first = painter.paint(event("a", ids[:2]))
    second = painter.paint(event("é", ids[:3], committed=False))
    assert (first.plain, second.plain) == ("a", "é")


def chat(run, folder, lines, *options):
    return run(
        "chat", folder, "--max-tokens", "8", "--seed", "1", "--ignore-eos", *options, input="\n".join(lines) + "\n"
    )


def test_answers_are_streamed_and_remembered(run, pipo_folder, monkeypatch):
    from pipo.engine.llm import LLM

    asked, cached = [], []
    stream = LLM.stream

    def spy(self, prompt, params):
        asked.append(prompt)
        for event in stream(self, prompt, params):
            yield event
        cached.append(event.output.num_cached_tokens)

    monkeypatch.setattr(LLM, "stream", spy)
    result = chat(run, pipo_folder, ["hi", "again", "/reset", "new"], "--system", "Be kind.")
    assert result.exit_code == 0, result.output
    assert [[message["role"] for message in messages] for messages in asked] == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", "user"],
    ]
    assert asked[1][2]["content"] in result.stdout
    assert cached[0] == 0, "nothing came before the first turn"
    assert cached[1] > 0, "the second turn goes on from the first"
    assert result.stderr.count("8 tokens in") == 3


def test_the_threshold_moves_live(run, pipo_folder):
    lines = ["/threshold 0", "hi", "/threshold 2", "hi", "/threshold high", "/nonsense", "/quit", "never read"]
    result = chat(run, pipo_folder, lines)
    assert result.exit_code == 0
    assert "8 tokens in 4 steps" in result.stderr
    assert "8 tokens in 8 steps" in result.stderr
    assert "takes a number" in result.stderr
    assert "/nonsense is no command" in result.stderr
    assert result.stderr.count("tokens in") == 2


def test_coloured_answers_say_the_same(run, pipo_folder):
    plain = chat(run, pipo_folder, ["hi"], "--threshold", "0")
    coloured = chat(run, pipo_folder, ["/drafts", "hi"], "--threshold", "0")
    assert coloured.exit_code == 0, coloured.output
    assert plain.stdout == coloured.stdout


def test_an_interrupted_answer_is_kept_and_the_chat_goes_on(pipo_folder, monkeypatch):
    from pipo.cli.chat import Conversation
    from pipo.engine.llm import LLM
    from pipo.engine.request import SamplingParams

    conversation = Conversation(LLM(pipo_folder), SamplingParams(max_tokens=60, ignore_eos=True, seed=1), None, False)
    screen = Console(file=None, quiet=True)
    shown = 0

    def interrupt_third(*args, **settings):
        nonlocal shown
        shown += 1
        if shown == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(screen, "print", interrupt_third)
    output = conversation.answer("hi", screen)
    assert output.finish_reason is None
    assert output.num_pairs == 3
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    monkeypatch.undo()
    assert conversation.answer("again", screen).num_tokens == 60
