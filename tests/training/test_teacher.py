"""Teachers: a model that runs here, one behind an endpoint, one in files. Each must say the same of the same text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from pipo.errors import ConfigError, DataError, EndpointError
from pipo.losses import DistilledObjective, PairLosses
from pipo.pairing import IGNORE_INDEX as IGN
from pipo.pairing import Slots, teacher_tokens
from pipo.training.endpoint import Endpoint
from pipo.training.rollout import slots_of_rollout
from pipo.training.served_teacher import (
    LocalScorer,
    ServedTeacherModel,
    TeacherFiles,
    first_state,
    write_teacher_files,
)
from pipo.training.teacher import CommonVocabulary, LocalTeacherModel, common_vocabulary
from rollout_cases import make_student, make_teacher, pair, rollout
from teacher_server import scoring

PAD, VOCAB, TOP_K = 256, 259, 259

ROWS = [
    slots_of_rollout(
        rollout([1, 2, 3], pair(10, 11, True), pair(12, 13, False), pair(14, 15, True), pair(9, 258, True)), PAD
    ),
    slots_of_rollout(rollout([4, 5], pair(20, 21, False), pair(258)), PAD),
]


def losses(objective: Any) -> PairLosses:
    student = make_student()
    width = max(len(row.ids) for row in ROWS)
    ids = torch.tensor([row.ids + [PAD] * (width - len(row.ids)) for row in ROWS])
    labels = torch.tensor([row.labels + [IGN] * (width - len(row.labels)) for row in ROWS])
    return student(input_ids=ids, labels=labels, objective=objective)


@pytest.mark.parametrize("mode", ["topk", "sampled"])
@pytest.mark.parametrize("form", ["vllm", "sglang", "files"])
def test_every_form_of_a_teacher_gives_the_losses_of_the_local_one(form: str, mode: Any, tmp_path: Path):
    """All tokens of every position are returned, so nothing is estimated. Breaks where a position is off by one, a rejected draft
    takes the text's log-probability for its own, or rows of different lengths are mixed up."""
    teacher = make_teacher()
    expected = losses(DistilledObjective(*LocalTeacherModel(teacher).targets(ROWS), mode=mode))
    with scoring(teacher) as (url, asked):
        if form == "files":
            write_teacher_files(tmp_path, map(teacher_tokens, ROWS), LocalScorer(teacher, TOP_K))
            targets = TeacherFiles(tmp_path, VOCAB).targets(ROWS)
        else:
            targets = ServedTeacherModel(Endpoint(url), VOCAB, api=form, top_k=TOP_K).targets(ROWS)
    found = losses(DistilledObjective(*targets, mode=mode))
    for name in ("loss", "backbone_loss", "mtp_loss", "confidence_loss", "confidence_target"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=2e-5, rtol=1e-4)
    texts = sorted(map(teacher_tokens, ROWS))
    if form == "vllm":
        assert sorted(body["prompt"] for _, body in asked) == texts
        assert {body["model"] for _, body in asked} == {"big"}
    if form == "sglang":
        assert sorted(body["input_ids"] for _, body in asked) == texts
        assert sorted(body["logprob_start_len"] for _, body in asked) == [1, 2]


def test_a_rejected_drafts_own_log_probability_is_not_the_texts():
    """The text goes on with 14 where draft 13 was rejected: the best token alone says nothing of 13, and the text's own is 14's."""
    with scoring(make_teacher()) as (url, _):
        first, second = ServedTeacherModel(Endpoint(url), VOCAB, top_k=1).targets(ROWS)
    step = 2  # the pair (12, 13): 13 is the label of slot 7
    assert ROWS[0].labels[2 * step + 3] == 13
    assert second.label_log_probs[0, step].isnan()
    assert not second.label_log_probs[0, step - 1].isnan()
    assert not first.label_log_probs[0, step].isnan()


def test_the_first_state_that_is_asked_for_is_the_one_before_the_first_label():
    assert [first_state(row) for row in ROWS] == [2, 1]
    assert first_state(Slots([1, 2], [IGN, IGN], [False, False])) == 1


def test_a_busy_endpoint_is_asked_again_and_one_that_refuses_is_not():
    with scoring(make_teacher(), refuse=[503, 429]) as (url, asked):
        ServedTeacherModel(Endpoint(url, wait_s=0.01), VOCAB, top_k=2).score([1, 2, 3])
        assert len(asked) == 3
    with scoring(make_teacher(), refuse=[400]) as (url, asked):
        with pytest.raises(EndpointError, match="/v1/completions does not answer as it should: 400: no"):
            ServedTeacherModel(Endpoint(url, wait_s=0.01), VOCAB, top_k=2).score([1, 2, 3])
        assert len(asked) == 1
    with scoring(make_teacher(), refuse=[503] * 3) as (url, asked), pytest.raises(EndpointError, match="503"):
        ServedTeacherModel(Endpoint(url, wait_s=0.01, retries=2), VOCAB, top_k=2).score([1, 2, 3])


