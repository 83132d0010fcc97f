"""Regular models: what stock SGLang writes, with the stand-in kernels and the plugin installed, is what Hugging Face writes.

Where this fails, look at `cpu/` first, or for a hook that does not ask whether a PIPO checkpoint is served.
"""

import pytest

from checkpoints import expected_regular, prompt, save_regular
from servers import KEEPING_STATES, serving

TEXT_ONLY = {**KEEPING_STATES, "enable_multimodal": False, "chunked_prefill_size": 128}


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
def test_regular_models_write_what_hugging_face_writes(family, tmp_path):
    model = save_regular(tmp_path / "model", family)
    long = prompt(150)
    prompts = [prompt(7, seed=1), prompt(1, seed=2), long]
    with serving(tmp_path / "model", **(TEXT_ONLY if family.startswith("qwen3_5") else {})) as server:
        replies = server.greedy(prompts, 12)
        assert [r.token_ids for r in replies] == [expected_regular(model, ids, 12) for ids in prompts]
        # A prefix that the cache holds: for linear attention, from a state that was kept on the way.
        turned = [*long[:140], *prompt(9, seed=3)]
        (reply,) = server.greedy([turned], 12)
        assert reply.token_ids == expected_regular(model, turned, 12)
        assert reply.num_cached >= 64
