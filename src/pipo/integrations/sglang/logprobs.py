"""Log-probabilities of both tokens of a pair.

SGLang computes them where it samples, for token 1 and for token 2 alike, and so they mean what they mean for a regular model: of the
distribution after penalties, grammar and temperature, before top-k, top-p and min-p. Here the two are put side by side into the fields that
SGLang copies to the host, and there each visible token gets its own entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served


def join_logprobs(first: Any, second: Any | None) -> None:
    """Put token 2's values behind token 1's, each in a dimension of its own, in `first`.

    `second`: `None` where no draft was drawn; then nobody reads the values in its place.
    """
    if first.next_token_logprobs is None:
        return
    second = second or first
    first.next_token_logprobs = torch.stack([first.next_token_logprobs, second.next_token_logprobs], dim=1)
    for name in (
        "next_token_top_logprobs_val",
        "next_token_top_logprobs_idx",
        "next_token_token_ids_logprobs_val",
    ):
        if (rows := getattr(first, name)) is not None:
            setattr(first, name, [torch.stack(pair) for pair in zip(rows, getattr(second, name), strict=True)])


def write_logprobs(req: Any, row: int, one: int, drawn: list[list[float]], output: Any) -> None:
    """Give a request the values of the pair with id `one`, one entry per visible token. `drawn`: of both tokens of each row."""
    kept = req.logprob
    for slot, token in enumerate(pair_ids.tokens_of([one])):
        kept.output_token_logprobs_val.append(drawn[row][slot])
        kept.output_token_logprobs_idx.append(token)
        if kept.top_logprobs_num > 0:
            kept.output_top_logprobs_val.append(output.next_token_top_logprobs_val[row][slot])
            kept.output_top_logprobs_idx.append(output.next_token_top_logprobs_idx[row][slot])
        if kept.token_ids_logprob is not None:
            kept.output_token_ids_logprobs_val.append(output.next_token_token_ids_logprobs_val[row][slot])
            kept.output_token_ids_logprobs_idx.append(output.next_token_token_ids_logprobs_idx[row])


def around_decode_logprobs(
    apply: Callable[..., None],
    processor: Any,
    *,
    req: Any,
    i: int,
    batch: Any,
    next_token_id: list[int],
    next_token_logprobs: list[list[float]],
    logits_output: Any,
) -> None:
    """After a step of a batch, for one request."""
    if served() is None:
        apply(
            processor,
            req=req,
            i=i,
            batch=batch,
            next_token_id=next_token_id,
            next_token_logprobs=next_token_logprobs,
            logits_output=logits_output,
        )
        return
    write_logprobs(req, i, next_token_id[0], next_token_logprobs, logits_output)


def around_prompt_logprobs(
    add: Callable[..., int],
    processor: Any,
    i: int,
    req: Any,
    pt: int,
    next_token_ids: list[int],
    num_input_logprobs: int,
    output: Any,
) -> int:
    """After a prompt was read, for one request."""
    if served() is None:
        return add(processor, i, req, pt, next_token_ids, num_input_logprobs, output)
    without = replace(
        output, next_token_logprobs=None, next_token_top_logprobs_val=None, next_token_token_ids_logprobs_val=None
    )
    count = add(processor, i, req, pt, next_token_ids, num_input_logprobs, without)
    write_logprobs(req, i, next_token_ids[i], output.next_token_logprobs, output)
    return count


COMPONENTS = "managers.scheduler_components"
HOOKS = (
    Hook(
        f"{COMPONENTS}.batch_result_processor.SchedulerBatchResultProcessor._apply_decode_logprobs",
        "around",
        around_decode_logprobs,
        ("self", "req", "i", "batch", "next_token_id", "next_token_logprobs", "logits_output"),
    ),
    Hook(
        f"{COMPONENTS}.logprob_result_processor.SchedulerLogprobResultProcessor.add_logprob_return_values",
        "around",
        around_prompt_logprobs,
        ("self", "i", "req", "pt", "next_token_ids", "num_input_logprobs", "output"),
    ),
)
