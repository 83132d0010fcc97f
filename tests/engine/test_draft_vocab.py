"""Drafts from a part of the vocabulary: no limit where the part is all, nothing else drafted where it is not, lossless speculation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from families import EOS, VOCAB, base_model, pipo_model
from pipo import LLM, SamplingParams
from pipo.engine.request import RequestOutput
from pipo.errors import CheckpointError, ConfigError
from pipo.model.draft_vocab import DRAFT_VOCAB, NO_DRAFT, DraftIds, DraftVocab, read_draft_ids, write_draft_ids
from pipo.model.rows import DraftPart, Rows
from pipo.model.sampling import SamplingBatch

PROMPTS = [[7], [5, 9, 40], list(range(3, 40))]
EVERYTHING = tuple(range(VOCAB))
SOME = tuple(range(1, VOCAB, 3))


def mixed(**changes: Any) -> list[SamplingParams]:
    """Every parameter that touches logits, in one batch."""
    common: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "threshold": 0.0, **changes}
    return [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=0.8, top_k=30, top_p=0.9, seed=3, presence_penalty=0.7, logprobs=2, **common),
        SamplingParams(
            top_p=0.8, seed=5, logit_bias={4: 3.0, 6: 3.0}, min_tokens=9, stop_token_ids=[4, 6, 7], **common
        ),
    ]


def generate(model: Any, vocab: Any, params: list[SamplingParams], method: str = "pipo") -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    return LLM(model, method=method, draft_vocab=vocab).generate(prompts, params)


@pytest.mark.parametrize("method", ["pipo", "mtp", "speculative"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_whole_vocabulary_is_no_limit(family: str, method: str) -> None:
    """Breaks when places and ids are mixed up anywhere: draw, penalties, biases, suppressed stops, log-probabilities."""
    model = pipo_model(family) if method == "pipo" else base_model(family)
    records = method == "pipo"
    full = generate(model, None, mixed(record_pairs=records), method)
    for vocab in (VOCAB, DraftIds(EVERYTHING, VOCAB), list(EVERYTHING)):
        for got, wanted in zip(generate(model, vocab, mixed(record_pairs=records), method), full, strict=True):
            assert (got.token_ids, got.logprobs, got.pairs) == (wanted.token_ids, wanted.logprobs, wanted.pairs)


@pytest.mark.parametrize("gate", ["hidden", "draft"])
def test_nothing_else_is_drafted(gate: str) -> None:
    """And what is drafted is what the full second head would draw with all other ids forbidden. Token 1 is anything."""
    model = pipo_model("qwen3", gate=gate)
    outputs = generate(model, SOME, mixed(record_pairs=True))
    pairs = [pair for output in outputs for pair in output.pairs or ()]
    assert {pair.draft for pair in pairs} <= set(SOME)
    assert {pair.token1 for pair in pairs} - set(SOME)
    greedy = outputs[0].pairs or []
    ids = [*PROMPTS[0], 0] + [token for pair in greedy for token in (pair.token1, pair.draft)]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), return_logits=True).mtp_logits[0, :, list(SOME)]
    assert [pair.draft for pair in greedy] == [SOME[i] for i in logits.argmax(-1).tolist()]
    log_probs = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor([p.logprob2 for p in greedy]), log_probs, atol=1e-4, rtol=0)


def test_alternatives_are_ids() -> None:
    """Breaks when places of the draft vocabulary, or the row for elsewhere, are given out as tokens."""
    model = pipo_model("qwen3")
    ids = DraftIds(SOME, VOCAB, (0.05,) * 65)
    outputs = generate(
        model, ids, [SamplingParams(threshold=0, max_tokens=12, logprobs=5, ignore_eos=True, seed=1)] * 3
    )
    for output in outputs:
        assert output.logprobs is not None
        assert all(0 <= token < VOCAB for one in output.logprobs for token, _ in one.top)
        assert len(output.logprobs) == len(output.token_ids)


def test_a_draw_that_falls_elsewhere_is_no_draft() -> None:
    """A row for elsewhere that always wins leaves token 1 alone, at every threshold; and the text is that of a gate that never commits."""
    model = pipo_model("qwen3")
    with torch.no_grad():  # the same state for every pair, so that one row can win everywhere
        model.mtp.norm.weight.zero_()
        model.mtp.norm.register_parameter("bias", None)
        model.mtp.norm.forward = lambda hidden: torch.ones_like(hidden)  # type: ignore[method-assign]
    ids = DraftIds(SOME, VOCAB, (10.0,) * 65)
    params = [SamplingParams(temperature=0, threshold=0, max_tokens=8, ignore_eos=True, record_pairs=True)] * 3
    never = [SamplingParams(temperature=0, threshold=1.5, max_tokens=8, ignore_eos=True)] * 3
    for got, wanted in zip(generate(model, ids, params), generate(model, None, never), strict=True):
        assert got.token_ids == wanted.token_ids
        assert (got.num_committed, got.num_rejected) == (0, 7)  # the last is cut off
        assert [pair.draft for pair in got.pairs or ()] == [None] * 8


def test_elsewhere_is_drawn_as_often_as_it_is_likely() -> None:
    """With the exact row, drafts are those that the whole head would draw, and what it draws outside is no draft: chi-square."""
    model, num = pipo_model("qwen3").requires_grad_(False), 4000
    hidden_H = torch.randn(64, generator=torch.Generator().manual_seed(3))
    logits_V = model.sampling_logits(hidden_H[None])[0] * 0.2
    outside = sorted(set(EVERYTHING) - set(SOME))
    row_H = hidden_H * (logits_V[outside].logsumexp(0) - 1.5) / hidden_H.square().sum()
    model.lm_head.weight.mul_(0.2)
    vocab = DraftVocab(model, DraftIds(SOME, VOCAB, (*row_H.tolist(), 1.5)), with_elsewhere=True)
    params, seeds = [SamplingParams(threshold=0.0)] * num, range(num)
    batch = SamplingBatch.build(params, seeds, VOCAB, "cpu")
    part = DraftPart(vocab, SamplingBatch.build(params, seeds, vocab.num_places, "cpu", place_of=vocab.place_of))
    zeros_B = torch.zeros(num, dtype=torch.int64)
    rows = Rows(batch, None, zeros_B, None, part=part)
    drawn = rows.draw_draft(rows.draft_logits(model, hidden_H.expand(num, -1)), zeros_B)
    wanted_V = num * logits_V.softmax(0)
    wanted = torch.cat([wanted_V[list(SOME)], wanted_V[outside].sum()[None]])
    found = torch.stack([(drawn.token_B == token).sum() for token in (*SOME, NO_DRAFT)])
    assert found.sum() == num
    assert float(((found - wanted).square() / wanted).sum()) < len(wanted) + 5 * (2 * len(wanted)) ** 0.5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_greedy_speculation_is_still_lossless(family: str) -> None:
    """Breaks when the draft's distribution has mass where no draft can come from, or a row for elsewhere is drafted."""
    model = base_model(family)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    settings = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logit_bias=dict.fromkeys(range(9, 15), 20.0))
    ] * 3
    regular = generate(model, None, settings, "regular")
    ids = DraftIds((3, 10, 11, 12, 40), VOCAB, (0.1,) * 65)
    found = generate(model, ids, settings, "speculative")
    assert [o.token_ids for o in found] == [o.token_ids for o in regular]
    assert sum(o.num_committed for o in found) > 0
    assert sum(o.num_rejected for o in found) > 0


