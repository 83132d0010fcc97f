"""The engine: requests of all kinds join and leave at any step, and each gets what it would get alone."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from families import EOS, PAD, base_model, config_of, pipo_model
from pipo import LLM, PipoConfig, PipoForCausalLM, RequestOutput, SamplingParams
from pipo.errors import CheckpointError, ConfigError, RequestError
from pipo.model.cache import RowCache

FREE = SamplingParams(temperature=0, threshold=0.0, max_tokens=16, ignore_eos=True)


def params(**changes: Any) -> SamplingParams:
    return dataclasses.replace(FREE, **changes)


def prompt(*ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(ids)}


def visible(output: RequestOutput) -> dict[str, Any]:
    """What a result says, but for its timing."""
    return {k: v for k, v in dataclasses.asdict(output).items() if k not in ("ttft_s", "tpot_s")}


@pytest.fixture(scope="module")
def model() -> PipoForCausalLM:
    return pipo_model("qwen3_5")


@pytest.fixture(scope="module")
def text_llm() -> LLM:
    """A random model over bytes, whose texts are noise but exact."""
    tokenizer = byte_tokenizer()
    config = config_of("qwen3")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(3)
    model = PipoForCausalLM(PipoConfig(config))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return LLM(model.eval(), tokenizer=tokenizer, seed=0)


def mixed_requests() -> list[tuple[dict[str, list[int]], SamplingParams]]:
    settings: list[dict[str, Any]] = [
        {},
        {"threshold": 1.01},
        {"threshold": 0.5, "temperature": 1.0, "seed": 1, "top_k": 20},
        {"temperature": 0.8, "seed": 2, "top_p": 0.9, "presence_penalty": 1.5, "threshold": 0.4},
        {"temperature": 1.0, "seed": 3, "min_p": 0.1, "repetition_penalty": 1.3, "max_tokens": 3},
        {"logprobs": 3, "record_pairs": True, "threshold": 0.5},
        {"logit_bias": {5: 8.0}, "min_tokens": 4, "ignore_eos": False, "temperature": 1.0, "seed": 4},
        {"temperature": 1.2, "seed": 5, "frequency_penalty": 0.7, "threshold": 1.01, "record_pairs": True},
    ]
    return [(prompt(*range(5, 6 + 3 * i)), params(**{"max_tokens": 6 + 3 * i, **s})) for i, s in enumerate(settings)]


# --- continuous batching ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_mixed_requests_get_what_they_get_alone(model: PipoForCausalLM, max_num_seqs: int) -> None:
    requests = mixed_requests()
    alone = [LLM(model).generate(p, s)[0] for p, s in requests]
    together = LLM(model, max_num_seqs=max_num_seqs).generate([p for p, _ in requests], [s for _, s in requests])
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.num_pairs, one.num_committed, one.num_rejected) == (
            other.num_pairs,
            other.num_committed,
            other.num_rejected,
        )


def test_requests_that_join_mid_decode_cost_the_longest_not_the_sum(model: PipoForCausalLM) -> None:
    llm = LLM(model)
    calls = []
    hook = model.model.register_forward_pre_hook(lambda *a: calls.append(1))
    done: list[Any] = []

    def listen(sequence: Any, step: Any) -> None:
        if sequence.finished:
            done.append(sequence)

    try:
        for number in range(8):
            llm.engine.add(llm.prepare(prompt(9, number + 3), params(max_tokens=40)), listen)
            llm.engine.step()
            llm.engine.step()
        while llm.engine.has_work:
            llm.engine.step()
    finally:
        hook.remove()
    assert len(done) == 8
    # 20 steps each, of which one is its prefill; they start 2 steps apart and run side by side.
    assert len(calls) <= 8 + 20 + 8


def test_a_preempted_request_goes_on_exactly(model: PipoForCausalLM) -> None:
    """Where memory runs out mid-decode, rows are sent back to the queue, and nobody's tokens change."""
    requests = [
        (prompt(*range(3, 40 + i)), params(max_tokens=60, temperature=1.0, seed=i, threshold=0.5, presence_penalty=1.0))
        for i in range(4)
    ]
    free = LLM(model).generate([p for p, _ in requests], [s for _, s in requests])
    roomy = LLM(model).engine.budget
    tight = LLM(model, cache_budget_bytes=2 * (roomy.row_bytes + 60 * roomy.position_bytes))
    preempted: list[int] = []
    leave = tight.engine._leave
    tight.engine._leave = lambda row: (preempted.append(row), leave(row))[1]  # type: ignore[method-assign, func-returns-value]
    outputs = tight.generate([p for p, _ in requests], [s for _, s in requests])
    assert len(preempted) > len(requests)  # more departures than ends
    for one, other in zip(free, outputs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.num_pairs == other.num_pairs


def test_memory_follows_what_is_used(model: PipoForCausalLM) -> None:
    llm = LLM(model)
    cache = llm.engine.runner.cache
    llm.generate([prompt(5, 6, 7)] * 4, params(max_tokens=4))
    assert cache.num_bytes() == 0
    held: list[int] = []
    for _ in llm.stream(prompt(*range(3, 103)), params(max_tokens=8)):
        held.append(cache.num_bytes())
    assert 0 < max(held) < 4 * (llm.engine.budget.row_bytes + 128 * llm.engine.budget.position_bytes)


def test_rows_move_and_grow_unharmed(model: PipoForCausalLM) -> None:
    """Growing, shrinking and swapping rows keeps every entry."""
    cache = RowCache(config_of("qwen3"), torch.device("cpu"))
    from transformers.cache_utils import Cache, DynamicLayer

    def prefilled(length: int, mark: float) -> Cache:
        layers = [DynamicLayer() for _ in range(5)]
        for layer in layers:
            layer.update(torch.full((1, 2, length, 4), mark), torch.full((1, 2, length, 4), -mark))
        return Cache(layers=layers)

    for mark, length in ((1.0, 3), (2.0, 70), (3.0, 200)):
        cache.adopt(prefilled(length, mark), [length])
    cache.remove(0)
    assert cache.lengths == [200, 70]
    keys = cache.layers[0].keys
    assert keys[0, :, :200].eq(3).all()
    assert keys[1, :, :70].eq(2).all()
    assert keys[1, :, 70:].eq(0).all()
    cache.remove(0)
    cache.remove(0)
    assert cache.num_bytes() == 0


# --- stopping and counting ----------------------------------------------------------------------------


def test_a_stop_token_in_first_place_discards_the_draft(model: PipoForCausalLM) -> None:
    free = LLM(model).generate(prompt(5, 6), params(record_pairs=True))[0]
    assert free.pairs is not None
    first = free.pairs[3].token1
    assert first not in free.token_ids[:6]
    cut = LLM(model).generate(prompt(5, 6), params(stop_token_ids=[first]))[0]
    assert cut.token_ids == free.token_ids[:7]
    assert (cut.finish_reason, cut.num_pairs, cut.num_committed, cut.num_rejected) == ("stop", 4, 3, 0)


def test_a_stop_token_as_draft_is_committed_and_stops(model: PipoForCausalLM) -> None:
    free = LLM(model).generate(prompt(5, 6), params())[0]
    second = free.token_ids[7]
    assert second not in free.token_ids[:7]
    cut = LLM(model).generate(prompt(5, 6), params(stop_token_ids=[second]))[0]
    assert cut.token_ids == free.token_ids[:8]
    assert (cut.finish_reason, cut.num_pairs, cut.num_committed) == ("stop", 4, 4)


def test_end_of_text_as_very_first_token_stops(model: PipoForCausalLM) -> None:
    output = LLM(model).generate(prompt(5, 6), params(ignore_eos=False, logit_bias={EOS: 100.0}))[0]
    assert output.token_ids == [EOS]
    assert (output.finish_reason, output.num_pairs, output.num_committed) == ("stop", 1, 0)
    assert output.tpot_s is None


def test_min_tokens_holds_the_end_back_for_both_tokens(model: PipoForCausalLM) -> None:
    for minimum in (1, 4, 5):
        output = LLM(model).generate(
            prompt(5, 6), params(ignore_eos=False, logit_bias={EOS: 100.0}, min_tokens=minimum)
        )[0]
        assert len(output.token_ids) == minimum + 1
        assert output.token_ids.index(EOS) == minimum


@pytest.mark.parametrize("limit", [1, 2, 7, 8])
def test_max_tokens_counts_visible_tokens(model: PipoForCausalLM, limit: int) -> None:
    output = LLM(model).generate(prompt(5, 6), params(max_tokens=limit))[0]
    assert len(output.token_ids) == limit
    assert output.finish_reason == "length"
    assert output.num_pairs == (limit + 1) // 2
    assert output.num_committed == limit // 2  # a draft that max_tokens cuts off is not committed


@pytest.mark.parametrize("threshold", [0.0, 1.01])
def test_max_pairs_counts_pairs_whatever_the_gate_says(model: PipoForCausalLM, threshold: float) -> None:
    output = LLM(model).generate(prompt(5, 6), params(max_tokens=40, max_pairs=3, threshold=threshold))[0]
    assert (output.num_pairs, output.finish_reason) == (3, "length")
    assert output.num_tokens == (6 if threshold == 0.0 else 3)
    assert output.num_rejected == 0


def test_a_sampled_pad_id_is_text(model: PipoForCausalLM) -> None:
    """PAD as filler is a flag; PAD as a token is counted, penalised and shown."""
    output = LLM(model).generate(prompt(5, 6), params(logit_bias={PAD: 100.0}, max_tokens=6))[0]
    assert output.token_ids == [PAD] * 6
    assert output.num_committed == 3
    never = LLM(model).generate(prompt(5, 6), params(threshold=1.01, max_tokens=6))[0]
    assert PAD not in never.token_ids
    assert (never.num_pairs, never.num_committed) == (6, 0)
    # As the filler is no token, the strongest penalty on used tokens can't touch PAD.
    biased = params(threshold=1.01, max_tokens=2, logit_bias={PAD: 4.0}, presence_penalty=2.0)
    records = LLM(model).generate(prompt(5, 6), dataclasses.replace(biased, logprobs=1))[0]
    assert records.logprobs is not None


def test_the_context_counts_pairs(model: PipoForCausalLM) -> None:
    llm = LLM(model, max_model_len=10)
    full = llm.generate(prompt(*range(3, 10)), params(max_tokens=None))[0]  # 7 tokens: 4 pairs
    assert (full.finish_reason, full.num_pairs, len(full.token_ids)) == ("length", 6, 12)
    never = llm.generate(prompt(*range(3, 10)), params(max_tokens=None, threshold=1.01))[0]
    assert (never.num_pairs, len(never.token_ids)) == (6, 6)
    last = llm.generate(prompt(*range(3, 21)), params(max_tokens=None))[0]  # 18 tokens: 9 pairs
    assert last.num_pairs == 1
    with pytest.raises(RequestError, match="leaves no room"):
        llm.generate(prompt(*range(3, 22)), params())


# --- text ---------------------------------------------------------------------------------------------


def test_stop_strings_cut_exactly_inside_and_across_pairs(text_llm: LLM) -> None:
    free = text_llm.generate("Hello", params(max_tokens=24))[0]
    assert len(free.text) > 8
    for start in range(1, 6):
        for length in (1, 2, 3):
            stop = free.text[start : start + length]
            cut = text_llm.generate("Hello", params(max_tokens=24, stop=stop))[0]
            assert cut.text == free.text[: free.text.index(stop)]
            assert cut.finish_reason == "stop"
            assert cut.token_ids == free.token_ids[: len(cut.token_ids)]


def test_a_stream_adds_up_and_has_one_event_per_step(text_llm: LLM) -> None:
    whole = text_llm.generate("Hello", params(max_tokens=15, record_pairs=True, logprobs=2))[0]
    events = list(text_llm.stream("Hello", params(max_tokens=15, record_pairs=True, logprobs=2)))
    assert "".join(e.text for e in events) == whole.text
    assert [t for e in events for t in e.token_ids] == whole.token_ids
    assert [e.pair for e in events] == whole.pairs
    assert len(events) == whole.num_pairs
    assert visible(events[-1].output) == visible(whole)
    assert events[2].output.num_pairs == 3  # a snapshot: later steps leave it alone
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]


