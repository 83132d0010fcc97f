"""How much fits. A model of M positions holds M pairs, so up to 2M tokens (section 4); SGLang's own limits and memory count pairs.

A client's `max_new_tokens` is in tokens. SGLang reserves memory by the field of the same name, so there it is in pairs: at worst each
token takes a pair of its own. Where the pairs run out first, the request ends with `length`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.requests import PairRequest
from pipo.integrations.sglang.serving import served
from pipo.pair_memory import plain_sizes


def after_init_model_config(_: None, manager: Any) -> None:
    """In the process that clients talk to: there everything is in tokens."""
    if served() is not None:
        manager.model_config.context_len *= 2
        manager.context_len = manager.model_config.context_len


def around_init_max_new_tokens(init: Callable[..., None], scheduler: Any, req: Any) -> None:
    """A request is about to be queued: give it as many pairs as it may need, if there are so many."""
    if served() is None:
        init(scheduler, req)
        return
    params, pairs = req.sampling_params, req.pairs
    fit_prompt(scheduler, req)
    most, least = params.max_new_tokens, params.min_new_tokens
    init(scheduler, req)
    # Also a request for no tokens draws one, and leaves it out: that fills the MTP block's cache, which others share.
    params.max_new_tokens = max(1, params.max_new_tokens)
    limits = (most, scheduler.max_new_tokens_limit or None, 2 * params.max_new_tokens)
    pairs.max_tokens = min(limit for limit in limits if limit is not None)
    params.min_new_tokens = min(least, pairs.max_tokens)


def fit_prompt(scheduler: Any, req: Any) -> None:
    """Pack a prompt that does not fit two by two, without the gaps of a remembered reply; cut it, or refuse it, if that is not enough."""
    from sglang.srt.runtime_context import get_serving

    pairs: PairRequest = req.pairs
    room = scheduler.max_req_input_len - 1  # SGLang takes less than it says
    if len(req.origin_input_ids) <= room:
        return
    if get_serving().allow_auto_truncate:
        del pairs.prompt[2 * room :]
    pairs.sizes = plain_sizes(len(pairs.prompt))
    if len(pairs.sizes) > room:
        req.set_finish_with_abort(
            f"the prompt has {len(pairs.prompt)} tokens, {len(pairs.sizes)} pairs; {room} pairs fit, up to {2 * room} tokens"
        )
        return
    req.origin_input_ids = req.origin_input_ids_unpadded = pair_ids.ids_of(pairs.prompt, pairs.sizes)


HOOKS = (
    Hook(
        "managers.tokenizer_manager.TokenizerManager.init_model_config",
        "after",
        after_init_model_config,
        ("self",),
    ),
    Hook("managers.scheduler.Scheduler.init_req_max_new_tokens", "around", around_init_max_new_tokens, ("self", "req")),
)
