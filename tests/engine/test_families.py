"""Step-by-step decoding equals the teacher-forced forward, for every family. Breaks when a cache, a mask, a position or
the MTP block's prefill is wrong in any of them."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, PAD, VOCAB, WINDOW, pipo_model
from pipo import LLM, PipoForCausalLM, RequestOutput, SamplingParams
from pipo.pairing import accept, pair_slots_from_tokens

MARGIN = 2e-3
# Beyond twice the window in pairs, one token, odd and even.
PROMPTS = [[7], [5, 9], [11, 3, 8], list(range(3, 3 + 4 * WINDOW + 5)), [3 + (i * 7) % 150 for i in range(70)]]


def prompt(ids: list[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": ids}


def generate(
    model: PipoForCausalLM, prompts: list[list[int]], thresholds: list[float], n: int = 24, kernels: str = "torch"
) -> list[RequestOutput]:
    params = [
        SamplingParams(temperature=0, threshold=t, max_tokens=n, ignore_eos=True, record_pairs=True) for t in thresholds
    ]
    return LLM(model, max_num_seqs=4, kernels=kernels).generate([prompt(p) for p in prompts], params)


def slots_of(output: RequestOutput) -> list[int]:
    assert output.pairs is not None
    slots = pair_slots_from_tokens(output.prompt_token_ids, PAD)
    for pair in output.pairs[:-1]:
        slots += [pair.token1, pair.draft if pair.committed and pair.draft is not None else PAD]
    last = output.pairs[-1]
    return [*slots, last.token1, PAD]


def check_against_forward(model: PipoForCausalLM, output: RequestOutput, threshold: float) -> int:
    """Every token 1, draft and decision is what one full forward over the finished text says. Returns decisions checked."""
    assert output.pairs is not None
    slots = torch.tensor([slots_of(output)])
    with torch.no_grad():
        full = model(slots, return_logits=True)
    start, checked = (len(output.prompt_token_ids) + 1) // 2 - 1, 0
    for step, record in enumerate(output.pairs):
        for logits, token in (
            (full.logits[0, start + step], record.token1),
            (full.mtp_logits[0, start + step], record.draft),
        ):
            best, second = logits.topk(2).values.tolist()
            if best - second > MARGIN:
                assert int(logits.argmax()) == token, f"step {step}"
                checked += 1
        confidence = float(torch.sigmoid(full.confidence_logits[0, start + step]))
        assert record.confidence == pytest.approx(confidence, abs=5e-5)
        cut_off = step == len(output.pairs) - 1
        if abs(confidence - threshold) > MARGIN and not cut_off:
            assert record.committed == accept(confidence, threshold)
    return checked


def _between_confidences(outputs: list[RequestOutput], quantile: float) -> float:
    """A threshold near a quantile of the confidences shown, in the widest gap there: decisions have a margin."""
    shown = sorted(r.confidence for o in outputs for r in o.pairs or [] if r.confidence is not None)
    near = int(quantile * (len(shown) - 1))
    low = max(range(max(0, near - 5), min(len(shown) - 1, near + 5)), key=lambda i: shown[i + 1] - shown[i])
    return (shown[low] + shown[low + 1]) / 2


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_the_teacher_forced_forward(family: str, kernels: str) -> None:
    model = pipo_model(family, compressor="linear" if family == "llama" else "mlp")
    probe = generate(model, PROMPTS, [0.0] * len(PROMPTS), kernels=kernels)
    quantiles = [_between_confidences(probe, q) for q in (0.2, 0.5, 0.8)]
    for threshold in (0.0, *quantiles, 1.01):
        outputs = generate(model, PROMPTS, [threshold] * len(PROMPTS), kernels=kernels)
        checked = sum(check_against_forward(model, output, threshold) for output in outputs)
        assert checked > 100
    mixed = [0.0, *quantiles, 1.01]
    together = generate(model, PROMPTS, mixed, kernels=kernels)
    for ids, threshold, output in zip(PROMPTS, mixed, together, strict=True):
        alone = generate(model, [ids], [threshold], kernels=kernels)[0]
        check_against_forward(model, output, threshold)
        assert alone.token_ids == output.token_ids


@pytest.mark.parametrize("family", ["qwen3_5", "gemma2"])
def test_a_prompt_of_thousands_of_tokens(family: str) -> None:
    model = pipo_model(family)
    ids = [3 + (i * i + 5 * i) % (VOCAB - 3) for i in range(3001)]
    output = generate(model, [ids], [0.0], n=12)[0]
    assert check_against_forward(model, output, 0.0) > 10


def test_rows_of_other_requests_never_show() -> None:
    """Fails when a freed row's stale keys, or a padded row's garbage, can be seen by the request that reuses it."""
    model = pipo_model("qwen3")
    llm = LLM(model, max_num_seqs=2)
    params = SamplingParams(temperature=0, threshold=0.0, max_tokens=9, ignore_eos=True)
    fresh = {i: LLM(model).generate(prompt(p), params)[0].token_ids for i, p in enumerate(PROMPTS)}
    reused = llm.generate([prompt(p) for p in [*PROMPTS, *reversed(PROMPTS)]], params)
    for i, output in enumerate(reused):
        assert output.token_ids == fresh[i if i < len(PROMPTS) else 2 * len(PROMPTS) - 1 - i]