def test_closing_a_stream_frees_its_row(text_llm: LLM) -> None:
    stream = text_llm.stream("Hello", params(max_tokens=1000))
    next(stream)
    assert text_llm.engine.has_work
    stream.close()
    assert not text_llm.engine.has_work
    assert text_llm.engine.runner.cache.num_rows == 0


def test_asyncio_callers_decode_together(text_llm: LLM) -> None:
    async def run() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(text_llm.agenerate(f"Hi {i}", params(max_tokens=12)) for i in range(6)))

    together = asyncio.run(run())
    for i, (output,) in enumerate(together):
        assert visible(output) == visible(text_llm.generate(f"Hi {i}", params(max_tokens=12))[0])


def test_a_cancelled_asyncio_caller_frees_its_row(text_llm: LLM) -> None:
    async def run() -> None:
        async for _ in text_llm.astream("Hello", params(max_tokens=4000)):
            break

    asyncio.run(run())
    for _ in range(200):
        if not text_llm.engine.has_work:
            return
        import time

        time.sleep(0.01)
    pytest.fail("the row is still running")


def test_chats_go_through_the_template(text_llm: LLM) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    output = text_llm.generate(chat, params(max_tokens=2))[0]
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    two = text_llm.generate([chat, chat], params(max_tokens=2))
    assert [o.prompt for o in two] == [output.prompt] * 2


