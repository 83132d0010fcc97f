"""Plans: what is known without running, what is said to be unknown, and that a plan counts as the run does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_config, byte_tokenizer, save_tokenizer
from families import pipo_model
from pipo.cli.plans import show_plan
from pipo.errors import CheckpointError, ConfigError
from pipo.model.base import BaseForCausalLM
from pipo.model.shapes import pipo_without_weights, shape_config
from pipo.training.config import OpdConfig, SftConfig
from pipo.training.lora import prepare_model
from pipo.training.memory import EXCHANGE, FROZEN, GRADIENTS, OPTIMIZER, StepSize, estimate_memory
from pipo.training.plan import make_plan

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def sft(**groups: Any) -> SftConfig:
    groups = {"model": {"path": "tiny", "shape": "tiny", "dtype": "float32"}, **groups}
    groups["data"] = {"train": "owner/name", "max_slots": 64, **groups.get("data", {})}
    groups["run"] = {"out": "runs/x", "device": "cpu", **groups.get("run", {})}
    return SftConfig.model_validate(groups)


def test_what_can_t_be_known_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """Breaks when a plan fails, or guesses, where neither data nor model can be read."""
    plan = make_plan(sft(model={"path": "owner/some-model"}))
    assert (plan.model, plan.memory, plan.steps.num_steps) == (None, None, None)
    assert set(plan.unknown) == {"model", "num_examples", "num_slots"}
    show_plan(plan.config, as_json=False)
    shown = capsys.readouterr().out
    assert "set data.num_examples" in shown
    assert "set model.shape" in shown


def test_steps_are_counted_as_the_run_counts_them(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(ROW * 101)
    run = {"batch_size": 2, "accumulation": 3, "epochs": 2.0}
    model = {"path": "owner/unknown"}
    steps = make_plan(sft(data={"train": str(data)}, run=run, model=model), 4).steps
    assert (steps.num_examples, steps.examples_per_step) == (101, 24)
    assert (steps.num_steps, steps.num_warmup_steps) == (10, 1)  # 13 batches on each device make 5 steps
    few = make_plan(sft(data={"train": str(data), "num_examples": 50}, run=run, model=model), 4).steps
    assert (few.num_examples, few.num_steps) == (50, 6)
    assert make_plan(sft(data={"num_examples": 50}, run={"max_steps": 7}, model=model)).steps.num_steps == 7


def test_slots_are_counted_where_data_and_tokenizer_are_here(tmp_path: Path) -> None:
    """Breaks when slots are guessed, or tokens are counted for slots."""
    model = tmp_path / "model"
    model.mkdir()
    BaseForCausalLM.from_config(byte_config(vocab_size=save_tokenizer(model))).save_pretrained(model)
    (tmp_path / "rows.jsonl").write_text(ROW * 300)
    config = sft(model={"path": str(model), "shape": "tiny"}, data={"train": str(tmp_path / "rows.jsonl")})
    prompt, answer = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b<|im_end|>"
    lengths = [len(byte_tokenizer()(text)["input_ids"]) for text in (prompt, answer)]
    slots = sum(length + length % 2 for length in lengths)
    plan = make_plan(config)
    assert plan.steps.num_slots == 300 * slots
    assert "num_slots" not in plan.unknown


def test_a_model_that_is_here_is_read(tmp_path: Path) -> None:
    """Breaks when the table of shapes wins over the model that will be trained; or when a broken one is taken for absent."""
    pipo_model("qwen3_5", compressor="linear").save_pretrained(tmp_path / "model")
    plan = make_plan(sft(model={"path": str(tmp_path / "model"), "shape": "qwen3.5-4b", "dtype": "float32"}))
    assert plan.model is not None
    assert (plan.model.family, plan.model.hidden_size, plan.model.origin) == (
        "qwen3_5_text",
        64,
        str(tmp_path / "model"),
    )
    held = {"compressor": 2 * 64 * 64 + 64, "confidence_head": 128 * 64 + 64 + 128}
    assert {part: plan.model.num_parameters[part] for part in held} == held
    assert plan.trained is not None
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 2)
    assert plan.lora_layers == attention | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 5)
    assert sum(plan.model.num_parameters.values()) == plan.trained.num_parameters
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json can't be read"):
        make_plan(plan.config)


def test_settings_that_the_model_refuses_are_errors() -> None:
    with pytest.raises(ConfigError, match="elsewhere_proj names no linear layer"):
        make_plan(sft(tuning={"targets": ["elsewhere_proj"]}))
    with pytest.raises(ConfigError, match="there is no shape 'enormous'"):
        make_plan(sft(model={"path": "x/y", "shape": "enormous"}))


def test_attention_decides_what_the_square_of_the_length_costs() -> None:
    """Breaks when a plan needs flash-attn to be installed, or ignores the implementation that is asked for."""
    peaks = []
    for attention in (None, "flash_attention_2", "eager"):
        model = {"path": "tiny", "shape": "tiny", "dtype": "float32", "attention": attention}
        memory = make_plan(sft(model=model, data={"max_slots": 2048})).memory
        assert memory is not None
        peaks.append(memory.peak_bytes)
    assert peaks[0] == peaks[1]
    assert peaks[2] > peaks[0] + 4 * 1024 * 1024 * 4


def test_a_teacher_and_its_states_are_counted() -> None:
    """Breaks when a local teacher is left out of the memory, or a served one is counted."""
    groups: dict[str, Any] = {
        "model": {"path": "tiny", "shape": "tiny"},
        "data": {"train": "owner/name", "max_prompt_tokens": 8},
        "run": {"out": "x", "device": "cpu"},
        "rollout": {"max_slots": 64},
        "teacher": {"path": "x/y", "shape": "tiny-wide"},
    }
    local = make_plan(OpdConfig.model_validate(groups))
    served = make_plan(OpdConfig.model_validate({**groups, "teacher": {"backend": "server", "url": "http://x"}}))
    assert local.memory is not None
    assert served.memory is not None
    assert local.teacher is not None
    assert local.memory.components["teacher weights"] >= 2 * local.teacher.total_parameters
    assert set(local.memory.phases) == {"rollout", "teacher", "forward and backward"}
    assert "teacher weights" not in served.memory.components
    unknown = make_plan(OpdConfig.model_validate({**groups, "teacher": {"path": "x/y"}}))
    assert unknown.memory is None
    assert "set teacher.shape" in unknown.unknown["teacher"]


@pytest.mark.parametrize(
    ("strategy", "divided"),
    [("ddp", ()), ("zero2", (GRADIENTS, OPTIMIZER)), ("fsdp2", (FROZEN, GRADIENTS, OPTIMIZER))],
)
def test_what_processes_share(strategy: str, divided: tuple[str, ...]) -> None:
    found = []
    for world_size in (1, 4):
        model = pipo_without_weights(shape_config("tiny"), dtype=torch.float32)
        config = sft(run={"strategy": strategy})
        prepare_model(model, config.tuning, "sft")
        found.append(estimate_memory(config, model, size=StepSize(64), kernels="cpu", world_size=world_size).components)
    alone, shared = found
    for part in (FROZEN, GRADIENTS, OPTIMIZER):
        assert shared[part] == pytest.approx(alone[part] / (4 if part in divided else 1), abs=1)
    assert EXCHANGE not in alone
    assert shared[EXCHANGE] > 0


def test_a_plan_is_plain_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_plan(sft(data={"num_examples": 10}, run={"processes": 2}), as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"]["num_processes"] == 2
    assert plan["config"]["tuning"]["rank"] == 64
    assert plan["trained"]["num_trained"] > 0
