"""Grammars over pairs: token 2 is drawn from what a grammar allows after token 1.

SGLang advances a request's grammar over what was written once a step's result is on the host, one id at a time; here it gets the
tokens of the pair. Before token 2 is drawn the grammar is advanced over token 1, and taken back afterwards, since the step may still
be thrown away. That takes a look at token 1, so the host waits for the device once more in such a batch. Where a grammar cannot go
back, the draft is withheld and the pair holds token 1 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pipo.integrations.sglang import pair_ids
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served
from pipo.pairing import draws_drafts


@contextmanager
def one_ahead(info: Any, token1_R: Tensor) -> Iterator[list[int]]:
    """Grammars of a batch stand after token 1 as long as this lasts. Gives the rows whose draft must not be committed."""
    if not any(info.grammars or ()):
        yield []
        return
    before, withheld = info.grammars, []
    advanced: dict[int, Any] = {}
    for row, (grammar, token) in enumerate(zip(before, token1_R.tolist(), strict=True)):  # waits for the device
        if grammar is None or not draws_drafts(info.pairs.thresholds[row]):
            continue
        if _advance(grammar, token):
            advanced[row] = grammar
        if row not in advanced or grammar.is_terminated():
            withheld.append(row)
    info.grammars = [advanced.get(row) for row in range(len(before))] if advanced else None
    try:
        yield withheld
    finally:
        info.grammars = before
        for grammar in advanced.values():
            grammar.rollback(1)


def _advance(grammar: Any, token: int) -> bool:
    """Advance over a token; False where that, or the way back, is not possible."""
    if grammar.finished or grammar.is_terminated() or not _can_roll_back(grammar):
        return False
    try:
        grammar.accept_token(token)
    except ValueError:  # what the grammar does not allow ends the request when SGLang finds it
        return False
    return True


def _can_roll_back(grammar: Any) -> bool:
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
    from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject

    if isinstance(grammar, ReasonerGrammarObject):
        return grammar.grammar is None or _can_roll_back(grammar.grammar)
    return type(grammar).rollback is not BaseGrammarObject.rollback


def around_accept(accept: Callable[..., list[int]], processor: Any, req: Any, tokens: int | list[int]) -> list[int]:
    """SGLang advances a request's grammar over what a step wrote."""
    if served() is None:
        return accept(processor, req, tokens)
    if req.finished():  # nothing follows, and what was cut off may not fit
        return []
    return accept(processor, req, pair_ids.tokens_of([tokens] if isinstance(tokens, int) else tokens))


def around_prefill(
    apply: Callable[..., None], processor: Any, *, req: Any, next_token_id: int, already_advanced: bool = False
) -> None:
    """The same after a prompt was read."""
    if served() is None:
        apply(processor, req=req, next_token_id=next_token_id, already_advanced=already_advanced)
        return
    processor._accept_grammar_tokens(req, next_token_id)
    req.grammar.finished = req.finished()


def around_delayed_sample(launch: Callable[..., Any], scheduler: Any, batch_result: Any, cur_batch: Any) -> Any:
    """SGLang draws for such a batch once the last result is known, after the scheduler was fenced off what the forward reads.

    The MTP block reads it too, and runs after token 1.
    """
    delayed = batch_result is not None and batch_result.delay_sample_func is not None
    result = launch(scheduler, batch_result, cur_batch)
    if delayed and served() is not None and scheduler._war_barrier_enabled:
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    return result


PROCESSOR = "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
HOOKS = (
    Hook(f"{PROCESSOR}._accept_grammar_tokens", "around", around_accept, ("self", "req", "tokens")),
    Hook(
        f"{PROCESSOR}._apply_prefill_grammar",
        "around",
        around_prefill,
        ("self", "req", "next_token_id", "already_advanced"),
    ),
    Hook(
        "managers.scheduler.Scheduler.launch_batch_sample_if_needed",
        "around",
        around_delayed_sample,
        ("self", "batch_result", "cur_batch"),
    ),
)
