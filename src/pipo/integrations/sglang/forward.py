"""What a forward has to be told that SGLang does not tell it: the token 1 that follows a part of a prompt."""

from __future__ import annotations

from typing import Any

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served


def after_init_new(forward_batch: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """Note, as `pipo_given`, `(row, token 1)` of the pair after each part of a prompt that is read in several parts."""
    if served() is None or batch.forward_mode.is_decode_or_idle():
        return
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    forward_batch.pipo_given = [
        (row, pair_ids.token1(req.full_untruncated_fill_ids[req.extend_end]))
        for row, req in enumerate(batch.reqs)
        if id(req) not in decoding and req.extend_end < len(req.full_untruncated_fill_ids)
    ]


def around_next_prompt_token(original: Any, chunked_req: Any, vocab_size: int) -> int | None:
    """SGLang's own note of what follows a part of a prompt, for drafters of its own; a pair is no token of theirs."""
    return original(chunked_req, vocab_size) if served() is None else None


HOOKS = (
    Hook(
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        lambda forward_batch, cls, batch, *args, **kwargs: after_init_new(forward_batch, batch, *args, **kwargs),
        (
            "batch",
            "model_runner",
            "capture_hidden_mode",
            "return_hidden_states_before_norm",
            "extend_position_info",
            "spec_mrope_positions",
            "kv_loc_plan",
            "write_cols",
        ),
    ),
    Hook(
        "managers.schedule_batch._compute_chunked_req_next_prompt_token",
        "around",
        around_next_prompt_token,
        ("chunked_req", "vocab_size"),
    ),
)