def test_speculation_samples_from_the_base_model() -> None:
    """Total variation of two tokens between regular decoding and speculation with drafts from a part of the vocabulary."""
    model = base_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    bias = {10: 6.0, 11: 6.2, 12: 6.4, 13: 6.6, 14: 6.8}
    num = 1500
    settings = SamplingParams(n=num, top_k=5, logit_bias=bias, max_tokens=3, ignore_eos=True)
    tables: list[dict[tuple[int, ...], int]] = []
    for method, seed in (("regular", 1), ("speculative", 2)):
        llm = LLM(model, method=method, max_num_seqs=num, seed=seed, draft_vocab=[10, 12, 14, 50])
        table: dict[tuple[int, ...], int] = {}
        for output in llm.generate({"prompt_token_ids": [5, 9, 40]}, settings):
            table[tuple(output.token_ids)] = table.get(tuple(output.token_ids), 0) + 1
        tables.append(table)
    cells = [(tables[0].get(key, 0), tables[1].get(key, 0)) for key in tables[0].keys() | tables[1].keys()]
    cells = [(a, b) for a, b in cells if a + b >= 10]
    assert len(cells) > 10
    assert sum((a - b) ** 2 / (a + b) for a, b in cells) < len(cells) + 5 * (2 * len(cells)) ** 0.5


