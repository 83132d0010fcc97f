"""Gates without weights: chance, the draft's own probability, and an oracle that knows the rules of the world."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from pipo.demo.tokenizer import END_ID, piece_ids
from pipo.demo.world import Problem, right_next
from pipo.engine.runner import PipoRunner
from pipo.engine.sequence import Sequence as Sample
from pipo.engine.sequence import StepTokens
from pipo.model.modeling import PipoForCausalLM
from pipo.model.prefill import Prefill
from pipo.pairing import accept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ENDS = ""
"""The token that ends a solution, as a piece."""
NO_PIECE = "?"
"""Any other token that is no piece of the world."""


class Rule(Protocol):
    """What a gate without weights thinks of a step's draft, given the sample so far."""

    def __call__(self, sample: Sample, step: StepTokens) -> float:
        """In [0, 1]."""
        ...


def piece_names(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """The pieces by their tokens, the end included."""
    return {END_ID: ENDS, **{index: piece for piece, index in piece_ids(tokenizer).items()}}


def right_draft(problem: Problem, written: Sequence[str], draft: str) -> bool | None:
    """Whether `draft` is right after the pieces `written`, token 1 included; None where these are wrong already."""
    allowed = right_next(problem, written)
    if allowed is None:
        return None
    return not allowed if draft == ENDS else draft in allowed


def random_rule(sample: Sample, step: StepTokens) -> float:
    """The same number for the same draft of the same sample, whatever the threshold."""
    return random.Random(f"{sample.seed}-{sample.position}").random()


def probability_rule(sample: Sample, step: StepTokens) -> float:
    """The probability that the second head gave to its draft; the sample must record its pairs."""
    assert step.draft_logprob is not None
    return math.exp(step.draft_logprob)


def oracle_rule(problems: Mapping[tuple[int, ...], Problem], pieces: Mapping[int, str]) -> Rule:
    """Commits what is right. After an error it commits everything: nothing is left to save.

    Args:
        problems: by the ids of their prompts. pieces: as :func:`piece_names` gives them.
    """

    def judge(sample: Sample, step: StepTokens) -> float:
        problem = problems[tuple(sample.prompt_ids)]
        written = [pieces.get(token, NO_PIECE) for token in (*sample.token_ids, step.token1)]
        assert step.draft is not None
        return float(right_draft(problem, written, pieces.get(step.draft, NO_PIECE)) is not False)

    return judge


class RuleRunner(PipoRunner):
    """Decodes as usual, with a rule in the place of the confidence head. Every request must have a threshold of 0, so that all drafts
    are drawn; the rule's own is `threshold`."""

    def __init__(self, model: PipoForCausalLM, rule: Rule) -> None:
        super().__init__(model)
        self.rule = rule
        self.threshold = 0.0

    def join(self, sequences: Sequence[Sample], prefill: Prefill) -> list[StepTokens]:
        """See :class:`pipo.engine.runner.Runner`."""
        return self._judged(super().join(sequences, prefill), sequences)

    def decode(self, sequences: Sequence[Sample]) -> list[StepTokens]:
        """See :class:`pipo.engine.runner.Runner`."""
        return self._judged(super().decode(sequences), sequences)

    def _judged(self, steps: list[StepTokens], samples: Sequence[Sample]) -> list[StepTokens]:
        return [self._judge(sample, step) for sample, step in zip(samples, steps, strict=True)]

    def _judge(self, sample: Sample, step: StepTokens) -> StepTokens:
        confidence = self.rule(sample, step)
        committed = bool(accept(confidence, self.threshold))
        return replace(step, confidence=confidence, committed=committed, token2=step.draft if committed else None)
