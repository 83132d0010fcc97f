"""`model.generate(...)` for the usual Hugging Face habits: tensors in, tensors out, decoded in pairs.

For serving, stop strings, text streams, or requests that come and go, use `pipo.LLM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from pipo.errors import ConfigError, RequestError
from pipo.model.cache import RowCache
from pipo.model.modeling import PipoForCausalLM
from pipo.model.prefill import Prefill
from pipo.model.rows import Rows
from pipo.model.sampling import SamplingBatch, TokenHistory
from pipo.model.step import HostPairs, fetch, read_pairs, write_pair
from pipo.pairing import Pair, draws_drafts, num_pairs, pair_slots_from_tokens, slots_from_pairs

DEFAULT_NEW_TOKENS = 20
GREEDY_TEMPERATURE = 1e-5
OPTIONS = (
    "max_new_tokens", "max_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "num_return_sequences", "eos_token_id", "pad_token_id", "return_dict_in_generate",
)  # fmt: skip
ONLY_VALUE = {"use_cache": True, "num_beams": 1, "synced_gpus": False, "output_scores": False, "tokenizer": None}
"""Options of Hugging Face's `generate` that are accepted at the one value which changes nothing."""


@dataclass
class PipoGenerateOutput(ModelOutput):
    """`sequences [B·n, T + new]`: prompt and new tokens. `num_pairs`, `num_committed [B·n]`: steps, and drafts kept."""

    sequences: Tensor | None = None
    num_pairs: Tensor | None = None
    num_committed: Tensor | None = None


@dataclass(frozen=True)
class _Settings:
    """Settings of all rows, under the names of `SamplingSettings`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    min_tokens: int
    tau: float
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


@dataclass
class _Row:
    """One sequence while it is written."""

    prompt: list[int]
    seed: int
    pairs: list[Pair] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_committed: int = 0

    def take(self, pair: Pair, eos: frozenset[int], max_new: int) -> bool:
        """Append a pair, cut at end of text or length; whether the row has ended."""
        self.pairs.append(pair)
        for number, token in enumerate(pair):
            if token is None:
                continue
            self.tokens.append(token)
            self.num_committed += number
            if token in eos or len(self.tokens) >= max_new:
                return True
        return False


def generate(
    model: PipoForCausalLM,
    inputs: Tensor | None,
    generation_config: GenerationConfig | None,
    *,
    attention_mask: Tensor | None,
    threshold: float,
    streamer: Any,
    **kwargs: Any,
) -> Tensor | PipoGenerateOutput:
    """See :meth:`PipoForCausalLM.generate`."""
    input_ids = inputs if inputs is not None else kwargs.pop("input_ids", None)
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise RequestError("generate needs input_ids of shape [batch, tokens], at least one token")
    options = _options(generation_config, kwargs)
    rows = _rows(input_ids, attention_mask, int(options.get("num_return_sequences") or 1))
    if streamer is not None and len(rows) > 1:
        raise ConfigError(f"a streamer follows one row, and there are {len(rows)}")
    max_new = _max_new_tokens(options, input_ids.shape[1])
    longest = max(num_pairs(len(row.prompt)) for row in rows)
    max_steps = model.config.max_position_embeddings - longest
    if max_steps < 1:
        raise RequestError(f"the longest prompt takes {longest} pairs, which leaves no room in the model's context")
    eos = _ids(options.get("eos_token_id", model.config.eos_token_id))
    settings = _settings(options, threshold)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for _, new_tokens in zip(range(max_steps), _steps(model, rows, settings, eos, max_new), strict=False):
        if streamer is not None:
            streamer.put(torch.tensor(new_tokens))
    if streamer is not None:
        streamer.end()
    pad = options.get("pad_token_id")
    new = _right_padded([row.tokens for row in rows], int(model.config.pad_token_id if pad is None else pad))
    sequences = torch.cat([input_ids.repeat_interleave(len(rows) // len(input_ids), 0), new.to(input_ids.device)], 1)
    if not options.get("return_dict_in_generate"):
        return sequences
    counts = torch.tensor([[len(row.pairs), row.num_committed] for row in rows], device=sequences.device)
    return PipoGenerateOutput(sequences=sequences, num_pairs=counts[:, 0], num_committed=counts[:, 1])


def _steps(model: PipoForCausalLM, rows: list[_Row], settings: _Settings, eos: frozenset[int], max_new: int) -> Any:
    """Write one pair per running row and yield the first row's new tokens, until every row has ended."""
    pad, drafting = int(model.config.pad_token_id), draws_drafts(settings.tau)
    cache, running = RowCache(model.config.text_config, model.device), list(rows)
    has_states = cache.has_states
    groups = [[row] for row in rows] if has_states else [rows]  # padding would change a linear-attention state
    first: list[tuple[_Row, HostPairs, int]] = []
    for group in groups:
        prefilled = Prefill(model, [pair_slots_from_tokens(row.prompt, pad) for row in group]).finish()
        result = write_pair(
            model,
            prefilled.last_hidden_BH,
            _sampling(model, group, settings, eos),
            prefilled.run_mtp if drafting else None,
        )
        cache.adopt(prefilled.cache, prefilled.lengths)
        pairs = fetch(result)
        first += [(row, pairs, i) for i, row in enumerate(group)]
    steps = first
    while True:
        before = len(rows[0].tokens)
        ended = [row.take(_pair(pairs, i), eos, max_new) for row, pairs, i in steps]
        yield rows[0].tokens[before:]
        for i in reversed(range(len(running))):
            if ended[i]:
                cache.remove(i)
                running[i] = running[-1]
                running.pop()
        if not running:
            return
        slots_B2 = torch.tensor([slots_from_pairs(row.pairs[-1:], pad) for row in running], device=model.device)
        hidden_BH, run_mtp = read_pairs(model, slots_B2, cache)
        result = write_pair(model, hidden_BH, _sampling(model, running, settings, eos), run_mtp if drafting else None)
        cache.advance()
        pairs = fetch(result)
        steps = [(row, pairs, i) for i, row in enumerate(running)]