def test_a_grammar_holds_elsewhere_too() -> None:
    """Breaks when masks of the whole vocabulary meet logits of a part."""
    vocab = DraftVocab(pipo_model("qwen3"), DraftIds((2, 5, 9), VOCAB, (0.0,) * 65), with_elsewhere=True)
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[5]] = True
    assert vocab.allowed(allowed).tolist() == [False, True, False, False]
    allowed[[100]] = True
    assert vocab.allowed(allowed).tolist() == [False, True, False, True]


@pytest.mark.parametrize("vocab", [20, SOME], ids=["view", "copy"])
def test_rows_follow_the_weights(vocab: Any) -> None:
    """Breaks when a copy of the head's rows outlives the weights it was made of."""
    model = pipo_model("qwen3")
    llm = LLM(model, draft_vocab=vocab)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    before = [o.token_ids for o in llm.generate(prompts, mixed())]
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())
    llm.forget()
    after = [o.token_ids for o in llm.generate(prompts, mixed())]
    assert after == [o.token_ids for o in generate(model, vocab, mixed())]
    assert after != before


def test_the_checkpoint_file_is_used(tmp_path: Any) -> None:
    model = pipo_model("qwen3")
    model.save_pretrained(tmp_path)
    ids = DraftIds(SOME, VOCAB, tuple([0.01] * 65), {"data": ["rows.jsonl"]})
    write_draft_ids(tmp_path / DRAFT_VOCAB, ids)
    assert read_draft_ids(tmp_path / DRAFT_VOCAB) == ids
    params = [SamplingParams(threshold=0, max_tokens=24, ignore_eos=True, seed=4, record_pairs=True)] * 3

    def drafts(**options: Any) -> set[int | None]:
        llm = LLM(tmp_path, **options)
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params)
        return {pair.draft for output in outputs for pair in output.pairs or ()}

    assert drafts() <= {*SOME, None}
    assert drafts(draft_vocab=tmp_path) == drafts(draft_vocab=tmp_path / DRAFT_VOCAB) == drafts()
    assert drafts(draft_vocab=None) - {*SOME, None}
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="no file on this machine"):
        LLM(tmp_path, draft_vocab=tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as JSON"),
        ('{"ids": [1, 2]}', "has no 'vocab_size'"),
        ('{"ids": [2, 1], "vocab_size": 160}', "ascend"),
        ('{"ids": [1, 1], "vocab_size": 160}', "ascend"),
        ('{"ids": [], "vocab_size": 160}', "one id at least"),
        ('{"ids": [1, 160], "vocab_size": 160}', "0 … 159"),
        ('{"ids": [1.5], "vocab_size": 160}', "list of token ids"),
        ('{"ids": [1, 2], "vocab_size": 151936}', "151936 ids, and this model has 160"),
        ('{"ids": [1, 2], "vocab_size": 160, "elsewhere": [1, 2]}', "width 1"),
        ('{"ids": [1, 2], "vocab_size": 160, "elsewhere": ["a"]}', "no draft vocabulary"),
        ('{"ids": [1, 2], "vocab_size": 160, "elsewhere": [NaN]}', "finite"),
    ],
)
def test_wrong_files_are_refused(content: str, message: str, tmp_path: Any) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        LLM(pipo_model("qwen3"), draft_vocab=path)


@pytest.mark.parametrize("vocab", [0, -3, VOCAB + 1, [], [5, 5], [EOS, VOCAB]])
def test_wrong_ids_are_refused(vocab: Any) -> None:
    with pytest.raises(ConfigError, match="draft vocabulary"):
        LLM(pipo_model("qwen3"), draft_vocab=vocab)
