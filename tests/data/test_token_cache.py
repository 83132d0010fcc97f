"""The tokenised cache: never stale, never half, written once however many ask."""

import json
import multiprocessing
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import byte_tokenizer
from chat_templates import CHATML
from pipo.data import token_cache
from pipo.data.examples import build_sft_dataset
from pipo.data.token_cache import CacheWriter, TokenCache, fingerprint_of_source, open_cache
from pipo.errors import DataError

PAD = 256
turns = st.lists(st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=5), st.booleans()), max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(turns.filter(lambda t: any(ids for ids, _ in t)), min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("cache")
    writer = CacheWriter(folder)
    for number, example in enumerate(examples):
        writer.add(example, [number, 7])
    writer.close({})
    cache = TokenCache(folder)
    assert len(cache) == len(examples)
    assert cache.counts.tolist() == [[number, 7] for number in range(len(examples))]
    for number, example in enumerate(examples):
        read = cache.turns(number)
        assert [(token, supervised) for ids, supervised in read for token in ids] == [
            (token, supervised) for ids, supervised in example for token in ids
        ]
        assert all(a[1] != b[1] for a, b in pairwise(read))


def rows(path, *answers):
    messages = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer, "note": "n"}] for answer in answers
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))
    return path


def build(source, notes, cache_dir, tokenizer=None, **changes):
    options = {"max_slots": 64, "thinking_prefix": "", "template_options": {}, "layout": "split_pairs"}
    options |= {"max_pad_ratio": 0.0, "seed": 0}
    return build_sft_dataset(
        source, tokenizer or byte_tokenizer(), PAD, **{**options, **changes}, cache_dir=cache_dir, note=notes.append
    )


def test_whatever_decides_the_tokens_makes_another_cache(tmp_path):
    """Breaks when training goes on with the tokens of other rows, another template or other settings."""
    source, cache_dir = rows(tmp_path / "rows.jsonl", "b"), tmp_path / "cache"
    notes: list[str] = []
    build(source, notes, cache_dir)
    assert notes == [f"tokenising {source}"]
    build(source, notes, cache_dir, max_slots=62, seed=3, layout="reject_drafts")  # decide no token
    assert len(notes) == 1
    other = byte_tokenizer()
    other.chat_template = CHATML.replace("\n", " ")
    spoken = byte_tokenizer()
    spoken.add_tokens(["bb"])
    ended = byte_tokenizer()
    ended.eos_token = "<|endoftext|>"  # which templates write, and which may end a turn
    for number, (changed, tokenizer, changes) in enumerate(
        [
            ("chat template", other, {}),
            ("tokenizer", spoken, {}),
            ("tokenizer", ended, {}),
            ("thinking_prefix", None, {"thinking_prefix": "<think>\n"}),
            ("template_options", None, {"template_options": {"enable_thinking": False}}),
            ("num_examples", None, {"num_examples": 1}),
        ]
    ):
        build(source, notes, cache_dir, tokenizer, **changes)
        assert len(notes) == number + 2
        assert notes[-1].endswith(f"has other {changed}")
    rows(source, "c")
    dataset = build(source, notes, cache_dir)
    assert notes[-1].endswith("has other rows")
    assert byte_tokenizer().decode(dataset.example(0).turns[-1][0]) == "c<|im_end|>"
    rows(source, "b")  # and the first one is still there
    build(source, notes, cache_dir)
    assert len(notes) == 8


def test_a_version_of_the_format_is_a_cache_of_its_own(tmp_path, monkeypatch):
    source, notes = rows(tmp_path / "rows.jsonl", "b"), []
    build(source, notes, tmp_path / "cache")
    monkeypatch.setattr(token_cache, "FORMAT", token_cache.FORMAT + 1)
    build(source, notes, tmp_path / "cache")
    assert notes[1].endswith("has other format")


def _build_slowly(cache_dir, log, pause_s):
    def write(writer):
        with open(log, "a") as stream:
            stream.write("written\n")
        writer.add([([1, 2], True)], [0])
        time.sleep(pause_s)
        writer.add([([3], True)], [0])
        return {}

    assert len(open_cache(cache_dir, "rows", {"rows": "x"}, write, lambda _: None)) == 2


def test_one_process_writes_and_the_others_wait(tmp_path):
    """Breaks when each rank tokenises for itself, or one reads what another is still writing."""
    fork = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    asking = [fork.Process(target=_build_slowly, args=(tmp_path / "cache", log, 0.2)) for _ in range(3)]
    for process in asking:
        process.start()
    for process in asking:
        process.join(30)
    assert [process.exitcode for process in asking] == [0, 0, 0]
    assert log.read_text() == "written\n"


def test_a_killed_writer_leaves_nothing_that_is_used(tmp_path):
    """Breaks when half a cache is taken for a whole one, or its remains stop the next run."""
    fork = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    process = fork.Process(target=_build_slowly, args=(tmp_path / "cache", log, 60))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert [path.name for path in (tmp_path / "cache").glob("*.partial")]
    _build_slowly(tmp_path / "cache", log, 0)
    assert log.read_text() == "written\n" * 2
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    """Breaks when a full disk leaves a folder that looks like a cache."""
    source = rows(tmp_path / "rows.jsonl", "b")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(DataError, match=r"No space left.*another data\.cache"):
            build(source, [], tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(build(source, [], tmp_path / "cache")) == 1


def test_a_disk_that_is_full_while_tokens_are_written_is_left_as_it_was(tmp_path):
    """Breaks when the tokens that still fitted stay on a full disk."""

    def write(writer):
        writer._stream.close()
        writer._stream = Path("/dev/full").open("wb")  # noqa: SIM115 (the writer closes it)
        writer.add([(list(range(100_000)), True)])
        raise AssertionError("nothing fits")

    with pytest.raises(DataError, match="No space left"):
        open_cache(tmp_path, "rows", {"rows": "x"}, write, lambda _: None)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_folder_is_known_by_its_files(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows(folder / "a.jsonl", "b")
    before = fingerprint_of_source(str(folder), "train", None)
    assert fingerprint_of_source(str(folder), "train", None) == before
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    assert fingerprint_of_source(str(folder), "train", None) != before
    with pytest.raises(DataError, match="can't be read"):
        fingerprint_of_source(str(tmp_path / "absent.jsonl"), "train", None)
