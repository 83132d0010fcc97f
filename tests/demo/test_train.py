"""Training the demo: a killed stage ends as an undisturbed one, batches are functions of the step, folders are guarded."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from miniature import MINIATURE
from pipo.demo.batches import ExampleSource, paired_batch, regular_batch
from pipo.demo.recipe import Stage, is_done, stage_folder, stage_model
from pipo.demo.stages import rate, run_stage
from pipo.demo.tokenizer import ASSISTANT_ID, END_ID
from pipo.demo.train import train
from pipo.errors import ConfigError
from pipo.pairing import IGNORE_INDEX

TESTS = Path(__file__).parent.parent
KILL_AFTER = 12

RUN_BASE = """
import sys, time
from pathlib import Path
import torch
from pipo.demo.stages import run_stage
from miniature import MINIATURE

def report(steps_done, losses):
    print(steps_done, flush=True)
    time.sleep(0.05)

torch.set_num_threads(1)
run_stage(MINIATURE, MINIATURE.stage("base"), Path(sys.argv[1]), report)
"""


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(stage_model(out, name) / "model.safetensors")


def test_a_killed_stage_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    stage = MINIATURE.stage("base")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run_stage(MINIATURE, stage, calm, lambda *_: None)

    child = subprocess.Popen(
        [sys.executable, "-c", RUN_BASE, str(killed)], cwd=TESTS, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= KILL_AFTER:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert not is_done(killed, "base")
    saved = torch.load(stage_folder(killed, "base") / "state.pt", weights_only=True)
    assert 0 < len(saved["curve"]) < stage.steps

    seen: list[int] = []
    run_stage(MINIATURE, stage, killed, lambda done, _: seen.append(done))
    assert seen[0] == len(saved["curve"]) + 1
    for name, tensor in weights(calm, "base").items():
        assert torch.equal(tensor, weights(killed, "base")[name]), name
    records = [json.loads((stage_folder(out, "base") / "run.json").read_text()) for out in (calm, killed)]
    assert records[0]["losses"] == records[1]["losses"]
    assert records[0]["losses"][-1]["step"] == stage.steps
    assert {"git_revision", "versions", "hardware", "arguments", "recipe", "seconds"} <= set(records[0])
    assert not (stage_folder(killed, "base") / "state.pt").exists()


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    tiny = replace(MINIATURE, base_steps=2)
    for seed in (0, 1):
        recipe = replace(tiny, seed=seed)
        run_stage(recipe, recipe.stage("base"), tmp_path / str(seed), lambda *_: None)
    first, second = (weights(tmp_path / str(seed), "base") for seed in (0, 1))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_batches_are_functions_of_the_step() -> None:
    for name in ("base", "sft"):
        stage = MINIATURE.stage(name)
        steps = [3, 11, 3, 0]
        source = ExampleSource(MINIATURE, stage)
        in_one = [source.batch(step) for step in steps]
        assert in_one == [ExampleSource(MINIATURE, stage).batch(step) for step in steps]
        assert in_one[0] != in_one[1]


def test_fixed_data_is_fixed_and_shared() -> None:
    def solutions(name: str) -> set[str]:
        source = ExampleSource(MINIATURE, MINIATURE.stage(name))
        return {str(e.prompt + e.solution) for step in range(8) for e in source.batch(step)}

    assert len(solutions("sft")) == MINIATURE.num_fixed_solutions
    assert solutions("sft") == solutions("regular") == solutions("sft-long")
    assert not solutions("base") & solutions("sft")


def test_only_solutions_are_supervised() -> None:
    import random

    examples = ExampleSource(MINIATURE, MINIATURE.stage("base")).batch(0)
    ids, labels = regular_batch(examples)
    for row, label, example in zip(ids.tolist(), labels.tolist(), examples, strict=True):
        first = row.index(ASSISTANT_ID) + 1
        assert label[:first] == [IGNORE_INDEX] * first
        assert [token for token in label if token != IGNORE_INDEX] == example.solution
        assert example.solution[-1] == END_ID
    paired = paired_batch(examples, 1.0, random.Random(0))
    assert paired.ids.shape[1] % 2 == 0
    assert paired.ids.shape == paired.labels.shape


def test_the_rate_warms_up_stays_and_falls() -> None:
    rates = [rate(step / 100, 0.4) for step in range(100)]
    assert rates[0] < rates[2] < rates[3] == rates[50] == 1.0
    assert rates[-1] < 0.1
    assert rates[60:] == sorted(rates[60:], reverse=True)


def test_a_folder_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"seed": 1}')
    console = Console(quiet=True)
    with pytest.raises(ConfigError, match="--resume"):
        train(MINIATURE, tmp_path, resume=False, console=console)
    with pytest.raises(ConfigError, match="seed was 1, is 0"):
        train(MINIATURE, tmp_path, resume=True, console=console)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("a", "regular", 0, 1e-3, 1e-3), "steps"),
        (Stage("a", "opd", 1, 1e-3, 1e-3, start="b"), "teacher"),
        (Stage("a", "sft", 1, 1e-3, 1e-3), "start"),
    ],
)
def test_stages_that_can_not_run_are_refused(stage: Stage, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage.validate()
