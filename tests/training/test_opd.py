"""OPD as a run: from its settings to an adapter, resumed, and against the specification."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from opd_runs import losses_of, make_config, make_world, rows_of, serving
from pipo import BaseForCausalLM, PipoForCausalLM, reference
from pipo.data.grade import Grade
from pipo.errors import ConfigError, DataError
from pipo.pairing import IGNORE_INDEX as IGN
from pipo.pairing import teacher_tokens
from pipo.training.distillation import Distillation, StudentText
from pipo.training.opd import OpdTrainer, Outside, WeightSync, run_opd
from pipo.training.recorded import texts_of
from pipo.training.run import Watch
from pipo.training.served_teacher import LocalScorer, write_teacher_files
from rollout_cases import GOLDEN
from teacher_server import scoring


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps, whose rollouts are recorded."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run_opd(
        make_config(world, out, rollout={"record": True}), outside=Outside(lambda names: dict.fromkeys(names, Long()))
    )
    return out


class Long:
    """Right where the text has more than ten characters."""

    def grade(self, question: Any, text: str) -> Grade:
        return Grade(len(text) > 10)


# --- a run


def test_a_run_reports_what_was_written_and_leaves_an_adapter(undisturbed: Path, world: Path):
    rows = rows_of(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["num_rollouts"] == 4
        assert 0 < row["rollout_slots"] <= 16
        assert 0 < row["rollout_commit_rate"] < 1
        assert row["rollout_rejected_drafts"] > 0
        assert row["rollout_tokens_per_step"] == pytest.approx(1 + row["rollout_commit_rate"])
        assert 0 <= row["rollout_accuracy"] <= 1
        assert 0 <= row["rollout_finished"] <= 1
        assert row["rollout_s"] > 0
        assert row["teacher_s"] > 0
    trained = PipoForCausalLM.from_pretrained(undisturbed / "final")
    start = PipoForCausalLM.from_pretrained(world / "student")
    changed = {
        n.split(".")[0]
        for (n, a), b in zip(trained.named_parameters(), start.parameters(), strict=True)
        if not a.equal(b)
    }
    assert {"model", "mtp", "compressor", "confidence_head"} <= changed
    assert json.loads((undisturbed / "run.json").read_text())["status"] == "finished"


def test_the_first_step_has_the_losses_of_the_specification(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of what was rolled out, on the weights as they were. All four prompts of the step are rolled out in one call."""
    calls: list[list[StudentText]] = []
    original = Distillation.roll_out

    def watch(self: Distillation, *args: Any) -> list[StudentText]:
        calls.append(original(self, *args))
        return calls[-1]

    monkeypatch.setattr(Distillation, "roll_out", watch)
    run_opd(make_config(world, tmp_path / "run", run={"max_steps": 1}))
    (texts,) = calls
    assert len(texts) == 4
    student = PipoForCausalLM.from_pretrained(world / "student")
    teacher = BaseForCausalLM.from_pretrained(world / "teacher")
    sums, counts = [0.0, 0.0, 0.0], [0, 0, 0]
    for text in texts:
        with torch.no_grad():
            output = student(input_ids=torch.tensor([text.slots.ids]), return_logits=True)
            teacher_NV = teacher(torch.tensor([teacher_tokens(text.slots)]), return_logits=True).logits[0]
        logits = output.logits[0], output.mtp_logits[0], output.confidence_logits[0]
        losses = reference.opd_losses(*logits, teacher_NV, text.slots, "topk", top_k=4)
        numbers = [sum(label != IGN for label in text.slots.labels[2 + which :: 2]) for which in (0, 1, 1)]
        sums = [total + float(loss) * number for total, loss, number in zip(sums, losses, numbers, strict=True)]
        counts = [total + number for total, number in zip(counts, numbers, strict=True)]
    (row,) = rows_of(tmp_path / "run")
    found = [row[name] for name in ("backbone_loss", "mtp_loss", "confidence_loss")]
    assert found == pytest.approx([total / count for total, count in zip(sums, counts, strict=True)], rel=1e-4)


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
def test_a_changed_teacher_changes_the_gradient_of_a_step(
    mode: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Through the trainer's own path, on the same rollouts, in every mode, for every part that is trained."""
    gradients: list[dict[str, torch.Tensor]] = []
    original = OpdTrainer._get_grad_norm

    def watch(self: OpdTrainer, model: Any, **options: Any) -> float:
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        gradients.append(found)
        return original(self, model, **options)

    monkeypatch.setattr(OpdTrainer, "_get_grad_norm", watch)
    for teacher in ("teacher", "other"):
        groups = {"run": {"max_steps": 1}, "teacher": {"path": str(world / teacher)}, "divergence": {"mode": mode}}
        run_opd(make_config(world, tmp_path / teacher, **groups))
    one, other = gradients
    for part in ("model.layers", "mtp.layers", "mtp.fc", "compressor", "confidence_head"):
        pairs = [(one[name], other[name]) for name in one if name.startswith(part)]
        size = sum(float(a.square().sum()) for a, _ in pairs) ** 0.5
        apart = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
        assert apart > 0.02 * size > 0, part


def test_reports_of_several_steps_count_all_rollouts_after_a_resume(world: Path, tmp_path: Path):
    def stop(row: dict[str, float]) -> None:
        raise StopIteration

    run = {"log_every": 3, "save_every": 2}
    weights = {"mtp_weight": 0.5, "confidence_weight": 3.0}
    run_opd(make_config(world, tmp_path / "whole", run=run, loss=weights))
    with pytest.raises(StopIteration):
        run_opd(make_config(world, tmp_path / "cut", run=run, loss=weights), watch=Watch(row=stop))
    run_opd(make_config(world, tmp_path / "cut", run=run, loss=weights), resume=True)
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    (row,) = rows_of(tmp_path / "cut")
    assert row["num_rollouts"] == 3 * 4
    assert row["loss"] == pytest.approx(row["backbone_loss"] + 0.5 * row["mtp_loss"] + 3 * row["confidence_loss"])


def test_a_run_that_was_stopped_goes_on_to_the_same_losses(undisturbed: Path, world: Path, tmp_path: Path):
    """Stopped in its third step, it goes on from the checkpoint of its second. Breaks where a rollout's draw, the order of prompts or
    the gate's threshold depends on anything but seed, step and prompt."""

    def stop(row: dict[str, float]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    config = make_config(world, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_opd(config, watch=Watch(row=stop))
    run_opd(config, resume=True)
    assert losses_of(tmp_path / "run") == losses_of(undisturbed)


def test_the_split_into_micro_batches_changes_no_loss(undisturbed: Path, world: Path, tmp_path: Path):
    run_opd(make_config(world, tmp_path / "run", run={"batch_size": 1, "accumulation": 4}))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(undisturbed), rel=1e-4)


def test_recorded_rollouts_and_a_teacher_in_files_need_neither_engine_nor_teacher(
    undisturbed: Path, world: Path, tmp_path: Path
):
    """The same texts, and the same losses up to the teacher's tokens that were not written down."""
    write_teacher_files(
        tmp_path / "t",
        texts_of(undisturbed / "rollouts"),
        LocalScorer(BaseForCausalLM.from_pretrained(world / "teacher"), 259),
    )
    groups = {
        "rollout": {"backend": "files", "path": str(undisturbed / "rollouts")},
        "teacher": {"backend": "files", "path": str(tmp_path / "t")},
    }
    run_opd(make_config(world, tmp_path / "run", **groups))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(undisturbed), rel=1e-3)
    with pytest.raises(DataError, match="no rollout of"):
        run_opd(make_config(world, tmp_path / "other", **groups, run={"seed": 1}))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_rollouts_of_a_server_give_the_losses_of_those_of_the_engine(method: str, world: Path, tmp_path: Path):
    """Three steps: the server must have the weights of each, of an adapter or a whole model, before it writes."""
    tuning = {"tuning": {"method": method}}
    run_opd(make_config(world, tmp_path / "engine", **tuning))
    with serving(world / "student") as url:
        run_opd(make_config(world, tmp_path / "served", rollout={"backend": "server", "url": url}, **tuning))
    assert losses_of(tmp_path / "served") == pytest.approx(losses_of(tmp_path / "engine"), rel=2e-3)
    assert list((tmp_path / "served" / "sync").iterdir()) == []


def test_weights_are_sent_at_first_and_then_as_often_as_asked_and_leave_nothing_behind(tmp_path: Path):
    """Also what a killed run left on its way is removed: whole models would pile up."""
    sent: list[tuple[str, list[str]]] = []

    class Server:
        def update_weights(self, folder: Path) -> None:
            sent.append((folder.name, [path.name for path in folder.iterdir()]))

    class Writer:
        model = SimpleNamespace(dtype=torch.float32)

        def collect(self) -> dict[str, Any]:
            return {}

        def write(self, folder: Path, weights: Any, dtype: Any) -> None:
            (folder / "weights").write_text("")

    (tmp_path / "sync" / ".partial-step-9").mkdir(parents=True)
    sync = WeightSync(Server(), tmp_path / "sync", every=2)
    for step in (3, 4, 5, 6):
        sync.bring_up_to_date(step, Writer())
    assert sent == [(f"step-{step}", ["weights"]) for step in (3, 4, 6)]
    assert list((tmp_path / "sync").iterdir()) == []


def test_a_served_teacher_gives_the_losses_of_the_local_one(undisturbed: Path, world: Path, tmp_path: Path):
    """It is asked for every token of every text that was written, and returns all of the vocabulary."""
    with scoring(BaseForCausalLM.from_pretrained(world / "teacher")) as (url, asked):
        teacher = {"backend": "server", "path": None, "url": url, "top_k": 259}
        run_opd(make_config(world, tmp_path / "run", teacher=teacher))
    assert len(asked) == 12
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(undisturbed), rel=1e-3)


