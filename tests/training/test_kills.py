"""A run that dies at any moment goes on from its last whole checkpoint to the same losses; a full disk leaves what was there."""

import errno
import json
import multiprocessing
import random
import resource
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from pipo import PipoForCausalLM
from pipo.errors import CheckpointError
from pipo.training.checkpoints import Checkpoints, whole_folder
from pipo.training.trainer import PipoTrainer
from tiny_training import checkpoints, metrics, run_until, settings, train

NUM_KILLS = 20
SAVED = {"save_every": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(base, out, run=SAVED))
    return out


def assert_same(out, undisturbed):
    assert metrics(out) == metrics(undisturbed)
    ours, theirs = (load_file(run / "final" / "adapter_model.safetensors") for run in (out, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def whole_checkpoints(out):
    """Every folder that is named as a checkpoint is one."""
    found = [path for path in (out / "checkpoints").glob("*") if not path.name.startswith(".")]
    for path in found:
        files = json.loads((path / "checkpoint.json").read_text())["files"]
        assert {name: (path / name).stat().st_size for name in files} == files
        load_file(path / "adapter_model.safetensors")
        torch.load(path / "optimizer.pt", weights_only=True)
    return len(found)


class Runner:
    """Runs in processes that are forked from one which has loaded everything: each starts at once."""

    def __init__(self, base):
        self.base = base
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["pipo.training.run", "pipo.training.sft"])

    def __call__(self, out, moment):
        """Whether the run came to its end, the events counted, and the seconds it took."""
        counted = self.context.Value("q", 0)
        process = self.context.Process(target=run_until, args=(str(self.base), str(out), moment, counted))
        began = time.monotonic()
        process.start()
        process.join()
        assert process.exitcode in (0, -9)
        return process.exitcode == 0, counted.value, time.monotonic() - began


def test_killed_at_twenty_moments_a_run_ends_as_if_nothing_had_happened(base, undisturbed, tmp_path):
    """Three in four die at an event in the run's folder, most of which are parts of a save; the others after some time."""
    run, rng = Runner(base), random.Random(0)
    finished, num_events, seconds = run(tmp_path / "run-0", None)
    assert finished
    assert_same(tmp_path / "run-0", undisturbed)
    num_kills = num_runs = num_left = 0
    while num_kills < NUM_KILLS or not finished:
        if finished:
            num_runs += 1
        out = tmp_path / f"run-{num_runs}"
        moment = rng.uniform(0, seconds) if rng.random() < 0.25 else rng.randint(1, num_events)
        finished, _, _ = run(out, moment if num_kills < NUM_KILLS else None)
        num_kills += not finished
        num_left += whole_checkpoints(out) > 0
        if finished:
            assert_same(out, undisturbed)
    assert num_left >= NUM_KILLS // 2, "most runs must have had something to go on from"


class Failing(PipoTrainer):
    """Whose disk is full when the checkpoint of step 4 is written: after so many bytes of a file, as the system says it."""

    limit = 0

    def _save_checkpoint(self, model, trial):
        if self.state.global_step != 4:
            return super()._save_checkpoint(model, trial)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, before[1]))
        try:
            return super()._save_checkpoint(model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 5_000, 20_000, 70_000])
def test_a_save_that_fails_in_the_middle_of_a_file_leaves_the_checkpoint_before(base, undisturbed, tmp_path, limit):
    out = tmp_path / "run"
    config = settings(base, out, run=SAVED)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: .*Older checkpoints are untouched"):
        train(config, trainer=type("FailingAt", (Failing,), {"limit": limit}))
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    whole_checkpoints(out)
    train(config, resume=True)
    assert_same(out, undisturbed)


@pytest.mark.parametrize(
    "call", ["os.fsync", "os.replace", "pathlib.Path.mkdir", "pathlib.Path.write_text", "shutil.copyfile"]
)
def test_a_full_disk_at_any_call_leaves_no_half_folder(tmp_path, monkeypatch, call):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "a").write_text("old")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)

    def write():
        with whole_folder(tmp_path / "checkpoint-1") as partial:
            (partial / "a").write_text("new")
            shutil.copyfile(partial / "a", partial / "b")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "a").read_text() == "old"


def test_a_half_written_checkpoint_is_no_checkpoint(base, undisturbed, tmp_path):
    """Left-overs of a killed save go when the run goes on; a damaged file is named; neither loads as a model."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "final")
    (out / "run.json").write_text(
        (out / "run.json").read_text().replace("finished", "running").replace(str(undisturbed), str(out))
    )
    half = out / "checkpoints" / ".partial-checkpoint-7"
    shutil.copytree(out / "checkpoints" / "checkpoint-6", half)
    (half / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError):
        PipoForCausalLM.from_pretrained(half)
    last = out / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    last.write_bytes(last.read_bytes()[:-100])
    config = settings(base, out, run=SAVED)
    with pytest.raises(CheckpointError, match=r"optimizer.pt is damaged.*remove .*checkpoint-6 to go on"):
        train(config, resume=True)
    assert not half.exists()
    shutil.rmtree(last.parent)
    train(config, resume=True)
    assert_same(out, undisturbed)


def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    found = Checkpoints(tmp_path, keep=2, writer=None)
    assert [path.name for path in found.all()] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
