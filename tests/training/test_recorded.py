"""Rollouts on disk, and a teacher's files about them: the same losses without engine or teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipo.data.prompts import Prompt
from pipo.errors import ConfigError, DataError
from pipo.training.config import DivergenceSettings, LossSettings
from pipo.training.distillation import Distillation
from pipo.training.recorded import RecordedRollouts, RecordingRollouts, texts_of
from pipo.training.rollout import EngineRollouts
from pipo.training.served_teacher import LocalScorer, TeacherFiles, write_teacher_files
from pipo.training.teacher import LocalTeacherModel
from rollout_cases import PROMPTS, make_student, make_teacher, settings

PROMPT_ROWS = [Prompt(index, ids) for index, ids in enumerate(PROMPTS)]


def test_recorded_rollouts_and_a_teacher_in_files_give_the_same_losses(tmp_path: Path):
    student, teacher = make_student(), make_teacher()
    recording = RecordingRollouts(
        EngineRollouts(student, settings()), tmp_path / "r", lambda: 5, text_of=lambda r: "said"
    )
    how = DivergenceSettings(mode="topk", k=300), LossSettings()
    losses = []
    for source, judge in (
        (recording, LocalTeacherModel(teacher)),
        (None, None),
    ):
        if source is None:
            write_teacher_files(tmp_path / "t", texts_of(tmp_path / "r"), LocalScorer(teacher, 300))
        distillation = Distillation(
            source or RecordedRollouts(tmp_path / "r"),
            judge or TeacherFiles(tmp_path / "t", 259),
            *how,
            pad_id=256,
            seed=1,
        )
        texts = distillation.roll_out(PROMPT_ROWS, step=5)[:1]
        objective = distillation.objective(texts, None, torch.device("cpu"))
        slots = texts[0].slots
        output = student(input_ids=torch.tensor([slots.ids]), labels=torch.tensor([slots.labels]), objective=objective)
        losses.append(output.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert '"text": "said"' in (tmp_path / "r" / "step-00000005-0.jsonl").read_text()


def test_what_was_not_recorded_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rollout\.path"):
        RecordedRollouts(tmp_path)
    RecordingRollouts(EngineRollouts(make_student(), settings()), tmp_path, lambda: 0).roll_out(PROMPTS[:1], [3])
    recorded = RecordedRollouts(tmp_path)
    assert recorded.roll_out(PROMPTS[:1], [3])[0].prompt_ids == PROMPTS[0]
    with pytest.raises(DataError, match="no rollout of 1 of the 1 prompts"):
        recorded.roll_out(PROMPTS[:1], [4])
    (tmp_path / "step-1-0.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1, is no rollout"):
        RecordedRollouts(tmp_path)


def test_another_prompt_with_a_recorded_seed_is_not_taken_for_it(tmp_path: Path):
    RecordingRollouts(EngineRollouts(make_student(), settings()), tmp_path, lambda: 0).roll_out(PROMPTS, [3, 4, 5])
    recorded = RecordedRollouts(tmp_path)
    assert [r.prompt_ids for r in recorded.roll_out(PROMPTS[::-1], [5, 4, 3])] == PROMPTS[::-1]
    with pytest.raises(DataError, match="no rollout of 2 of the 3 prompts"):
        recorded.roll_out(PROMPTS, [4, 3, 5])
