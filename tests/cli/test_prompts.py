"""Prompts come from options, standard input and files of JSON lines, in order."""

import io

import pytest

from pipo.cli.prompts import collect_prompts
from pipo.errors import RequestError


def test_options_first_then_the_file(tmp_path):
    file = tmp_path / "prompts"
    file.write_text(
        '"one"\n\n{"prompt": "two"}\n{"prompt_token_ids": [1, 2]}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    assert collect_prompts(["zero"], str(file), chat=False, system=None) == [
        "zero",
        "one",
        "two",
        {"prompt_token_ids": [1, 2]},
        [{"role": "user", "content": "x"}],
    ]


def test_chat_wraps_texts_only(tmp_path):
    file = tmp_path / "prompts"
    file.write_text('{"prompt_token_ids": [1]}')
    assert collect_prompts(["hi"], str(file), chat=True, system="Be kind.") == [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
        {"prompt_token_ids": [1]},
    ]


def test_a_prompt_from_standard_input_is_taken_whole(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert collect_prompts(["-"], None, chat=False, system=None) == ["two\nlines\n"]


def test_a_file_from_standard_input_has_a_prompt_a_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('"a"\n"b"\n'))
    assert collect_prompts([], "-", chat=False, system=None) == ["a", "b"]


@pytest.mark.parametrize(
    ("texts", "file", "chat", "system", "says"),
    [
        ([], None, False, None, "no prompt"),
        (["-", "-"], None, False, None, "once only"),
        (["-"], "-", False, None, "once only"),
        (["hi"], None, False, "Be kind.", "--system needs --chat"),
    ],
)
def test_refused(texts, file, chat, system, says):
    with pytest.raises(RequestError, match=says):
        collect_prompts(texts, file, chat, system)


@pytest.mark.parametrize("line", ["plain text", "3", '{"text": "x"}', '{"prompt": 3}'])
def test_a_line_that_is_no_prompt_is_named(tmp_path, line):
    file = tmp_path / "prompts"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(RequestError, match="line 2"):
        collect_prompts([], str(file), chat=False, system=None)
