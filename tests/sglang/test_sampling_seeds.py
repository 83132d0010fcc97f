"""Seeded requests: each slot of a text has a draw of its own, and a request's draws do not hang on its neighbours."""

from collections import Counter

import pytest

from checkpoints import prompt, save_pipo
from servers import greedy, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds") / "model"
    save_pipo(folder, "qwen3", gate="draft")
    with serving(folder, enable_deterministic_inference=True, chunked_prefill_size=16) as server:
        yield server


def sampled(seed, num, threshold=0.5, **others):
    return greedy(num, threshold, **{"temperature": 1.0, "sampling_seed": seed, **others})


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(server):
    prompts = [prompt(5 + 7 * index, seed=index) for index in range(6)]
    params = [sampled(100 + index, 12 + 3 * index, presence_penalty=0.5 * (index % 2)) for index in range(6)]
    together = server.generate(prompts, params)
    server.forget()
    for index in (0, 3, 5):
        (alone,) = server.generate([prompts[index]], [params[index]])
        assert alone.token_ids == together[index].token_ids
    other, same = server.generate([prompts[5]] * 2, [{**params[5], "sampling_seed": 7}, params[5]])
    assert same.token_ids == together[5].token_ids != other.token_ids


def test_token_1_and_token_2_of_a_pair_do_not_share_a_draw(server):
    """With every token equally likely, one draw for both would write the same token twice; and so would one draw for two pairs."""
    flat = {str(token): 1000.0 for token in range(8)}
    params = [sampled(seed, 6, 0.0, temperature=1e6, top_k=8, logit_bias=flat) for seed in range(40)]
    replies = server.generate([prompt(4)] * 40, params)
    for gap in (1, 2):
        equal = Counter(
            one == other
            for reply in replies
            for one, other in zip(reply.token_ids, reply.token_ids[gap:], strict=False)
        )
        share = equal[True] / equal.total()  # 1/8 expected, of 160 or more
        assert share < 0.25, (gap, share)
