"""The engine against the executable specification where tokens are sampled: every parameter, mixed in one batch."""

import random
from pathlib import Path

import pytest
import torch

from pipo import LLM, PipoForCausalLM, SamplingParams, reference
from pipo.model.sampling import SamplingBatch, TokenHistory, process_logits, sample

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"


def random_request(rng, index):
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 5, 20]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.02]),
        presence_penalty=rng.choice([0.0, 1.5]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias=rng.choice([None, {7: 5.0, 300: 2.0}]),
        seed=rng.randrange(10**6),
        max_tokens=rng.choice([1, 5, 24]),
        min_tokens=rng.choice([0, 1]),
        stop_token_ids=[rng.randrange(300) for _ in range(25)],
        ignore_eos=True,
        logprobs=rng.choice([None, 2]),
        threshold=rng.choice([0.0, 0.2, 0.7, 1.0, 1.5]),
        record_pairs=bool(index % 2),
    )
    return [rng.randrange(300) for _ in range(rng.randint(1, 30))], params


def specified(model, prompt, params):
    """What full recomputation gives with the request alone in its batch, its history counted anew for every token; and the
    log-probability with which each token was drawn, by step and slot."""
    drawn = {}

    def pick(logits_V, tokens, step, slot):
        batch = SamplingBatch.build([params], [params.seed], len(logits_V), "cpu", [set(params.stop_token_ids)])
        history = TokenHistory(batch, [prompt], [tokens])
        processed_1V = process_logits(logits_V[None], batch, history, torch.tensor([len(tokens)]))
        token = int(sample(processed_1V, batch, step, slot))
        drawn[step, slot] = 0.0 if params.greedy else float(processed_1V.log_softmax(-1)[0, token])
        return token

    generation = reference.generate(
        model,
        prompt,
        max_tokens=params.max_tokens,
        threshold=params.threshold,
        stop_ids=params.stop_token_ids,
        pick=pick,
    )
    return generation, drawn


@pytest.mark.parametrize("name", ["tiny-mlp-tied", "tiny-linear-untied"])
def test_sampled_requests_get_what_full_recomputation_gives_them(name):
    """Rows that share seeds, histories or counts, a penalised filler, or a draw that depends on the batch would show."""
    model = PipoForCausalLM.from_pretrained(GOLDEN / name).eval()
    rng = random.Random(0)
    requests = [random_request(rng, index) for index in range(16)]
    llm = LLM(model, device="cpu", max_num_seqs=4)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in requests], [p for _, p in requests])
    for (prompt, params), output in zip(requests, outputs, strict=True):
        expected, drawn = specified(model, prompt, params)
        assert output.token_ids == expected.token_ids
        assert output.finish_reason == expected.finish_reason
        assert (output.num_pairs, output.num_committed) == (len(expected.pairs), expected.num_committed)
        if params.logprobs is not None:
            assert [entry.token_id for entry in output.logprobs] == output.token_ids
        if params.record_pairs:
            found = [(pair.token1, pair.committed) for pair in output.pairs]
            assert found == [(pair.token1, pair.committed) for pair in expected.pairs]
            assert [pair.drawn_logprob1 for pair in output.pairs] == pytest.approx(
                [drawn[step, 0] for step in range(len(expected.pairs))], abs=1e-4
            )
            if params.threshold <= 1:
                assert [pair.draft for pair in output.pairs] == [pair.draft for pair in expected.pairs]
                assert [pair.drawn_logprob2 for pair in output.pairs] == pytest.approx(
                    [drawn[step, 1] for step in range(len(expected.pairs))], abs=1e-4
                )
