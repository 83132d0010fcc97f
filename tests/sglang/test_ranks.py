"""Whole servers of more than one rank: tensor parallel, and replicas behind one address."""

import pytest

from checkpoints import expected, prompt, save_pipo
from servers import serving

THRESHOLDS = [0.5, 0.0, 1.1, 0.5]
PROMPTS = [prompt(length, seed=length) for length in (7, 1, 12, 60)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "model"
    return folder, save_pipo(folder, "llama", gate="draft")


@pytest.mark.parametrize("spread", [{"tp_size": 2}, {"dp_size": 2}], ids=["tensor parallel", "replicas"])
def test_ranks_write_what_one_writes(checkpoint, spread):
    """Every rank packs, gates and counts by itself: where two of them differ, texts break or a server hangs."""
    folder, model = checkpoint
    wanted = [expected(model, ids, 16, tau) for ids, tau in zip(PROMPTS, THRESHOLDS, strict=True)]
    with serving(folder, **spread) as server:
        for _ in range(2):  # the second time from the prefix cache
            assert [reply.token_ids for reply in server.greedy(PROMPTS, 16, THRESHOLDS)] == wanted
        # A second turn: the reply is packed again as it was written.
        turns = [[*ids, *text, *prompt(5, seed=9)] for ids, text in zip(PROMPTS, wanted, strict=True)]
        replies = server.greedy(turns, 8, THRESHOLDS)
        assert all(len(reply.token_ids) == 8 for reply in replies)
        assert server.greedy(turns, 8, THRESHOLDS)[0].token_ids == replies[0].token_ids