def _pair(pairs: HostPairs, row: int) -> Pair:
    return Pair(pairs.token1[row], pairs.draft[row] if pairs.committed[row] else None)


def _sampling(model: PipoForCausalLM, rows: list[_Row], settings: _Settings, eos: frozenset[int]) -> Rows:
    batch = SamplingBatch.build(
        [settings] * len(rows), [row.seed for row in rows], model.config.vocab_size, model.device, [eos] * len(rows)
    )
    history = None
    if batch.any_penalty:
        history = TokenHistory(batch, [row.prompt for row in rows], [row.tokens for row in rows])
    counts = torch.tensor([[len(row.pairs), len(row.tokens)] for row in rows], device=model.device)
    return Rows(batch, history, counts[:, 0], counts[:, 1])


# --- options ------------------------------------------------------------------------------------------


def _options(generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options that are set, those of the call before those of the config."""
    for name, value in kwargs.items():
        if name in OPTIONS or value is None or (name in ONLY_VALUE and value == ONLY_VALUE[name]):
            continue
        raise ConfigError(
            f"generate does not support {name}={value!r}; it knows {', '.join(OPTIONS)}. pipo.LLM offers more "
            "(stop strings, streams, log-probs, requests that join and leave)"
        )
    from_config = (
        {} if generation_config is None else {name: getattr(generation_config, name, None) for name in OPTIONS}
    )
    given = {name: value for name, value in kwargs.items() if name in OPTIONS}
    return {name: value for name, value in {**from_config, **given}.items() if value is not None}


def _settings(options: dict[str, Any], threshold: float) -> _Settings:
    sampling = bool(options.get("do_sample"))
    temperature = float(options.get("temperature", 1.0)) if sampling else 0.0
    if sampling and temperature <= 0:
        raise ConfigError(f"temperature must be > 0 with do_sample=True, got {temperature}")
    return _Settings(
        temperature=temperature,
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
        min_p=float(options.get("min_p", 0.0)),
        repetition_penalty=float(options.get("repetition_penalty", 1.0)),
        min_tokens=int(options.get("min_new_tokens", 0)),
        tau=threshold,
    )


def _max_new_tokens(options: dict[str, Any], prompt_length: int) -> int:
    if "max_new_tokens" in options:
        limit = int(options["max_new_tokens"])
    elif "max_length" in options:
        limit = int(options["max_length"]) - prompt_length
    else:
        limit = DEFAULT_NEW_TOKENS
    if limit < 1:
        raise ConfigError(f"there is nothing to generate: {limit} new tokens after a prompt of {prompt_length}")
    return limit


def _rows(input_ids: Tensor, attention_mask: Tensor | None, num_samples: int) -> list[_Row]:
    """One row per sample; each with a seed drawn from torch's generator, so that `torch.manual_seed` decides the draws."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise RequestError(
            f"attention_mask {tuple(mask.shape)} must have the shape of input_ids {tuple(input_ids.shape)}"
        )
    prompts = [ids[keep].tolist() for ids, keep in zip(input_ids, mask.bool(), strict=True)]
    if empty := [number for number, prompt in enumerate(prompts) if not prompt]:
        raise RequestError(f"rows {empty} of the batch have no tokens")
    seeds = torch.randint(2**62, (len(prompts) * num_samples,)).tolist()
    return [_Row(prompt, seeds[b * num_samples + i]) for b, prompt in enumerate(prompts) for i in range(num_samples)]


def _ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    if isinstance(value, Tensor):
        value = value.tolist()
    return frozenset(value if isinstance(value, (list, tuple)) else [value])


def _right_padded(rows: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long)
