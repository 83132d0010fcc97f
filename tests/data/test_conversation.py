"""A conversation as serving would see it: what is given, what is learned, and what is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from byte_tokenizer import byte_tokenizer
from chat_templates import CHATML, ENDLESS, FORGETFUL, THINKING
from pipo.data.conversation import conversation_turns, encode_rendered, encode_text, render_chat
from pipo.errors import DataError

PREFIX = "<think>\n"
IM_END = 258
word = st.text("abé <|>\n4中", min_size=1, max_size=12).filter(str.strip)


def tokenizer(template):
    found = byte_tokenizer()
    found.chat_template = template
    return found


def user(text="2 + 2?"):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turns_of(template, messages, prefix=PREFIX, **options):
    return conversation_turns(tokenizer(template), messages, prefix, options)


def as_text(example):
    return [(byte_tokenizer().decode(ids), supervised) for ids, supervised in example]


def test_the_template_opens_the_thinking_block():
    """Breaks when the opening is learned, or the newline after the end of the turn is."""
    (example,) = turns_of(THINKING, [user("Hi"), assistant("<think>\nEasy.\n</think>\n\n4")])
    assert as_text(example) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n", False),
        ("Easy.\n</think>\n\n4<|im_end|>", True),
    ]


def test_the_answer_opens_the_thinking_block():
    (example,) = turns_of(CHATML, [user("Hi"), assistant("<think>\nEasy.\n</think>\n\n4")])
    assert as_text(example) == [
        ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n", False),
        ("Easy.\n</think>\n\n4<|im_end|>", True),
    ]
    (plain,) = turns_of(CHATML, [user("Hi"), assistant("4")])
    assert [supervised for _, supervised in plain] == [False, True]
    (all_of_it,) = turns_of(CHATML, [user("Hi"), assistant("<think>\nEasy.")], prefix="")
    assert as_text(all_of_it)[-1] == ("<think>\nEasy.<|im_end|>", True)


def test_history_that_is_kept_is_one_example():
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("not answered")]
    (example,) = turns_of(CHATML, messages)
    assert as_text(example) == [
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("b<|im_end|>", True),
        ("\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n", False),
        ("d<|im_end|>", True),
    ]


def test_history_that_is_rewritten_is_an_example_a_turn():
    """Breaks when a later turn is trained after thinking that serving would no longer show."""
    think = "<think>\n{}\n</think>\n\n{}"
    messages = [user("a"), assistant(think.format("b", "B")), user("c"), assistant(think.format("d", "D"))]
    first, second = turns_of(FORGETFUL, messages)
    assert as_text(first)[1] == ("b\n</think>\n\nB<|im_end|>", True)
    assert as_text(second) == [
        (
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n",
            False,
        ),
        ("d\n</think>\n\nD<|im_end|>", True),
    ]
    # Between tool calls of one question the thinking stays, so those turns share an example.
    tool = {"role": "tool", "content": "7"}
    chain = [user("a"), assistant(think.format("b", "B")), tool, assistant(think.format("d", "D"))]
    (joined,) = turns_of(FORGETFUL, [{"role": "system", "content": "Be brief."}, *chain])
    assert [supervised for _, supervised in joined] == [False, True, False, True]


def test_options_of_the_template_reach_it():
    (example,) = turns_of(FORGETFUL, [user("a"), assistant("B")], enable_thinking=False)
    assert as_text(example)[0][0].endswith("<think>\n\n</think>\n\n")
    assert as_text(example)[1] == ("B<|im_end|>", True)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([CHATML, THINKING, FORGETFUL]), st.lists(word, min_size=2, max_size=6), st.booleans())
def test_what_precedes_each_answer_is_what_serving_reads(template, texts, system):
    """Breaks when pieces are tokenised apart where serving tokenises them together."""
    text_tokenizer = tokenizer(template)
    think = "<think>\n{}\n</think>\n\n{}"
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for number, text in enumerate(texts[: len(texts) // 2 * 2]):
        messages.append(user(text.strip()) if number % 2 == 0 else assistant(think.format("so", text.strip())))
    examples = conversation_turns(text_tokenizer, messages, PREFIX, {})
    wanted = [
        encode_text(text_tokenizer, render_chat(text_tokenizer, messages[:number]), add_special_tokens=False)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    found, opening = [], encode_rendered(text_tokenizer, [PREFIX])[0]
    for example in examples:
        read: list[int] = []
        for ids, supervised in example:
            if supervised:
                found.append(read[: -len(opening)] if template == CHATML else list(read))
                assert ids[-1] == IM_END
                assert IM_END not in ids[:-1]
            read += ids
    assert found == wanted


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, [user()], "no message of the assistant"),
        (CHATML, [assistant("4")], "begins with the assistant"),
        (CHATML, [user(), assistant(" \n")], "message 1, the assistant's, is empty"),
        (CHATML, [user(), {"role": "bot", "content": "4"}, assistant("4")], "message 1 has the role 'bot'"),
        (CHATML, [user(), {"role": "assistant", "content": "4", "reasoning_content": "2, and 2"}], "reasoning_content"),
        (THINKING, [user(), assistant("4")], r"opens the assistant's turn with '<think>\\n'.* as '4"),
        (THINKING, [{"role": "developer", "content": "Be brief."}, user(), assistant("<think>\n4")], "message 0.*leaves"),
        (THINKING, [user(), {"role": "system", "content": "x"}, assistant("<think>\n4")], "must be at the beginning"),
        (FORGETFUL, [user(), assistant("<think>\nnever closed")], "once more than the answer does"),
        (FORGETFUL, [user(), assistant("<think>\na <think> b\n</think>\n\n4")], "a part of it would be lost"),
        (ENDLESS, [user(), assistant("4")], "no special token"),
        (None, [user(), assistant("4")], "no chat template"),
    ],
)  # fmt: skip
def test_what_can_not_be_learned_is_refused_with_the_reason(template, messages, reason):
    with pytest.raises(DataError, match=reason):
        turns_of(template, messages)


def test_what_a_template_writes_after_the_end_of_a_turn_is_not_learned():
    """Breaks when the turn is taken to end with the last special token: some templates close the whole text with another."""
    closing = CHATML.replace("{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add")
    (example,) = turns_of(closing, [user("a"), assistant("b"), user("c"), assistant("d")])
    assert [as_text(example)[at][0] for at in (1, 3)] == ["b<|im_end|>", "d<|im_end|>"]


def test_an_answer_is_tokenised_where_it_stands():
    """Breaks when an answer is tokenised as if it began a text: SentencePiece then puts a space before it."""
    pieces = [(piece, -1.0) for piece in ["<unk>", "▁", *sorted(set("abcdefghijklmnopqrstuvwxyz<>/\n"))]]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<s>", "</s>"])
    template = (
        "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    text_tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)
    assert text_tokenizer.tokenize("yes") == ["▁", "y", "e", "s"]
    (example,) = conversation_turns(text_tokenizer, [user("a"), assistant("<think>\nyes")], PREFIX, {})
    assert [text_tokenizer.convert_ids_to_tokens(ids) for ids, _ in example[1:]] == [
        list(PREFIX),
        ["y", "e", "s", "</s>"],
    ]


def merging_tokenizer():
    """Bytes, and two newlines as one token, as real vocabularies have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*alphabet, "ĊĊ"])}, merges=[("Ċ", "Ċ")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", chat_template=CHATML)


def test_history_that_tokenises_otherwise_is_an_example_a_turn():
    """Breaks when texts are compared instead of ids: here the prompt's last newline and the answer's first merge into one
    token as soon as the answer is history."""
    text_tokenizer = merging_tokenizer()
    messages = [user("a"), assistant("\nb"), user("c"), assistant("d")]
    first, second = conversation_turns(text_tokenizer, messages, "", {})
    assert text_tokenizer.convert_ids_to_tokens(first[0][0])[-1] == "Ċ"
    assert text_tokenizer.convert_ids_to_tokens(first[1][0])[0] == "Ċ"
    assert "ĊĊ" in text_tokenizer.convert_ids_to_tokens(second[0][0])
    (joined,) = conversation_turns(text_tokenizer, [user("a"), assistant("b"), *messages[2:]], "", {})
    assert len(joined) == 4
