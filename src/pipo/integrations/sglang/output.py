"""What leaves the scheduler: text, tokens and counts, never pairs; and how many drafts were kept, beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.requests import PairRequest, as_tokens
from pipo.integrations.sglang.serving import served
from pipo.pairing import TokenCounts

DRAFTS = "pipo"
"""Key under which counts travel to the process that answers clients."""


def around_accept(accept: Callable[..., None], accumulator: Any, *, req: Any) -> None:
    """Everything that is sent of a request passes here."""
    if served() is None:
        accept(accumulator, req=req)
        return
    num_sent = len(accumulator.rids)
    with as_tokens(req) as pairs:
        accept(accumulator, req=req)
    if len(accumulator.rids) > num_sent:
        put_in_tokens(pairs, accumulator.cached_tokens, accumulator.cached_tokens_details)
        rows = accumulator.customized_info.setdefault(DRAFTS, [])
        rows[num_sent:] = [pairs.counts if req.finished() else None]


def put_in_tokens(pairs: PairRequest, cached: list[int], details: list[dict[str, Any] | None]) -> None:
    """What of the last request's prompt was cached, and in which memory, one part after the other: in tokens instead of pairs."""
    cached[-1] = pairs.num_prompt_tokens(cached[-1])
    end = 0
    for tier in ("device", "host", "storage"):
        if details[-1] is not None and tier in details[-1]:
            before, end = end, end + details[-1][tier]
            details[-1][tier] = pairs.num_prompt_tokens(end) - pairs.num_prompt_tokens(before)


def around_meta_info(
    update: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, Any],
    index: int,
    finish_reason: dict[str, Any] | None,
) -> None:
    """Facts beside an answer are put together."""
    others = {key: values for key, values in customized_info.items() if key != DRAFTS}
    update(manager, meta_info, state, others, index, finish_reason)
    if (counts := customized_info.get(DRAFTS, {index: None})[index]) is not None:
        meta_info |= facts(counts)


def facts(counts: TokenCounts) -> dict[str, int | float]:
    """What `meta_info` tells of a finished request: our own names, and those under which SGLang reports drafts of a regular model.

    The latter also reach OpenAI's responses, for clients that send `return_spec_tokens_details`.
    """
    judged = counts.num_committed + counts.num_rejected
    return {
        "num_pairs": counts.num_pairs,
        "num_committed": counts.num_committed,
        "num_rejected": counts.num_rejected,
        "spec_verify_ct": counts.num_pairs,
        "spec_num_correct_drafts": counts.num_committed,
        "spec_num_proposed_drafts": judged,
        "spec_accept_rate": counts.num_committed / judged if judged else 0.0,
        "spec_accept_length": counts.tokens_per_step if counts.num_pairs else 0.0,
    }


def around_weight_events(record: Callable[..., int], reqs: Iterable[Any], old_version: str) -> int:
    """New weights arrive while requests run: their answers say from which token on."""
    reqs = list(reqs)
    with ExitStack() as stack:
        for req in reqs if served() is not None else ():
            stack.enter_context(as_tokens(req))
        return record(reqs, old_version)


HOOKS = (
    Hook(
        "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        "around",
        around_accept,
        ("self", "req"),
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "around",
        around_meta_info,
        ("self", "meta_info", "state", "customized_info", "index", "finish_reason"),
    ),
    Hook("utils.weight_versions.record_weight_version_events", "around", around_weight_events, ("reqs", "old_version")),
)
