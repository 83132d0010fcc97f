"""A request in pairs: what rides on SGLang's `Req` as `req.pairs`, and when it is finished.

SGLang's own fields count pairs (`origin_input_ids`, `output_ids`, lengths, caches); what a client sees, stops on and pays for counts
tokens. Where SGLang's code looks at the latter, :func:`as_tokens` puts them in the fields' places meanwhile.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import current, served


@dataclass
class PairRequest:
    """The tokens of a request."""

    prompt: array[int]
    threshold: float
    tokens: array[int] = field(default_factory=lambda: array("q"))
    """That a client may see so far."""
    num_read: int = 0
    """Pairs of `output_ids` that are in `tokens`."""
    finished_len: int | None = None
    """Tokens up to the stop, where there was one."""

    def read(self, output_ids: array[int]) -> int:
        """Take new pairs over; how many tokens they were."""
        if len(output_ids) < self.num_read:  # the request was sent back and starts anew
            self.tokens, self.num_read = array("q"), 0
        new = pair_ids.tokens_of(output_ids[self.num_read :])
        self.tokens.extend(new)
        self.num_read = len(output_ids)
        return len(new)


def around_init(init: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
    """Pack the prompt."""
    if served() is None:
        init(req, *args, **kwargs)
        return
    given = inspect.signature(init).bind(req, *args, **kwargs).arguments
    prompt = array("q", given["origin_input_ids"])
    custom = given["sampling_params"].custom_params or {}
    req.pairs = PairRequest(prompt, float(custom.get("threshold", current().threshold)))
    given["origin_input_ids"] = pair_ids.ids_of(current().memory.pack(prompt))
    del given["self"]
    init(req, **given)


def settle(req: Any, start: int) -> None:
    """Now that pairs from `start` on are written, tell each pair before one of them what followed it.

    SGLang enters a pair into its prefix tree once the next is known, so that the tree's key is the whole id.
    """
    num_prompt = len(req.origin_input_ids)
    for index in range(start, len(req.output_ids)):
        ids, at = (req.output_ids, index - 1) if index else (req.origin_input_ids, num_prompt - 1)
        ids[at] = pair_ids.followed_by(ids[at], pair_ids.token1(req.output_ids[index]))
        if num_prompt + index <= len(req.full_untruncated_fill_ids):  # SGLang's copy of prompt and reply
            req.full_untruncated_fill_ids[num_prompt + index - 1] = ids[at]


@contextmanager
def as_tokens(req: Any) -> Iterator[PairRequest]:
    """The request's fields in tokens instead of pairs, as long as this lasts."""
    pairs: PairRequest = req.pairs
    ids, prompt, unpadded = req.output_ids, req.origin_input_ids, req.origin_input_ids_unpadded
    cached = req.cached_tokens
    req.output_ids, req.origin_input_ids, req.origin_input_ids_unpadded = pairs.tokens, pairs.prompt, pairs.prompt
    req.cached_tokens = min(2 * cached, len(pairs.prompt))
    req.finished_len = pairs.finished_len
    try:
        yield pairs
    finally:
        pairs.finished_len = req.finished_len
        req.output_ids, req.origin_input_ids, req.origin_input_ids_unpadded = ids, prompt, unpadded
        req.cached_tokens = cached
        req.finished_len = None if req.finished_reason is None else len(ids)


def around_update_finish_state(update: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """Look for stops in tokens."""
    if served() is None:
        update(req, new_accepted_len)
        return
    if req.finished():
        return
    settle(req, req.pairs.num_read)
    num_new = req.pairs.read(req.output_ids)
    with as_tokens(req):
        update(req, num_new)
    if req.finished():
        remember(req)


def remember(req: Any) -> None:
    """Keep how a finished reply was paired, for the next turn."""
    prompt, reply = (list(map(pair_ids.pair_of, ids)) for ids in (req.origin_input_ids, req.output_ids))
    current().memory.remember(prompt, reply)


REQ = "managers.schedule_batch.Req"
INIT_PARAMETERS = """
self rid origin_input_text origin_input_ids sampling_params return_logprob top_logprobs_num dllm_config
token_ids_logprob return_sampling_mask sampling_logprobs_mode return_flat_raw_top_logprobs stream
origin_input_ids_unpadded lora_id input_embeds positional_embed_overrides token_type_ids session
custom_logit_processor require_reasoning return_hidden_states return_routed_experts routed_experts_start_len
return_indexer_topk eos_token_ids bootstrap_host bootstrap_port bootstrap_room disagg_mode routed_dp_rank
disagg_prefill_dp_rank kv_hints vocab_size priority metrics_collector extra_key routing_key dimensions http_worker_ipc
time_stats return_pooled_hidden_states multi_item_delimiter_indices token_indices_to_pool decision_layout session_id
cache_salt
"""
HOOKS = (
    Hook(f"{REQ}.__init__", "around", around_init, tuple(INIT_PARAMETERS.split())),
    Hook(f"{REQ}.update_finish_state", "around", around_update_finish_state, ("self", "new_accepted_len")),
)