# --- files


def test_a_text_without_a_file_is_an_error_and_written_files_are_kept(tmp_path: Path):
    scorer = LocalScorer(make_teacher(), 3)
    texts = [[1, 2, 3], [4, 5, 6]]
    assert write_teacher_files(tmp_path, texts, scorer) == 2
    assert write_teacher_files(tmp_path, [*texts, [7, 8]], scorer) == 1
    files = TeacherFiles(tmp_path, VOCAB)
    assert files.score([1, 2, 3]).ids.shape == (3, 3)
    with pytest.raises(DataError, match="a text of 2 tokens that begins"):
        files.score([1, 2])
    with pytest.raises(DataError, match="the student's vocabulary is 2"):
        TeacherFiles(tmp_path, 2).score([1, 2, 3])
    next(tmp_path.glob("*.safetensors")).write_bytes(b"{")
    with pytest.raises(DataError, match="no file of a teacher's"):
        [files.score(text) for text in texts]
    with pytest.raises(ConfigError, match="no folder"):
        TeacherFiles(tmp_path / "none", VOCAB)


# --- vocabularies


class Words:
    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words)}


def test_vocabularies_must_agree_on_what_both_have():
    one, longer = Words("a", "b", "c"), Words("a", "b", "c", "d")
    assert common_vocabulary(one, one, 4, 8) == 4
    assert common_vocabulary(longer, one, 8, 3) == 3
    assert common_vocabulary(None, one, 8, 8) == 8
    with pytest.raises(ConfigError, match="'d' is token 3 of the student and None of the teacher"):
        common_vocabulary(longer, one, 8, 4)
    with pytest.raises(ConfigError, match="'b' is token 1 of the student and 2 of the teacher"):
        common_vocabulary(one, Words("a", "c", "b"), 4, 4)
    with pytest.raises(ConfigError, match="8 and 9 vocabulary entries"):
        common_vocabulary(None, one, 8, 9)
    assert common_vocabulary(byte_tokenizer(), byte_tokenizer(), VOCAB, 384) == VOCAB


@pytest.mark.parametrize("teacher_size", [VOCAB + 5, VOCAB - 1])
def test_heads_of_different_sizes_are_compared_on_the_common_entries(teacher_size: int):
    """The larger head is cut, whichever it is, so both distributions are over the same tokens."""
    size = min(teacher_size, VOCAB)
    teacher = LocalTeacherModel(make_teacher(vocab_size=teacher_size, eos_token_id=None), size)
    rows = [
        replace(row, ids=[min(i, 250) for i in row.ids], labels=[min(label, 250) for label in row.labels])
        for row in ROWS
    ]
    targets = teacher.targets(rows)
    assert targets[0].head.vocab_size == size
    student = make_student()
    ids = torch.tensor([rows[0].ids])
    output = student(input_ids=ids)
    log_s = (output.backbone_hidden[0, 1] @ student.lm_head.weight[:size].T).log_softmax(-1)
    with torch.no_grad():
        log_t = (
            teacher.model(torch.tensor([teacher_tokens(rows[0])]), return_logits=True)
            .logits[0, 2, :size]
            .log_softmax(-1)
        )
    only = [replace(rows[0], labels=[IGN] * 4 + rows[0].labels[4:5] + [IGN] * (len(rows[0].ids) - 5))]
    one = CommonVocabulary(DistilledObjective(*teacher.targets(only), mode="full"), size)
    found = student(input_ids=ids, labels=torch.tensor([only[0].labels]), objective=one)
    torch.testing.assert_close(found.backbone_loss, (log_s.exp() * (log_s - log_t)).sum())


def test_a_token_that_the_teacher_does_not_have_is_named():
    with pytest.raises(DataError, match="token 258, and the teacher has 258 entries"):
        LocalTeacherModel(make_teacher(vocab_size=258, eos_token_id=None), 258).targets(ROWS)


def test_sharding_needs_processes():
    with pytest.raises(ConfigError, match=r"teacher\.shard"):
        LocalTeacherModel(make_teacher(), shard=True)


def test_the_mtp_block_of_a_teacher_is_dropped_and_its_weights_are_frozen():
    model = make_teacher()
    teacher = LocalTeacherModel(model)
    assert teacher.model.mtp is None
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_teacher_computes_in_its_own_dtype_whatever_the_student_does():
    """Inside the student's autocast a float32 teacher would otherwise give states of bfloat16."""
    model = LocalTeacherModel(make_teacher())
    expected, _ = model.targets(ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = model.targets(ROWS)
    assert torch.equal(found.hidden, expected.hidden)
