"""`pipo plan`: what a model will do on given GPUs under a given load, predicted from the cost model."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

from pipo.bench.cost import COST_METHODS
from pipo.bench.deployment import Deployment, StepTime
from pipo.errors import ConfigError


@dataclass(frozen=True)
class Load:
    """What is asked of a deployment.

    Args:
        context: tokens of each request in the cache at the step that is predicted.
        prompt: tokens of a prompt. reply: tokens of an answer, for the throughput that reading prompts leaves.
        concurrency: requests that decode together.
        commit: share of PIPO's drafts that are committed. acceptance: share of speculative decoding's drafts that stand.
    """

    context: int
    prompt: int
    concurrency: int = 1
    commit: float = 0.95
    acceptance: float = 0.95
    draft_vocab: int | None = None
    reply: int | None = None

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a number that can't be."""
        for name in ("context", "prompt", "concurrency", "reply"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1, got {number}")
        for name in ("commit", "acceptance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Prediction:
    """One method under a load. Figures are None where the load does not fit, and `reason` says why."""

    method: str
    cache_tokens: int
    """Tokens that fit into the cache of one machine, or of the `tp` that share a model."""
    max_requests: int
    """Requests of the load's context that fit together."""
    ttft_s: float | None = None
    """A request that comes while others decode waits for their step, then its prompt is read alone. No queue is counted."""
    ttft_limit: str | None = None
    tpot_s: float | None = None
    """Per visible token of a request, while no prompt is read."""
    tpot_limit: str | None = None
    tokens_per_s: float | None = None
    """Visible tokens of all requests, per GPU, while no prompt is read."""
    served_tokens_per_s: float | None = None
    """The same with the requests' prompts read in between; None where the load names no reply."""
    against_regular: float | None = None
    """Regular decoding's `tpot_s` over this."""
    largest_concurrency: int | None = None
    """Requests together at which both limits still hold; 0 where one request breaks them, None where no limit was given."""
    reason: str | None = None


@dataclass(frozen=True)
class Limits:
    """What must hold: at most so many seconds to the first token, and per token after it."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a limit that nothing can keep."""
        for name, limit in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            if not limit > 0:
                raise ConfigError(f"the limit of {name} must be above 0 seconds, got {limit}")


def predict(deployment: Deployment, load: Load, limits: Limits | None = None) -> list[Prediction]:
    """Every method under the load, regular decoding first.

    Raises:
        ConfigError: the regular model does not fit, by so much; a draft vocabulary beyond the model's.
    """
    if (missing := -deployment.free_bytes("regular")) >= 0:
        raise ConfigError(f"the model does not fit: {_missing(deployment, missing)}")
    found = [_Outlook(deployment, load, method).prediction(limits) for method in COST_METHODS]
    regular_s = found[0].tpot_s
    return [
        one if one.tpot_s is None or regular_s is None else replace(one, against_regular=regular_s / one.tpot_s)
        for one in found
    ]


@dataclass(frozen=True)
class _Outlook:
    """One method of a deployment under a load."""

    deployment: Deployment
    load: Load
    method: str

    def prediction(self, limits: Limits | None) -> Prediction:
        reason = self.reason()
        largest = None if limits is None else 0 if self.too_long else self.largest(limits)
        fit = 0 if self.too_long else self.fit
        if reason is not None:
            return Prediction(self.method, self.cache_tokens, fit, largest_concurrency=largest, reason=reason)
        number, tp = self.load.concurrency, self.deployment.tp
        step, num_tokens = self.step(number)
        tpot_s, first = step.seconds / num_tokens, self.first
        served = None
        if self.load.reply is not None:  # while a request writes its reply, the others' prompts and its own are read
            life_s = self.load.reply * tpot_s + number * first.seconds
            served = number * self.load.reply / life_s / tp
        return Prediction(
            self.method,
            self.cache_tokens,
            fit,
            ttft_s=self.ttft_s(number),
            ttft_limit=first.limit,
            tpot_s=tpot_s,
            tpot_limit=step.limit,
            tokens_per_s=number / tpot_s / tp,
            served_tokens_per_s=served,
            largest_concurrency=largest,
        )

    def reason(self) -> str | None:
        """Why there is nothing to predict."""
        if (missing := -self.deployment.free_bytes(self.method)) >= 0:
            return _missing(self.deployment, missing)
        if self.too_long:
            return f"{max(self.load.context, self.load.prompt):,} tokens are more than the model has positions for"
        if self.load.concurrency > self.fit:
            return f"{self.fit:,} requests of this context fit, and {self.load.concurrency:,} are asked for"
        return None

    @property
    def too_long(self) -> bool:
        """Whether the model has no positions for so many tokens."""
        tokens = self.deployment.max_positions * (2 if self.method == "pipo" else 1)
        return max(self.load.context, self.load.prompt) > tokens

    @property
    def cache_tokens(self) -> int:
        return self.deployment.cache_tokens(self.method)

    @cached_property
    def fit(self) -> int:
        return self.deployment.max_requests(self.method, self.load.context)

    @cached_property
    def first(self) -> StepTime:
        return self.deployment.prefill(self.method, 1, self.load.prompt, *self.drafts)

    def step(self, concurrency: int) -> tuple[StepTime, float]:
        return self.deployment.decode(self.method, concurrency, self.load.context, *self.drafts)

    def ttft_s(self, concurrency: int) -> float:
        """Others' step in progress, then the prompt."""
        wait_s = self.step(concurrency)[0].seconds if concurrency > 1 else 0.0
        return wait_s + self.first.seconds

    def largest(self, limits: Limits) -> int:
        """The most requests at which both limits hold; more of them can only break one."""

        def breaks(concurrency: int) -> bool:
            step, num_tokens = self.step(concurrency)
            return step.seconds / num_tokens > limits.tpot_s or self.ttft_s(concurrency) > limits.ttft_s

        return bisect_left(range(1, self.fit + 1), True, key=breaks)

    @property
    def drafts(self) -> tuple[float, int | None]:
        load = self.load
        return (load.acceptance if self.method == "speculative" else load.commit), load.draft_vocab


def _missing(deployment: Deployment, missing: float) -> str:
    share = deployment.efficiency.memory
    return (
        f"its weights take {missing / 1e9:,.1f} GB more than the {share:.0%} that may be used of the memory of "
        f"{deployment.machine.name} ({deployment.machine.memory_bytes / 1e9:,.1f} GB): take another GPU, a larger tp, "
        "or a smaller dtype"
    )