def test_two_processes_give_the_losses_of_one(undisturbed: Path, world: Path, tmp_path: Path):
    """DDP with the engine in each process, then FSDP2 with a server that is sent the gathered weights; a sharded teacher in both.
    Breaks where a draw depends on the process, counts are a process's own, or the server gets a part of the weights."""
    script = Path(__file__).parent.parent / "opd_process.py"
    with serving(world / "student") as url:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        done = subprocess.run(
            [*command, str(world), str(tmp_path), url], capture_output=True, text=True, timeout=300, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("ddp", "fsdp2"):
        assert losses_of(tmp_path / name) == pytest.approx(losses_of(undisturbed), rel=2e-3), name


@pytest.mark.parametrize("student", ["qwen3", "qwen3_5"])
def test_bfloat16_with_checkpointing_and_dropout_runs(student: str, world: Path, tmp_path: Path):
    """Float32 parts in a bfloat16 model, in rollouts and in training; also where linear-attention layers keep states. The teacher is
    of another family and, beside the second student, of a smaller vocabulary."""
    groups = {
        "model": {"dtype": "bfloat16"},
        "teacher": {"dtype": "bfloat16"},
        "tuning": {"dropout": 0.1},
        "run": {"max_steps": 2},
    }
    if student == "qwen3_5":
        shutil.copytree(GOLDEN / "tiny-mlp-tied", tmp_path / "student")
        byte_tokenizer().save_pretrained(tmp_path / "student")
        groups["model"]["path"] = str(tmp_path / "student")
        groups["rollout"] = {
            "top_k": 0,
            "top_p": 1.0,
            "temperature": 2.0,
        }  # entries beyond the teacher's would be drawn soon
        groups["optimizer"] = {"lr": 1e-4}
    run_opd(make_config(world, tmp_path / "run", **groups))
    assert all(0 < row[name] < 50 for row in rows_of(tmp_path / "run") for name in ("backbone_loss", "mtp_loss"))


# --- what is refused


def test_a_teacher_that_writes_pairs_or_speaks_otherwise_is_refused(world: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="is a PIPO checkpoint"):
        run_opd(make_config(world, tmp_path / "a", teacher={"path": str(world / "student")}))
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    tokenizer = json.loads((tmp_path / "teacher" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "teacher" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="must share a vocabulary"):
        run_opd(make_config(world, tmp_path / "b", teacher={"path": str(tmp_path / "teacher")}))


def test_a_grader_that_can_not_work_is_an_error_that_says_how_to_go_without(world: Path, tmp_path: Path):
    def refuse(names: set[str]) -> Any:
        raise DataError(f"there is no grader {', '.join(names)}")

    with pytest.raises(ConfigError, match=r"no grader long\. Or leave rollouts unchecked: data\.grade: false"):
        run_opd(make_config(world, tmp_path / "a"), outside=Outside(refuse))
    run_opd(make_config(world, tmp_path / "b", data={"grade": False}, run={"max_steps": 1}), outside=Outside(refuse))
    assert "rollout_accuracy" not in rows_of(tmp_path / "b")[0]
