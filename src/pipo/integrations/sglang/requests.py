"""A request in pairs: what rides on SGLang's `Req` as `req.pairs`, and when it is finished.

SGLang's own fields count pairs (`origin_input_ids`, `output_ids`, `sampling_params.max_new_tokens`, lengths, caches); what a client sees,
stops on and pays for counts tokens. Where SGLang's code looks at the latter, :func:`as_tokens` puts them in the fields' places meanwhile.
"""

from __future__ import annotations

import inspect
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pipo.errors import RequestError
from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.admission import threshold_of
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import current, served
from pipo.pair_memory import Sizes
from pipo.pairing import TokenCounts, draws_drafts


@dataclass
class PairRequest:
    """The tokens of a request."""

    prompt: array[int]
    threshold: float
    """τ."""
    sizes: Sizes
    """Of the prompt's pairs."""
    max_tokens: int = 1 << 30
    """Tokens to write at most. `sampling_params.max_new_tokens` is the same in pairs."""
    tokens: array[int] = field(default_factory=lambda: array("q"))
    """That were written so far: a client sees them up to `finished_len`."""
    num_read: int = 0
    """Pairs of `output_ids` that are in `tokens`."""
    finished_len: int | None = None
    """Tokens up to the stop, where there was one."""
    counts: TokenCounts = field(default_factory=TokenCounts)
    count_reasoning: Callable[[list[int]], None] | None = None
    """Takes the tokens of a step, once it is known which of them are shown."""
    _num_prompt_tokens: dict[int, int] = field(default_factory=dict)

    def read(self, output_ids: array[int]) -> int:
        """Take new pairs over; how many tokens they hold."""
        new = pair_ids.tokens_of(output_ids[self.num_read :])
        self.tokens.extend(new)
        self.num_read = len(output_ids)
        return len(new)

    def count(self, num_new: int, finished: bool) -> None:
        """Count the pair that was written last, of `num_new` tokens, as section 4 has it: a draft that a stop cut off is no draft."""
        end = len(self.tokens) if self.finished_len is None else self.finished_len
        before = len(self.tokens) - num_new
        shown = max(0, end - before)
        cut = finished and shown < 2
        judged = draws_drafts(self.threshold) and not cut
        self.counts.add_pair(num_tokens=shown, judged=judged, committed=num_new == 2 and not cut)
        if self.count_reasoning is not None:
            self.count_reasoning(self.tokens[before:end].tolist())
            self.count_reasoning = None

    def num_prompt_tokens(self, num_pairs: int) -> int:
        """Tokens of the first pairs of the prompt; asked for at each step, for few numbers."""
        if num_pairs not in self._num_prompt_tokens:
            self._num_prompt_tokens[num_pairs] = int(self.sizes[:num_pairs].sum())
        return self._num_prompt_tokens[num_pairs]


# --- a request comes in


def around_init(init: Callable[..., None], req: Any, *args: Any, **kwargs: Any) -> None:
    """Pack the prompt."""
    if served() is None:
        init(req, *args, **kwargs)
        return
    given = _signature(init).bind(req, *args, **kwargs).arguments
    prompt = array("q", given["origin_input_ids"])
    sizes = current().memory.sizes(prompt)
    threshold, wrong = current().threshold, None
    try:
        threshold = threshold_of(given["sampling_params"].custom_params, threshold)
    except RequestError as error:  # admission answers that; here is who came in by another way
        wrong = str(error)
    req.pairs = PairRequest(prompt, threshold, sizes)
    given["origin_input_ids"] = pair_ids.ids_of(prompt, sizes)
    del given["self"]
    init(req, **given)
    if wrong is not None:
        req.set_finish_with_abort(wrong)


@lru_cache(maxsize=1)
def _signature(init: Callable[..., None]) -> inspect.Signature:
    return inspect.signature(init)


# --- a step is done


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
    in_pairs = req.output_ids, req.origin_input_ids, req.origin_input_ids_unpadded, req.sampling_params.max_new_tokens
    req.output_ids, req.origin_input_ids, req.origin_input_ids_unpadded = pairs.tokens, pairs.prompt, pairs.prompt
    req.sampling_params.max_new_tokens = pairs.max_tokens
    req.finished_len = pairs.finished_len
    try:
        yield pairs
    finally:
        pairs.finished_len = req.finished_len
        req.output_ids, req.origin_input_ids, req.origin_input_ids_unpadded = in_pairs[:3]
        req.sampling_params.max_new_tokens = in_pairs[3]
        req.finished_len = None if req.finished_reason is None else len(req.output_ids)


def around_update_finish_state(update: Callable[..., None], req: Any, new_accepted_len: int = 1) -> None:
    """Look for stops in tokens, and for the end of the room for pairs."""
    if served() is None:
        update(req, new_accepted_len)
        return
    if req.finished():
        return
    settle(req, req.pairs.num_read)
    num_new = req.pairs.read(req.output_ids)
    with as_tokens(req):
        update(req, num_new)
    if not req.finished() and len(req.output_ids) >= req.sampling_params.max_new_tokens:
        from sglang.srt.managers.schedule_batch import FINISH_LENGTH

        req.finished_reason = FINISH_LENGTH(length=len(req.pairs.tokens))
        req.finished_len = len(req.output_ids)
    if num_new:
        req.pairs.count(num_new, req.finished())
    if req.finished():
        remember(req)


def around_reasoning(update: Callable[..., None], processor: Any, req: Any, next_token_id: int | list[int]) -> None:
    """SGLang counts tokens of thoughts before it looks for a stop; pairs wait until that is known."""
    if served() is None:
        update(processor, req, next_token_id)
        return
    req.pairs.count_reasoning = lambda tokens: update(processor, req, tokens)


# --- the memory of pairs


def remember(req: Any) -> None:
    """Keep how a finished reply was paired, for the next turn; its last pair may be completed by that.

    Ranks of a tensor-parallel group pair alike: SGLang gives each of them the same requests and aborts in the same iteration, and what
    they write is the same.
    """
    if not req.output_ids or req.finished_reason.to_json().get("type") == "abort":
        return
    sizes = pair_ids.sizes_of(req.origin_input_ids + req.output_ids)
    tokens = req.pairs.prompt + req.pairs.tokens
    current().memory.remember_sizes(tokens[: len(tokens) - int(sizes[-1])], sizes[:-1])


def after_flush(flushed: bool, scheduler: Any, empty_cache: bool = True) -> None:
    """The prefix tree was emptied, as it is when weights change."""
    if served() is not None and flushed:
        current().memory.clear()


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
    Hook(
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor._maybe_update_reasoning_tokens",
        "around",
        around_reasoning,
        ("self", "req", "next_token_id"),
    ),
    Hook("managers.scheduler.Scheduler.flush_cache", "after", after_flush, ("self", "empty_cache")),
)
