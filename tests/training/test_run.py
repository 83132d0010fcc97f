"""A run of training: what it writes, what it reports, how it goes on, and that splitting a step changes nothing."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from pipo import PipoForCausalLM
from pipo.errors import ConfigError, TrainingError
from pipo.training import distributed
from pipo.training.arguments import training_arguments
from pipo.training.run import Task, Watch, run_training
from pipo.training.trainer import PipoTrainer
from tiny_training import TinySlots, checkpoints, collate, metrics, settings, train


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return checkpoints(tmp_path_factory.mktemp("models"))


def outputs(model):
    batch = collate([TinySlots()[i] for i in range(4)])
    model.eval()
    with torch.no_grad():
        return model(**batch, return_logits=True)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("start", ["base", "pipo"])
def test_final_weights_are_those_that_were_trained(models, tmp_path, method, start):
    """`final/` loads as a model that computes what the live one computed: nothing trained is left out, nothing is rounded away."""
    live = []
    watch = Watch(started=lambda setup, first, steps: live.append(setup))
    summary = train(settings(models[start == "pipo"], tmp_path / "run", tuning={"method": method}), watch=watch)
    loaded, trained = PipoForCausalLM.from_pretrained(summary["final"]), live[0].model
    for name in ("loss", "logits", "mtp_logits", "confidence_logits"):
        torch.testing.assert_close(outputs(loaded)[name], outputs(trained)[name], rtol=1e-4, atol=1e-5)
    started = PipoForCausalLM.from_pretrained(models[1]) if start == "pipo" else PipoForCausalLM.from_base(models[0])
    assert outputs(loaded).mtp_loss < outputs(started).mtp_loss - 0.02
    assert (Path(summary["final"]) / "tokenizer.json").is_file()


def test_peft_reads_the_adapter_too(models, tmp_path):
    """Others' tools load it without us: LoRA under peft's names, whole modules by full path and no others."""
    from peft import PeftModel

    summary = train(settings(models[0], tmp_path / "run"))
    theirs = PeftModel.from_pretrained(PipoForCausalLM.from_base(models[0]), summary["final"])
    ours = PipoForCausalLM.from_pretrained(summary["final"])
    for name in ("logits", "mtp_logits", "confidence_logits"):
        torch.testing.assert_close(outputs(theirs)[name], outputs(ours)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_run_is_the_undisturbed_run(models, tmp_path, method):
    """Bit for bit: weights, and every row of metrics, dropout and augmentation included; the rows of a later step are forgotten."""
    tuning = {"method": method, "dropout": 0.3}

    class Killed(Exception):
        pass

    def kill_at(step):
        def row(found):
            if found["step"] == step:
                raise Killed

        return Watch(row=row)

    whole = settings(models[0], tmp_path / "whole", tuning=tuning, run={"log_every": 1})
    cut = settings(models[0], tmp_path / "cut", tuning=tuning, run={"log_every": 1})
    train(whole)
    for resume, step in ((False, 3), (True, 5)):
        with pytest.raises(Killed):
            train(cut, resume=resume, watch=kill_at(step))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(cut, resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    names = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}
    ours, theirs = (load_file(tmp_path / run / "final" / names[method]) for run in ("cut", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reports_of_several_steps_survive_a_resume(models, tmp_path):
    class Killed(Exception):
        pass

    def row(found):
        if found["step"] == 3:
            raise Killed

    run = {"log_every": 3, "save_every": 2, "max_steps": 5}
    train(settings(models[0], tmp_path / "whole", run=run))
    assert [row["step"] for row in metrics(tmp_path / "whole")] == [3, 5], (
        "the last report is of the steps that are left"
    )
    with pytest.raises(Killed):
        train(settings(models[0], tmp_path / "cut", run=run), watch=Watch(row=row))
    train(settings(models[0], tmp_path / "cut", run=run), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_other_data_or_another_base_is_not_gone_on_with(models, tmp_path):
    """The settings name the same paths, but what lies there has changed since the checkpoint."""

    class Named(TinySlots):
        fingerprint = "one"

    def run(**options):
        task = Task("sft", lambda setup: Named(), lambda setup: collate)
        return run_training(task, settings(base, tmp_path / "run"), **options)

    base = tmp_path / "base"
    shutil.copytree(models[0], base)
    for _ in range(2):  # before its first checkpoint, a run starts anew from whatever there is
        with pytest.raises(StopIteration):
            run(resume=True, watch=Watch(row=stop_at(1)))
        Named.fingerprint += "!"
    with pytest.raises(StopIteration):
        run(resume=True, watch=Watch(row=stop_at(3)))
    Named.fingerprint = "other"
    with pytest.raises(TrainingError, match=r"tiny is not what .* was begun with: its content has changed \(one!! was"):
        run(resume=True)
    Named.fingerprint = "one!!"
    weights = load_file(base / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"base is not what .* was begun with"):
        run(resume=True)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert run(resume=True)["num_steps"] == 6


def stop_at(step):
    def row(found):
        if found["step"] == step:
            raise StopIteration

    return row


def test_one_process_trains_on_one_gpu(models, tmp_path, monkeypatch):
    """transformers would copy the model to every GPU that it sees, which is not what check_strategy calls single."""
    original = TrainingArguments._setup_devices.func

    def with_eight(self):
        device = original(self)
        self._n_gpu = 8
        return device

    monkeypatch.setattr(TrainingArguments._setup_devices, "func", with_eight, raising=False)
    config = settings(models[0], tmp_path / "run")
    assert training_arguments(config.run, config.optimizer).n_gpu == 1
    with pytest.raises(ConfigError, match="but DataParallel would run"):
        distributed.check_strategy(config.run, torch.nn.DataParallel(torch.nn.Linear(1, 1)))


def test_a_report_of_several_steps_has_their_mean_losses_and_summed_counts(models, tmp_path):
    for every in (1, 3):
        train(settings(models[0], tmp_path / str(every), run={"log_every": every, "max_steps": 3}))
    (together,), rows = metrics(tmp_path / "3"), metrics(tmp_path / "1")
    for name in ("loss", "backbone_loss", "mtp_loss", "confidence_loss"):
        assert together[name] == pytest.approx(sum(row[name] for row in rows) / 3)
    for name in ("num_tokens", "num_slots"):
        assert together[name] == sum(row[name] for row in rows)


def test_how_a_step_is_split_changes_nothing(models, tmp_path):
    """Losses are means over the positions of the whole step: 4 × 1, 2 × 2 and 1 × 4 examples give the same gradient."""
    rows = {}
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        out = tmp_path / f"{batch_size}x{accumulation}"
        run = {"batch_size": batch_size, "accumulation": accumulation, "max_steps": 3, "save_every": 3}
        train(settings(models[0], out, run=run, tuning={"dropout": 0.0}))
        rows[batch_size] = metrics(out)
    for other in (rows[2], rows[1]):
        for ours, theirs in zip(rows[4], other, strict=True):
            assert ours.keys() == theirs.keys()
            differing = {
                k: (ours[k], theirs[k])
                for k in ours
                if k != "epoch" and ours[k] != pytest.approx(theirs[k], rel=1e-4, abs=1e-6)
            }
            assert differing == {}


def test_gradient_checkpointing_changes_nothing(models, tmp_path):
    for on in (True, False):
        train(settings(models[0], tmp_path / str(on), run={"gradient_checkpointing": on, "max_steps": 2}))
    assert metrics(tmp_path / "True") == metrics(tmp_path / "False")


def test_data_read_by_another_process_is_the_same(models, tmp_path):
    """Two epochs: a worker that missed the second would augment as in the first."""
    for workers in (0, 1):
        train(settings(models[0], tmp_path / str(workers), data={"num_workers": workers}))
    assert metrics(tmp_path / "1") == metrics(tmp_path / "0")


def test_bfloat16_run_learns_with_float32_masters(models, tmp_path):
    """Steps of 1e-5 are lost in bfloat16 weights: they must show in what was trained."""
    config = settings(
        models[0], tmp_path / "run", model={"dtype": "bfloat16"}, optimizer={"lr": 1e-5, "schedule": "constant"}
    )
    summary = train(config)
    adapter = load_file(Path(summary["final"]) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    moved = adapter["base_model.model.compressor.mlp.0.weight"] - torch.eye(64)
    assert 1e-5 < moved.abs().max() < 1e-4
    assert PipoForCausalLM.from_pretrained(summary["final"], dtype="bfloat16").dtype == torch.bfloat16


def test_a_run_folder_says_what_the_run_was(models, tmp_path):
    summary = train(settings(models[0], tmp_path / "run"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["summary"] == json.loads(json.dumps(summary))
    assert record["config"]["tuning"]["rank"] == 4
    assert {"arguments", "git_revision", "versions", "hardware", "num_trained", "num_steps"} <= record.keys()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["epoch"] == pytest.approx(1 + 2 * 2 / 7)
    for row in rows:
        assert row["loss"] == pytest.approx(row["backbone_loss"] + row["mtp_loss"] + row["confidence_loss"], rel=1e-5)
        assert row["tokens_per_step@0.95"] == 1 + row["commit_rate@0.95"]
        assert row["grad_norm"] > 0
        assert row["num_tokens"] > 0
        assert row["num_slots"] % 2 == 0


def test_a_folder_with_something_in_it_is_not_overwritten(models, tmp_path):
    out = tmp_path / "run"
    first = train(settings(models[0], out))
    with pytest.raises(TrainingError, match="is not empty; go on with the run in it by --resume"):
        train(settings(models[0], out))
    assert train(settings(models[0], out), resume=True) == json.loads(json.dumps(first))  # finished: nothing is trained
    with pytest.raises(
        TrainingError, match=r"other settings: optimizer.lr was 0.01 and is 0.1; tuning.rank was 4 and is 8"
    ):
        train(settings(models[0], out, optimizer={"lr": 0.1}, tuning={"rank": 8}), resume=True)
    train(settings(models[0], out, run={"save_every": 3, "log_every": 2}), resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(TrainingError, match="not a run to resume"):
        train(settings(models[0], tmp_path / "notes"), resume=True)


def test_optimiser_and_loss_follow_their_settings(models, tmp_path):
    """Which weights decay, Adam's numbers, the clipped gradient, and the terms' weights: of what runs, not of what was read."""
    seen = []

    class Watching(PipoTrainer):
        def _get_grad_norm(self, *args, **kwargs):
            gradients = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
            seen.append((float(torch.stack(gradients).norm()), self.optimizer.param_groups))
            return super()._get_grad_norm(*args, **kwargs)

    optimizer = {"betas": (0.8, 0.7), "eps": 1e-6, "weight_decay": 0.3, "max_grad_norm": 0.01}
    groups = {"optimizer": optimizer, "loss": {"mtp_weight": 0.5, "confidence_weight": 3.0}, "run": {"max_steps": 1}}
    train(settings(models[0], tmp_path / "run", **groups), trainer=Watching)
    (row,) = metrics(tmp_path / "run")
    ((clipped, parameter_groups),) = seen
    assert row["loss"] == pytest.approx(row["backbone_loss"] + 0.5 * row["mtp_loss"] + 3 * row["confidence_loss"])
    assert row["grad_norm"] > 0.1
    assert clipped == pytest.approx(0.01, rel=1e-3)
    for group in parameter_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] == 0.3}
        assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-6)
    assert {group["weight_decay"] for group in parameter_groups} == {0.3, 0.0}


def test_what_is_not_there_is_refused(models, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch finds no GPU"):
            train(settings(models[0], tmp_path / "a", run={"device": "cuda"}))
    with pytest.raises(ConfigError, match="needs several processes"):
        train(settings(models[0], tmp_path / "b", run={"strategy": "fsdp2"}))
    monkeypatch.setattr("pipo.training.arguments.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zero2 needs deepspeed: pip install 'pipo-llm\[zero\]'"):
        train(settings(models[0], tmp_path / "c", run={"strategy": "zero2"}))
    with pytest.raises(ConfigError, match="meant for 8 processes and was started on 1"):
        train(settings(models[0], tmp_path / "c", run={"processes": 8}))
    assert not (tmp_path / "c").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_saved(models, tmp_path):
    class Broken(PipoTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 3 else loss

    with pytest.raises(TrainingError, match="step 4: the gradient is not finite"):
        train(settings(models[0], tmp_path / "run"), trainer=Broken)
    train(settings(models[0], tmp_path / "run"), resume=True)
    assert all(row["loss"] is not None for row in metrics(tmp_path / "run"))
