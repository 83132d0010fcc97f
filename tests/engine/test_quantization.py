"""Weights of eight bits: which they are, what they change of the tokens, and what is refused."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pipo import LLM, PipoForCausalLM, SamplingParams
from pipo.cli.main import app
from pipo.engine import quantization
from pipo.engine.loading import describe_checkpoint
from pipo.errors import CheckpointError, ConfigError

torch.set_num_threads(1)
DEMO = Path(quantization.__file__).parent.parent / "demo" / "checkpoints"


@pytest.fixture(scope="module")
def int8():
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'pipo-llm[quant]'")
    return LLM(DEMO / "pipo", device="cpu", quantization="int8")


def test_only_backbone_and_mtp_block_are_quantised(int8):
    """A quantised head would move close tokens, a quantised gate would change what its threshold means."""
    linears = {n: m for n, m in int8.model.named_modules() if isinstance(m, torch.nn.Linear)}
    quantised = {n for n, m in linears.items() if type(m.weight).__module__.startswith("torchao.")}
    assert quantised == {n for n in linears if n.startswith(("model.layers.", "mtp."))}
    assert {"lm_head", "compressor.mlp.0", "confidence_head.fc1"} <= linears.keys() - quantised
    assert quantization.is_quantized(int8.model)


def test_weights_are_the_stored_ones_to_half_a_step(int8):
    """One scale a row: the largest weight of a row is 127 steps."""
    stored = PipoForCausalLM.from_pretrained(DEMO / "pipo").state_dict()
    name = "model.layers.2.mlp.down_proj.weight"
    held = dict(int8.model.named_parameters())[name].dequantize(torch.float32)
    step = stored[name].float().abs().amax(1, keepdim=True) / 127
    assert ((held - stored[name].float()).abs() <= 0.51 * step).all()
    assert int8.model.dtype == torch.bfloat16


def test_it_generates_and_sees_about_the_same(int8):
    """A scale on the wrong axis would give noise."""
    whole = LLM(DEMO / "pipo", device="cpu")
    prompt = {"prompt_token_ids": list(range(40, 71))}
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
    one, other = (llm.generate(prompt, params)[0].logprobs[0] for llm in (int8, whole))
    assert one.token_id == other.token_id
    assert one.logprob == pytest.approx(other.logprob, abs=0.15)


def test_our_own_kernels_keep_away_from_quantised_weights(int8):
    """They read numbers at a weight's address, where a quantised one has none."""
    assert int8.fusion is None or (not int8.fusion.layers and "plain linear" in int8.fusion.stock["layers.0"])
    if int8.fusion is not None:
        fused = {n for n, m in int8.model.named_modules() if "forward" in vars(m)}
        assert fused <= {
            "lm_head",
            "compressor.mlp.0",
            "compressor.mlp.2",
            "confidence_head.fc1",
            "confidence_head.fc2",
        } | {"confidence_head.draft"}


def test_its_weights_are_not_replaced(int8):
    """Copying over them would leave scales of other weights behind."""
    with pytest.raises(CheckpointError, match="quantised weights can't be replaced"):
        int8.load_weights(DEMO / "pipo")


@pytest.mark.parametrize(
    ("kind", "message"), [("int4", "must be one of int8, fp8, got 'int4'"), ("fp8", "needs a GPU with 8-bit floats")]
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(monkeypatch, kind, message):
    monkeypatch.setattr("pipo.engine.loading.load_pipo", None)
    with pytest.raises(ConfigError, match=message):
        LLM(DEMO / "pipo", device="cpu", quantization=kind)


def test_a_model_in_memory_stays_its_owner_s():
    model = PipoForCausalLM.from_pretrained(DEMO / "pipo")
    with pytest.raises(ConfigError, match="for a checkpoint that is loaded"):
        LLM(model, quantization="int8")


def test_without_torchao_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(ConfigError, match=r"pip install 'pipo-llm\[quant\]'"):
        LLM(DEMO / "pipo", device="cpu", quantization="int8")


def test_an_evaluation_knows_quantised_from_whole():
    """Else one would go on with the samples of the other."""
    whole = describe_checkpoint(DEMO / "pipo", "cpu", None)
    assert describe_checkpoint(DEMO / "pipo", "cpu", None, quantization="int8") == {**whole, "quantization": "int8"}


def test_a_server_does_not_promise_both():
    pytest.importorskip("fastapi")
    arguments = ["serve", str(DEMO / "pipo"), "--quantization", "int8", "--allow-weight-updates"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "drop one" in result.stderr