# --- samples, seeds, log-probabilities ----------------------------------------------------------------


def test_samples_differ_and_repeat_with_their_seed(model: PipoForCausalLM) -> None:
    settings = params(n=4, temperature=1.0, seed=7, threshold=0.5)
    first, again = (LLM(model).generate([prompt(5, 6), prompt(7)], settings) for _ in range(2))
    assert [visible(o) for o in first] == [visible(o) for o in again]
    assert [o.index for o in first] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in first[:4]}) == 4
    single = LLM(model).generate(prompt(5, 6), params(temperature=1.0, seed=7, threshold=0.5))[0]
    assert single.token_ids == first[0].token_ids


def test_token_1_and_token_2_draw_apart() -> None:
    """With both heads uniform, a shared draw would repeat token 1 as token 2."""
    model = pipo_model("qwen3")
    model.lm_head.weight.data.zero_()
    output = LLM(model).generate(prompt(5), params(temperature=1.0, seed=1, max_tokens=400))[0]
    same = sum(a == b for a, b in zip(output.token_ids[::2], output.token_ids[1::2], strict=True))
    assert same < 12  # 200 pairs, 160 ids: 1.25 expected


def test_logprobs_are_the_models_own(model: PipoForCausalLM) -> None:
    settings = params(logprobs=3, temperature=0.7, seed=1, presence_penalty=1.0, threshold=0.0, max_tokens=9)
    output = LLM(model).generate(prompt(5, 6), settings)[0]
    assert output.logprobs is not None
    slots = torch.tensor([[5, 6, *output.token_ids, 3]])
    with torch.no_grad():
        full = model(slots, return_logits=True)
    for i, entry in enumerate(output.logprobs):
        logits = (full.logits if i % 2 == 0 else full.mtp_logits)[0, i // 2]
        expected = logits.float().log_softmax(-1)
        assert entry.token_id == output.token_ids[i]
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
        assert [t for t, _ in entry.top] == expected.topk(3).indices.tolist()


# --- the second head ----------------------------------------------------------------------------------


def test_rejected_drafts_cost_no_second_head(model: PipoForCausalLM) -> None:
    rows: list[int] = []
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    mtp: list[int] = []
    mtp_hook = model.mtp.register_forward_pre_hook(lambda *a: mtp.append(1))
    try:
        LLM(model).generate(prompt(5, 6), params(max_tokens=4, threshold=0.0))
        assert (len(rows), len(mtp)) == (4, 1 + 2)  # measuring the cache runs the MTP block once
        rows.clear(), mtp.clear()
        LLM(model).generate(prompt(5, 6), params(max_tokens=4, threshold=1.0))
        assert (len(rows), len(mtp)) == (4, 1 + 4)  # MTP runs, its head does not
        rows.clear(), mtp.clear()
        LLM(model).generate(prompt(5, 6), params(max_tokens=4, threshold=1.01))
        assert (len(rows), len(mtp)) == (4, 1)  # never committed: no MTP at all
        rows.clear(), mtp.clear()
        LLM(model).generate(prompt(5, 6), params(max_tokens=4, threshold=1.01, record_pairs=True))
        assert (len(rows), len(mtp)) == (8, 1 + 4)
    finally:
        hook.remove()
        mtp_hook.remove()


def test_records_keep_the_rejected_draft(model: PipoForCausalLM) -> None:
    output = LLM(model).generate(prompt(5, 6), params(threshold=1.01, record_pairs=True, max_tokens=5))[0]
    assert output.pairs is not None
    assert len(output.pairs) == 5
    for record in output.pairs:
        assert not record.committed
        assert record.draft is not None
        assert record.confidence is not None
        assert record.logprob1 is not None
        assert record.logprob2 is not None


@pytest.mark.parametrize("method", ["pipo", "regular", "mtp", "speculative"])
def test_a_sample_whose_numbers_break_ends_alone(method: str) -> None:
    """One token's embedding is NaN: who reads it ends with an error, the others never notice."""
    model: Any = pipo_model("qwen3_5") if method == "pipo" else base_model("qwen3_5")
    settings = params(max_tokens=8, temperature=1.0, seed=1)
    healthy = LLM(model, method=method).generate([prompt(5, 6), prompt(9)], settings)
    with torch.no_grad():
        model.model.embed_tokens.weight[150] = torch.nan
    llm = LLM(model, method=method)
    first, broken, last = llm.generate([prompt(5, 6), prompt(7, 150), prompt(9)], settings)
    assert (broken.finish_reason, broken.token_ids) == ("error", [])
    assert 150 not in healthy[0].token_ids + healthy[1].token_ids
    assert [first.token_ids, last.token_ids] == [h.token_ids for h in healthy]
    again = llm.generate([prompt(5, 6)] * 3, settings)[2]
    assert again.token_ids == healthy[0].token_ids


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [5, 160]}, "160"),
        ({"prompt_token_ids": [5, -1]}, "-1"),
        ({"ids": [5]}, "prompt_token_ids"),
        ("text", "no tokenizer"),
        ([{"role": "user", "content": "Hi"}], "chat template"),
    ],
)
def test_bad_prompts_are_refused_and_nothing_runs(model: PipoForCausalLM, bad: Any, message: str) -> None:
    llm = LLM(model)
    with pytest.raises(RequestError, match=message):
        llm.generate([prompt(5), bad], params())
    assert not llm.engine.has_work


