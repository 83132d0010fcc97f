"""From rows to slots: round trips, augmentation, cuts, and what the report says of every row."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import byte_tokenizer
from chat_templates import CHATML, FORGETFUL
from pipo.data.conversation import encode_text, render_chat
from pipo.data.examples import build_sft_dataset
from pipo.data.prompts import build_prompt_dataset
from pipo.errors import ConfigError, DataError
from pipo.pairing import IGNORE_INDEX, slots_from_turns, teacher_tokens

PREFIX, PAD = "<think>\n", 256
texts = st.text("abé \n4", min_size=1, max_size=9).filter(str.strip).map(str.strip)
conversations = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def chat(*exchanges):
    """Rows of `(question, answer)` exchanges."""
    return [
        message
        for question, answer in exchanges
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"<think>\nso\n</think>\n\n{answer}"},
        )
    ]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps({"messages": row})) + "\n" for row in rows))
    return path


def build(source, template=CHATML, **changes):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    options = {
        "max_slots": 512,
        "thinking_prefix": PREFIX,
        "template_options": {},
        "layout": "split_pairs",
        "max_pad_ratio": 0.25,
        "seed": 0,
        "cache_dir": source.parent / "cache",
    }
    return build_sft_dataset(source, tokenizer, PAD, **{**options, **changes})


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(conversations, min_size=1, max_size=3),
    st.sampled_from(["split_pairs", "reject_drafts"]),
    st.sampled_from([CHATML, FORGETFUL]),
)
def test_slots_say_what_the_conversation_says(shared, rows, layout, template):
    """Breaks when a token is lost, given twice or learned that should not be, anywhere from the row to the slots."""
    source = write(shared / "rows.jsonl", *(chat(*row) for row in rows))
    dataset = build(source, template, layout=layout, max_pad_ratio=1.0)
    tokenizer = byte_tokenizer()
    learned = []
    for index in range(len(dataset)):
        turns, slots = dataset.example(index).turns, dataset[index]
        assert teacher_tokens(slots) == [token for ids, _ in turns for token in ids]
        plain = slots_from_turns(turns, PAD)
        assert dataset.lengths[index] == len(plain.ids)
        if layout == "split_pairs":
            assert [label for label in slots.labels if label != IGNORE_INDEX] == [
                token for ids, supervised in turns if supervised for token in ids
            ]
        at = 0
        for ids, supervised in turns:
            if supervised:
                learned.append(tokenizer.decode(ids))
                at += at % 2  # every supervised turn begins a pair
                assert plain.labels[at : at + len(ids)] == ids
            at += len(ids)
    wanted = [f"so\n</think>\n\n{answer}<|im_end|>" for row in rows for _, answer in row]
    assert learned == wanted
    assert dataset.report.num_rows == dataset.report.num_used == len(rows)
    assert dataset.report.num_supervised_tokens == sum(len(text.replace("<|im_end|>", "$").encode()) for text in wanted)


def test_pads_are_a_function_of_seed_epoch_and_index(tmp_path):
    source = write(tmp_path / "rows.jsonl", *[chat(("a" * 9, "b" * 60))] * 4)
    dataset = build(source, max_pad_ratio=0.5)
    first = [dataset[i] for i in range(4)]
    assert len({tuple(slots.ids) for slots in first}) == 4  # the same row, other PADs
    assert [build(source, max_pad_ratio=0.5)[i] for i in range(4)] == first
    dataset.set_epoch(1)
    assert [dataset[i] for i in range(4)] != first
    dataset.set_epoch(0)
    assert [dataset[i] for i in range(4)] == first
    assert build(source, max_pad_ratio=0.5, seed=1)[0] != first[0]
    plain = build(source, max_pad_ratio=0.0)
    assert sum(plain[0].filler) <= 2  # of the prompt and of the end
    with pytest.raises(IndexError):
        dataset[4]


def test_another_process_gets_a_path_and_not_the_data(tmp_path):
    """Breaks when workers copy the whole cache through a pipe."""
    source = write(tmp_path / "rows.jsonl", chat(("a", "b" * 20_000)))
    dataset = build(source, max_slots=60_000)
    item = dataset[0]
    sent = pickle.dumps(dataset)
    assert len(sent) < 5_000
    assert pickle.loads(sent)[0] == item


@pytest.mark.parametrize("layout", ["split_pairs", "reject_drafts"])
def test_cuts_keep_pairs_whole_and_are_counted(tmp_path, layout):
    """Breaks when an example outgrows its slots after augmentation, or is cut without a word."""
    source = write(tmp_path / "rows.jsonl", chat(("a", "b" * 30)), chat(("a", "b" * 200)), chat(("a" * 300, "b")))
    dataset = build(source, max_slots=100, layout=layout, max_pad_ratio=1.0)
    assert len(dataset) == 2
    report = dataset.report
    assert (report.num_rows, report.num_used, report.num_too_long, report.too_long) == (3, 2, 1, [3])
    assert (report.num_cut, report.num_cut_at_most) == (1, 2)
    assert dataset.lengths[0] < dataset.lengths[1] == 100
    for epoch in range(10):
        dataset.set_epoch(epoch)
        assert len(dataset[1].ids) == 100
        assert len(dataset[0].ids) <= 100
        assert any(label != IGNORE_INDEX for label in dataset[1].labels)
    assert "examples are left out, whose prompts are too long: lines 3" in " ".join(report.lines())


def test_an_example_needs_room_for_a_supervised_pair(tmp_path):
    source = write(tmp_path / "rows.jsonl", chat(("a", "b")))
    before = build(source, max_pad_ratio=0.0)[0].labels.index(ord("s") - ord("!"))  # the first learned byte
    assert before % 2 == 0
    assert [label != IGNORE_INDEX for label in build(source, max_slots=before + 2)[0].labels[-2:]] == [True, True]
    with pytest.raises(DataError, match="nothing to train on"):
        build(source, max_slots=before)


def test_bad_rows_are_named_by_line(tmp_path):
    source = write(
        tmp_path / "rows.jsonl",
        chat(("a", "b")),
        "no json",
        [{"role": "user", "content": "only asked"}],
        [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}, {"role": "assistant", "content": "c"}],
        chat(("c", "d")),
    )
    for _ in range(2):  # the second time from the cache
        report = build(source).report
        assert [bad.line for bad in report.bad] == [2, 3, 4]
        assert "role 'bot'" in report.bad[2].reason
        assert (report.num_rows, report.num_used, report.num_examples) == (5, 2, 2)
        assert "3 rows can't be used: line 2: no JSON" in report.lines()[1]
    assert json.loads(json.dumps(report.as_dict()))["bad"][1]["line"] == 3
    assert build(source, num_examples=1).report.num_used == 1


def test_nothing_to_train_on_is_an_error(tmp_path):
    asked = write(tmp_path / "asked.jsonl", [{"role": "user", "content": "a"}])
    with pytest.raises(DataError, match=r"nothing to train on.*line 1: .*no message of the assistant"):
        build(asked)
    long = write(tmp_path / "long.jsonl", chat(("a" * 100, "b")))
    with pytest.raises(DataError, match=r"nothing to train on.*too long: lines 1"):
        build(long, max_slots=64)
    with pytest.raises(DataError, match="chat template"):
        build(asked, template=None)
    with pytest.raises(ConfigError, match="layout must be one of"):
        build(long, layout="packed")


def test_prompts_are_what_serving_reads(tmp_path):
    """Breaks when prompts get other ids than `LLM.encode` gives, or a long one vanishes."""
    rows = [[{"role": "user", "content": "a" * length}] for length in (3, 90, 5)]
    source = write(tmp_path / "prompts.jsonl", *rows, [{"role": "assistant", "content": "x"}])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = FORGETFUL
    prompts = build_prompt_dataset(source, tokenizer, max_prompt_tokens=60, template_options={"enable_thinking": False})
    assert [prompt.index for prompt in prompts] == [0, 1]
    for prompt, messages in zip(prompts, (rows[0], rows[2]), strict=True):
        text = render_chat(tokenizer, messages, enable_thinking=False)
        assert prompt.token_ids == encode_text(tokenizer, text, add_special_tokens=False)
        assert prompt.row.messages == messages
    report = prompts.report
    assert (report.num_rows, report.num_used, report.too_long) == (4, 2, [2])
    assert [bad.line for bad in report.bad] == [4]
    with pytest.raises(DataError, match=r"nothing to train on"):
        build_prompt_dataset(source, tokenizer, max_prompt_tokens=3, template_options={})
