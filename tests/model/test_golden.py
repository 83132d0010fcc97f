"""The golden checkpoints: the forward gives what the reference's own gave, and decoding what full recomputation gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipo import LLM, PipoForCausalLM, RequestOutput, SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["tiny-mlp-tied", "tiny-linear-untied"]
TRACES: dict[str, list[dict[str, Any]]] = json.loads((GOLDEN / "traces.json").read_text())
MARGIN = 2e-3
HIDDEN, LOGITS, EXACT = 1e-3, 2e-3, 5e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_the_forward_is_the_reference_s(name: str, attention: str) -> None:
    """Breaks when a weight lands in another place, or any part of the forward computes something else."""
    model = PipoForCausalLM.from_pretrained(GOLDEN / name, attn_implementation=attention)
    assert model.config.text_config._attn_implementation == attention
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        out = model(expected["input_ids"], labels=expected["labels"], return_logits=True)
    for found, key, tolerance in (
        (out.backbone_hidden, "backbone_hidden", HIDDEN),
        (out.mtp_hidden, "mtp_hidden", HIDDEN),
        (out.logits, "logits1", LOGITS),
        (out.mtp_logits, "logits2", LOGITS),
        (torch.sigmoid(out.confidence_logits), "confidence", EXACT),
        (out.loss.reshape(1), "loss", EXACT),
        (out.backbone_loss.reshape(1), "backbone_loss", EXACT),
        (out.mtp_loss.reshape(1), "mtp_loss", EXACT),
        (out.confidence_loss.reshape(1), "conf_loss", EXACT),
    ):
        want = torch.sigmoid(expected["conf_logit"]) if key == "confidence" else expected[key]
        assert found.shape == want.shape, key
        torch.testing.assert_close(found, want, atol=tolerance, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def generate(llm: LLM, traces: list[dict[str, Any]]) -> list[RequestOutput]:
    params = [
        SamplingParams(temperature=0, threshold=t["threshold"], max_tokens=len(t["token_ids"]), ignore_eos=True)
        for t in traces
    ]
    return llm.generate([{"prompt_token_ids": t["prompt"]} for t in traces], params)


def check(trace: dict[str, Any], output: RequestOutput) -> None:
    assert output.token_ids == trace["token_ids"], trace
    # The trace counts a draft that max_tokens cut off as committed; a result (spec section 4) does not.
    cut_off = output.num_pairs + trace["committed"] - len(trace["token_ids"])
    assert cut_off in (0, 1), trace
    assert output.num_committed == trace["committed"] - cut_off, trace
    assert output.num_pairs + output.num_committed == len(output.token_ids), trace


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_s_greedy_text_is_the_trace_s(name: str) -> None:
    """Breaks when prefill, a cache, the gate or the count of committed drafts differs from full recomputation.

    Traces that met a margin too small to be decided in float32 are left out; they are few.
    """
    traces = [trace for trace in TRACES[name] if trace["margin"] > MARGIN]
    assert len(traces) > 0.8 * len(TRACES[name])
    llm = LLM(PipoForCausalLM.from_pretrained(GOLDEN / name), max_num_seqs=8)
    for trace, output in zip(traces, generate(llm, traces), strict=True):
        check(trace, output)
    for trace in traces:
        check(trace, generate(llm, [trace])[0])