def test_bad_settings_are_refused(model: PipoForCausalLM) -> None:
    with pytest.raises(ConfigError, match="method"):
        LLM(model, method="eagle")
    with pytest.raises(ConfigError, match="max_num_seqs"):
        LLM(model, max_num_seqs=0)
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(model, max_model_len=10**9)
    with pytest.raises(ConfigError, match="hold no request"):
        LLM(model, cache_budget_bytes=100)
    with pytest.raises(ConfigError, match="does not run"):
        LLM(model, method="regular")
    with pytest.raises(CheckpointError, match="not a folder"):
        LLM("/nowhere/at/all")
    with pytest.raises(RequestError, match="2 prompts"):
        LLM(model).generate([prompt(5), prompt(6)], [params()])
    with pytest.raises(RequestError, match="stop strings"):
        LLM(model).generate(prompt(5), params(stop="x"))


def test_weights_are_shared_not_copied(model: PipoForCausalLM) -> None:
    llm = LLM(model)
    assert llm.model is model
    before = llm.generate(prompt(5, 6), params())[0].token_ids
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight.mul_(-1)
    try:
        assert llm.generate(prompt(5, 6), params())[0].token_ids != before
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)
    assert model.lm_head.weight.requires_grad


def test_bfloat16_runs_and_is_deterministic() -> None:
    model = pipo_model("qwen3_5").to(torch.bfloat16)
    first, again = (LLM(model).generate(prompt(5, 6), params(threshold=0.5))[0] for _ in range(2))
    assert visible(first) == visible(again)
    assert len(first.token_ids) == 16
