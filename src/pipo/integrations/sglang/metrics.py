"""SGLang's own counters and throughputs in tokens, as a regular model's are.

What measures the cache stays in pairs, of which each takes one slot: token usage, pool sizes, pending tokens, hits by tier, sequence
lengths, and the estimates of FLOPs that are made from those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served


def after_num_generated(num_pairs: int, result: Any, batch_size: int) -> int | None:
    """Tokens that a step wrote, for generation throughput."""
    if served() is None:
        return None
    ids = torch.as_tensor(result.next_token_ids)
    return num_pairs + int((pair_ids.token2(ids) != pair_ids.NO_TOKEN).sum())


def after_prefill_stats(stats: Any, _: type, adder: Any, *args: Any, **kwargs: Any) -> Any:
    """Tokens that a prefill reads, and that it found in the cache."""
    if served() is None:
        return None
    num_read = num_cached = 0
    for req in adder.can_run_list:
        sizes = pair_ids.sizes_of(req.full_untruncated_fill_ids[: req.extend_end])
        num_read += int(sizes[req.prefix_len :].sum())
        num_cached += int(sizes[req.already_computed : req.prefix_len].sum())
    return replace(stats, log_input_tokens=num_read, log_hit_tokens=num_cached)


HOOKS = (
    Hook(
        "managers.utils.GenerationBatchResult.get_num_generated_tokens",
        "after",
        after_num_generated,
        ("self", "batch_size"),
    ),
    Hook(
        "managers.scheduler_components.metrics_reporter.PrefillStats.from_adder",
        "after",
        after_prefill_stats,
        ("adder", "running_reqs", "enable_priority_scheduling", "num_pending_tokens"),
    ),
)
