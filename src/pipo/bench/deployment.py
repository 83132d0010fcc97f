"""A model on a GPU or several: what fits, and how long its steps take. `plan` asks it.

A step takes as long as the slower of reading and computing, then what the GPUs exchange and what the host adds. Reading and computing go at
a share of what the machine can do; shares and overheads are assumptions with names and defaults (:class:`Efficiency`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from pipo.bench.cost import Machine, StepCost, decode_cost, prefill_cost
from pipo.bench.sizes import ModelSizes, model_sizes
from pipo.errors import ConfigError


@dataclass(frozen=True)
class Format:
    """A number format: bytes of a weight of the layers, of any other weight, of a number in the cache; whose matrix rate it runs at."""

    weight_bytes: float
    other_bytes: float
    cache_bytes: float
    rate: str


FORMATS: dict[str, Format] = {
    "float32": Format(4, 4, 4, "float32"),
    "bfloat16": Format(2, 2, 2, "bfloat16"),
    "float16": Format(2, 2, 2, "bfloat16"),
    "int8": Format(1, 2, 2, "bfloat16"),
    "fp8": Format(1, 2, 2, "fp8"),
}
"""`int8` and `fp8` hold the layers of backbone and MTP block so, as `--quantization` does; `fp8` multiplies so, too."""


@dataclass(frozen=True)
class Efficiency:
    """What is reached of a machine's limits, published or measured. The defaults are guesses at what a good engine reaches."""

    bandwidth: float = 0.8
    """Share of the rate at which memory is read."""
    compute: float = 0.6
    """Share of the matrix rate."""
    overhead_s: float = 0.0003
    """What a step takes besides: sampling, starts of kernels, what the host can't hide."""
    memory: float = 0.9
    """Share of the memory that weights and cache may take."""
    link: float = 0.7
    """Share of the links' rate."""
    exchange_s: float = 8e-6
    """What each exchange between GPUs takes, however small."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a share or a time that can't be."""
        for name in ("bandwidth", "compute", "memory", "link"):
            share = getattr(self, name)
            if not 0 < share <= 1:
                raise ConfigError(f"the share of {name} that is reached must be above 0 and at most 1, got {share}")
        for name in ("overhead_s", "exchange_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} can't be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class StepTime:
    """Where the time of a step goes."""

    read_s: float
    compute_s: float
    exchange_s: float
    overhead_s: float

    @property
    def seconds(self) -> float:
        """Reading and computing overlap."""
        return max(self.read_s, self.compute_s) + self.exchange_s + self.overhead_s

    @property
    def limit(self) -> str:
        """What takes the most of it."""
        times = {
            "bandwidth": self.read_s,
            "compute": self.compute_s,
            "exchange": self.exchange_s,
            "overhead": self.overhead_s,
        }
        return max(times, key=lambda name: times[name])


class Deployment:
    """A model on one machine, or split over `tp` of them (tensor parallel), each layer's parts exchanged twice.

    Args:
        config: the regular model's. machine: one of them, with the rates that it reaches at best.
        link_bytes_per_s: what each sends to the others; needed where there are several.

    Raises:
        ConfigError: a `tp` that the model's heads can't be split by, or that needs links which are not known.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        machine: Machine,
        *,
        dtype: str = "bfloat16",
        tp: int = 1,
        link_bytes_per_s: float = 0.0,
        efficiency: Efficiency | None = None,
        compressor: str = "mlp",
    ) -> None:
        self.machine, self.format, self.tp, self.link = machine, format_of(dtype), tp, link_bytes_per_s
        self.efficiency = efficiency or Efficiency()
        self.sizes: ModelSizes = model_sizes(config, compressor)
        self.num_layers, self.max_positions = int(config.num_hidden_layers), int(config.max_position_embeddings)
        heads = int(config.num_attention_heads)
        if tp < 1 or heads % tp:
            raise ConfigError(f"tp must divide the model's {heads} attention heads, got {tp}")
        if tp > 1 and link_bytes_per_s <= 0:
            raise ConfigError(
                f"tp {tp} needs GPUs whose links are known, and {machine.name} has none: choose one by --gpu"
            )
        # Fewer key-value heads than GPUs: some GPUs hold the same ones.
        self.cache_split = min(tp, int(getattr(config, "num_key_value_heads", None) or heads))

    # --- memory

    def free_bytes(self, method: str) -> float:
        """Memory of one machine that is left for the cache; below 0, what its share of the weights lacks."""
        layers, others = self.sizes.held(method)
        held = (layers * self.format.weight_bytes + others * self.format.other_bytes) / self.tp
        return self.machine.memory_bytes * self.efficiency.memory - held

    def position_bytes(self, method: str) -> float:
        """Of cache, on one machine: a pair of PIPO's, a token of the others'."""
        entries = sum(layer.entries for layer in self.sizes.attention(method))
        return entries * self.format.cache_bytes / self.cache_split

    def cache_tokens(self, method: str) -> int:
        """Tokens that fit into the cache, in one request without linear-attention states to speak of."""
        positions = math.floor(max(0.0, self.free_bytes(method)) / self.position_bytes(method))
        return positions * (2 if method == "pipo" else 1)

    def max_requests(self, method: str, context: int) -> int:
        """Requests of `context` tokens that fit together."""
        positions = math.ceil(context / 2) if method == "pipo" else context
        row = self.sizes.state_bytes / self.tp + positions * self.position_bytes(method)
        return math.floor(max(0.0, self.free_bytes(method)) / row)

    # --- time

    def time_of(self, cost: StepCost, positions: int, num_passes: int) -> StepTime:
        """A step over `positions` positions through `num_passes` layers."""
        share, machine = self.efficiency, self.machine
        read = cost.weight_bytes / self.tp + cost.cache_bytes / self.cache_split
        exchange = 0.0
        if self.tp > 1:
            message = (
                positions * self.sizes.width * 2 * 2 * (self.tp - 1) / self.tp
            )  # a ring's all-reduce, in two bytes
            exchange = 2 * num_passes * (message / (self.link * share.link) + share.exchange_s)
        return StepTime(
            read / (machine.bytes_per_s * share.bandwidth),
            cost.flops / self.tp / (machine.flops_per_s * share.compute),
            exchange,
            share.overhead_s + machine.overhead_s,
        )

    def decode(
        self, method: str, batch: int, context: float, commit: float, draft_vocab: int | None = None
    ) -> tuple[StepTime, float]:
        """A decoding step, and the visible tokens of a row that it writes."""
        cost = decode_cost(self.sizes, method, batch, context, **self._settings(commit, draft_vocab))
        positions = batch * (2 if method == "speculative" else 1)
        return self.time_of(cost, positions, self._passes(method)), cost.num_tokens

    def prefill(self, method: str, batch: int, prompt: int, commit: float, draft_vocab: int | None = None) -> StepTime:
        """Prompts to their first tokens."""
        cost = prefill_cost(self.sizes, method, batch, prompt, **self._settings(commit, draft_vocab))
        positions = batch * (math.ceil(prompt / 2) if method == "pipo" else prompt)
        return self.time_of(cost, positions, self._passes(method))

    def _passes(self, method: str) -> int:
        return self.num_layers + (method != "regular")

    def _settings(self, commit: float, draft_vocab: int | None) -> dict[str, Any]:
        return {
            "commit": commit,
            "draft_vocab": draft_vocab,
            "weight_bytes_per": self.format.weight_bytes,
            "other_bytes_per": self.format.other_bytes,
            "cache_bytes_per": self.format.cache_bytes,
        }


def format_of(dtype: str) -> Format:
    """Raise `ConfigError` for a number format that plans don't know."""
    if dtype not in FORMATS:
        raise ConfigError(f"plans know the number formats {', '.join(FORMATS)}, got {dtype!r}")
    return FORMATS[dtype]
