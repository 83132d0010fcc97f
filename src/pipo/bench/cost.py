"""What a decoding step and a prefill must read and compute, and the time that a machine can't be faster than. `bench` and `plan` use it.

Counted, for a whole batch: every weight once per pass that reads it (the head twice where it writes two tokens, though the weights
are shared), keys and values that some query sees once, linear-attention states read and written, embeddings by the row; and two
operations per weight and position, two per product of attention. Not counted: activations, sampling, and whatever a kernel reads
again. So the counts are the least, and the time that follows from them is a floor.

What a method is taken to do:

- `regular` reads one token and writes one.
- `speculative` reads a token and the draft after it, runs head and MTP block on both, drafts again, writes 1 + commit tokens
  (`commit` is the share of drafts accepted). Reading again what a rejected draft spoilt in a linear-attention state is not counted.
- `pipo` reads a pair, holds half as many positions, writes 1 + commit tokens. The gate does not see the draft, so the second head
  runs where a row commits: for a batch if any row does, rows taken as independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedConfig

from pipo.bench.sizes import Attention, ModelSizes, Weights, model_sizes
from pipo.errors import ConfigError

CostMethod = Literal["regular", "speculative", "pipo"]
COST_METHODS: tuple[CostMethod, ...] = get_args(CostMethod)


@dataclass(frozen=True)
class StepCost:
    """What one step of a whole batch reads and computes. `num_tokens`: visible tokens that it writes, per row."""

    num_tokens: float
    weight_bytes: float
    cache_bytes: float
    flops: float

    @property
    def bytes(self) -> float:
        """Of weights and cache."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Machine:
    """What a machine can do: read memory, multiply matrices, hold so many bytes. `overhead_s`: what a step takes besides."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    memory_bytes: float
    overhead_s: float = 0.0

    def floor_s(self, cost: StepCost) -> float:
        """The least time for a step: reading and computing overlap, the overhead does not."""
        return max(cost.bytes / self.bytes_per_s, cost.flops / self.flops_per_s) + self.overhead_s

    def token_floor_s(self, cost: StepCost) -> float:
        """The least time per visible token of a row (TPOT), of a decoding step."""
        return self.floor_s(cost) / cost.num_tokens

    def ceiling(self, cost: StepCost, regular: StepCost) -> float:
        """How many times faster per visible token than `regular` this machine allows."""
        return self.token_floor_s(regular) / self.token_floor_s(cost)


def decode_cost(
    model: PreTrainedConfig | ModelSizes,
    method: str,
    batch: int,
    context: float,
    *,
    commit: float = 1.0,
    draft_vocab: int | None = None,
    weight_bytes_per: float = 2.0,
    cache_bytes_per: float = 2.0,
    other_bytes_per: float | None = None,
    compressor: str = "mlp",
) -> StepCost:
    """One decoding step of `batch` rows.

    Args:
        model: a regular model's config, or the sizes made of it (which take a second to make).
        context: tokens of each row before the step; PIPO holds half as many pairs.
        commit: share of the drafts that are committed, or accepted.
        draft_vocab: rows of the second head; by default the whole vocabulary.
        weight_bytes_per, cache_bytes_per: bytes of a weight, and of a number in keys and values.
        other_bytes_per: bytes of a weight outside the layers of backbone and MTP block, where those alone are quantised.

    Raises:
        ConfigError: a method that is not counted, or a number that can't be.
    """
    count = _Count(model, method, batch, context, commit, draft_vocab, compressor)
    new = 2 if method == "speculative" else 1
    count.backbone(batch * new)
    count.use(count.sizes.head, batch * new)
    cached = context if method != "pipo" else math.ceil(context / 2)
    count.draft(batch * new)
    for layer in count.sizes.attention(method):
        seen = sum(layer.seen(cached + step) for step in range(new))
        count.attend(layer, entries=batch * layer.seen(cached + new - 1), queries=batch * seen)
    count.states(batch * new, passes=2)
    num_tokens = 1.0 if method == "regular" else 1.0 + commit
    return count.cost(num_tokens, weight_bytes_per, other_bytes_per, cache_bytes_per)


def prefill_cost(
    model: PreTrainedConfig | ModelSizes,
    method: str,
    batch: int,
    context: int,
    *,
    commit: float = 1.0,
    draft_vocab: int | None = None,
    weight_bytes_per: float = 2.0,
    cache_bytes_per: float = 2.0,
    other_bytes_per: float | None = None,
    compressor: str = "mlp",
) -> StepCost:
    """Prompts of `context` tokens read to their first tokens. The MTP block runs over the prompts too; heads at their ends alone.

    Arguments and errors as of :func:`decode_cost`; a prompt has at least one token.
    """
    count = _Count(model, method, batch, context, commit, draft_vocab, compressor)
    if context < 1:
        raise ConfigError(f"a prompt has at least one token, got a context of {context}")
    length = math.ceil(context / 2) if method == "pipo" else context
    count.backbone(batch * length)
    count.use(count.sizes.head, batch)
    count.draft(batch * length)
    for layer in count.sizes.attention(method):
        count.attend(layer, entries=batch * length, queries=batch * layer.seen_in(length))
    count.states(batch * length, passes=1)
    num_tokens = 1.0 + commit if method == "pipo" else 1.0
    return count.cost(num_tokens, weight_bytes_per, other_bytes_per, cache_bytes_per)


class _Count:
    """Sums up one step."""

    def __init__(
        self,
        model: PreTrainedConfig | ModelSizes,
        method: str,
        batch: int,
        context: float,
        commit: float,
        draft_vocab: int | None,
        compressor: str,
    ) -> None:
        self.method = method_of(method)
        self.sizes = model if isinstance(model, ModelSizes) else model_sizes(model, compressor)
        if batch < 1 or context < 0:
            raise ConfigError(f"a step has rows of some context, got batch {batch} and context {context}")
        if not 0 <= commit <= 1:
            raise ConfigError(f"commit is a share between 0 and 1, got {commit}")
        vocab_size = self.sizes.vocab_size
        if draft_vocab is not None and not 0 < draft_vocab <= vocab_size:
            raise ConfigError(f"draft_vocab must be from 1 to the vocabulary's {vocab_size:,}, got {draft_vocab}")
        self.batch, self.commit = batch, commit
        self.second_head = self.sizes.head if draft_vocab is None else Weights(draft_vocab * self.sizes.width)
        self.layers = self.others = self.entries = self.state_bytes = self.flops = 0.0

    def use(self, weights: Weights, positions: float, chance: float = 1.0) -> None:
        """`positions` positions go through a part, of which no weight is read but with this chance."""
        read = weights.read_by(positions) * chance
        if weights is self.sizes.backbone or weights is self.sizes.mtp:
            self.layers += read
        else:
            self.others += read
        self.flops += 2 * weights.per_position * positions

    def backbone(self, positions: int) -> None:
        """Embeddings, the compressor where there is one, the layers."""
        if self.method == "pipo":
            self.use(self.sizes.compressor, positions)
        self.others += positions * self.sizes.width * (2 if self.method == "pipo" else 1)
        self.use(self.sizes.backbone, positions)

    def draft(self, positions: int) -> None:
        """The MTP block at `positions` positions, and one draft per row."""
        if self.method == "regular":
            return
        self.others += positions * self.sizes.width
        self.use(self.sizes.mtp, positions)
        if self.method == "speculative":
            self.use(self.second_head, self.batch)
            return
        self.use(self.sizes.confidence, self.batch)
        self.use(self.second_head, self.batch * self.commit, chance=1 - (1 - self.commit) ** self.batch)

    def attend(self, layer: Attention, entries: float, queries: float) -> None:
        """Positions of a layer's cache that are read or written, and pairs of query and key."""
        self.entries += entries * layer.entries
        self.flops += queries * layer.flops

    def states(self, positions: int, passes: int) -> None:
        """Linear-attention states, read and written (`passes=2`) or written alone."""
        self.state_bytes += passes * self.batch * self.sizes.state_bytes
        self.flops += positions * self.sizes.state_flops

    def cost(
        self, num_tokens: float, layer_bytes_per: float, other_bytes_per: float | None, cache_bytes_per: float
    ) -> StepCost:
        """The sum."""
        others = self.others * (layer_bytes_per if other_bytes_per is None else other_bytes_per)
        cache_bytes = self.entries * cache_bytes_per + self.state_bytes
        return StepCost(num_tokens, self.layers * layer_bytes_per + others, cache_bytes, self.flops)


def method_of(name: str) -> CostMethod:
    """A method's name as a method.

    Raises:
        ConfigError: its cost is not known; the message lists those whose is.
    """
    if name not in COST_METHODS:
        raise ConfigError(f"the cost of method {name!r} is not known; known are {', '.join(COST_METHODS)}")
    return name
