"""Rollouts: the text that the student writes with its real decoding procedure, gate and all. Section 3.2 of the paper.

The one place of training that touches the engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any, Protocol

import torch

from pipo.engine.llm import LLM
from pipo.engine.loading import generation_defaults
from pipo.engine.request import PairRecord as PairRecord
from pipo.engine.request import RequestOutput, SamplingParams
from pipo.errors import ConfigError, EndpointError
from pipo.model.adapter import tokenizer_home
from pipo.model.modeling import PipoForCausalLM
from pipo.pairing import IGNORE_INDEX, Slots, pair_slots_from_tokens
from pipo.training.config import RolloutSettings
from pipo.training.endpoint import Endpoint

ALWAYS_COMMIT, NEVER_COMMIT = 0.0, 1.01


@dataclass(frozen=True)
class Rollout:
    """One answer of the student, pair by pair.

    `threshold`: the gate's τ. `finish_reason`: `stop`, or `length` where the answer was cut off (`error`: the model's numbers
    were not finite, and the answer ends before them).
    """

    prompt_ids: list[int]
    pairs: list[PairRecord]
    finish_reason: str
    threshold: float

    @property
    def token_ids(self) -> list[int]:
        """What a user sees, the token that ended the text included."""
        return [
            token
            for p in self.pairs
            for token in ((p.token1, p.draft) if p.committed else (p.token1,))
            if token is not None
        ]

    @property
    def num_committed(self) -> int:
        """Drafts that became text."""
        return sum(pair.committed for pair in self.pairs)

    @property
    def rejected(self) -> list[bool]:
        """Per pair, whether the gate turned its draft down. A draft after the end of the text was nobody's."""
        last = len(self.pairs) - 1
        return [not p.committed and p.draft is not None and i < last for i, p in enumerate(self.pairs)]

    @property
    def finished(self) -> bool:
        """Whether the answer came to its end."""
        return self.finish_reason == "stop"


def rollout_of(output: RequestOutput, threshold: float) -> Rollout:
    """What the engine wrote with `record_pairs`."""
    assert output.pairs is not None, "rollouts need record_pairs"
    assert output.finish_reason is not None
    return Rollout(list(output.prompt_token_ids), output.pairs, output.finish_reason, threshold)


# --- as training reads it -----------------------------------------------------------------------------


def slots_of_rollout(rollout: Rollout, pad_id: int) -> Slots:
    """The slots that the student read and wrote.

    A rejected draft's slot is filler and keeps the draft as its label: there MTP and gate learn what they were wrong about.
    The filler of an odd prompt has no label, nor has that of the last pair: what was drawn there came after the end.
    """
    ids = pair_slots_from_tokens(rollout.prompt_ids, pad_id)
    filler = [False] * len(rollout.prompt_ids) + [True] * (len(ids) - len(rollout.prompt_ids))
    labels = [IGNORE_INDEX] * len(ids)
    for pair, rejected in zip(rollout.pairs, rollout.rejected, strict=True):
        draft = pair.draft if (pair.committed or rejected) and pair.draft is not None else IGNORE_INDEX
        ids += [pair.token1, draft if pair.committed else pad_id]
        labels += [pair.token1, draft]
        filler += [False, not pair.committed]
    return Slots(ids, labels, filler)


def ratios_of_rollout(rollout: Rollout, num_slots: int) -> list[float]:
    """Importance ratios `[T]` of the labels of :func:`slots_of_rollout`: `p(y) / q(y)`, where y was drawn from q, the model's own p
    after temperature, penalties and filters. 1 where there is no label.

    Tokens that q leaves out can't be drawn, so a mean over q weighted by the ratios is one over p restricted to what q keeps.

    Raises:
        EndpointError: log-probabilities are missing.
    """
    ratios: list[float] = []
    for pair in rollout.pairs:
        ratios.append(_ratio(pair.logprob1, pair.drawn_logprob1))
        ratios.append(1.0 if pair.draft is None else _ratio(pair.logprob2, pair.drawn_logprob2))
    return [1.0] * (num_slots - len(ratios)) + ratios


def _ratio(own: float | None, drawn: float | None) -> float:
    if own is None or drawn is None:
        raise EndpointError("a rollout came without the log-probabilities that importance ratios need")
    return exp(own - drawn)


# --- where rollouts come from ---------------------------------------------------------------------------


class RolloutSource(Protocol):
    """Writes one answer to each prompt."""

    def roll_out(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """In the order of the prompts. The same weights, prompt and seed give the same rollout, whatever stands beside it."""
        ...


def rollout_seed(seed: int, step: int, index: int) -> int:
    """Of one rollout: a function of the run's seed, the optimiser step and the prompt's place in the data, so neither a restart nor
    the number of processes changes it."""
    return random.Random(f"rollout-{seed}-{step}-{index}").getrandbits(63)


def draw_threshold(settings: RolloutSettings, rng: random.Random) -> float:
    """τ of one rollout. Every gate that may be set later should be met in training, the two ends included."""
    kind = rng.random()
    if kind < settings.always_share:
        return ALWAYS_COMMIT
    if kind < settings.always_share + settings.never_share:
        return NEVER_COMMIT
    if isinstance(settings.threshold, tuple):
        return rng.uniform(*settings.threshold)
    return settings.threshold


def stop_ids_of(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end a text where a checkpoint is served: the tokenizer's, and those of its generation defaults."""
    found = [tokenizer.eos_token_id, generation_defaults(tokenizer_home(folder)).get("eos_token_id")]
    return sorted({int(i) for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])})


def sampling_of(
    settings: RolloutSettings, seed: int, stop_ids: Sequence[int], unwanted: Sequence[int] = ()
) -> SamplingParams:
    """How one rollout is drawn. `unwanted`: ids that are not."""
    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        presence_penalty=settings.presence_penalty,
        max_pairs=settings.max_slots // 2,
        stop_token_ids=stop_ids,
        logit_bias=dict.fromkeys(unwanted, -100.0) or None,
        threshold=draw_threshold(settings, random.Random(seed)),
        seed=seed,
        record_pairs=True,
    )


class EngineRollouts:
    """Rollouts by the embedded engine, on the very weights that are being trained: nothing is copied, merged or cast.

    Args:
        model: as it is trained, LoRA included; not a wrapper around it.
        stop_ids: that end a text, beside those of the model's config. unwanted: ids that are not to be drawn.
        autocast: the dtype that the forward runs in, where it is another than the weights'.

    An engine lives for one call. Its caches take what memory is free then, and have given it back before the call returns.
    """

    def __init__(
        self,
        model: PipoForCausalLM,
        settings: RolloutSettings,
        stop_ids: Sequence[int] = (),
        unwanted: Sequence[int] = (),
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.stop_ids, self.unwanted = tuple(stop_ids), tuple(unwanted)
        self.autocast = autocast

    def roll_out(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """See :class:`RolloutSource`.

        Raises:
            RequestError: a prompt that leaves no room in the model's context.
        """
        params = [sampling_of(self.settings, seed, self.stop_ids, self.unwanted) for seed in seeds]
        with _decoding(self.model, self.autocast):
            engine = LLM(
                self.model,
                max_num_seqs=self.settings.max_num_seqs,
                cache_budget_bytes=self.settings.cache_budget_bytes,
                cuda_graphs=False,  # of an engine that lives for one batch, and beside a training step's memory
            )
            outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
            engine.engine.runner.reset()
        return [rollout_of(output, setting.tau) for output, setting in zip(outputs, params, strict=True)]


@contextmanager
def _decoding(model: PipoForCausalLM, autocast: torch.dtype | None) -> Iterator[None]:
    """The model without dropout and as its forward runs it; on a GPU, memory that others hold idle is free to take, and given back."""
    device = model.device.type
    training = model.training
    model.eval()
    try:
        _release(device)
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        model.train(training)
        _release(device)


def _release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


class ServedRollouts:
    """Rollouts by a server that takes weight updates: `pipo serve --allow-weight-updates`, on this machine or others that see the
    same folders.

    Raises:
        EndpointError: the server can't be reached, or has no PIPO model.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: RolloutSettings,
        stop_ids: Sequence[int] = (),
        unwanted: Sequence[int] = (),
    ) -> None:
        if settings.api != "pipo":
            raise ConfigError(
                f"rollout.api: {settings.api} needs a plugin that makes it write pairs and return them, which is not part of "
                "this version; use api: pipo with `pipo serve --allow-weight-updates`"
            )
        self.endpoint = endpoint
        self.settings = settings
        self.stop_ids, self.unwanted = tuple(stop_ids), tuple(unwanted)
        served = [model["id"] for model in endpoint.get("/v1/models")["data"] if model.get("method") == "pipo"]
        if not served:
            raise EndpointError(f"{endpoint.url} serves no PIPO model, which alone writes pairs")
        self.model = served[0]

    def update_weights(self, folder: Path) -> None:
        """Let the server take over the weights of a checkpoint, which it reads itself.

        Raises:
            EndpointError: it can't.
        """
        self.endpoint.post("/update_weights_from_disk", {"model_path": str(folder.resolve()), "model": self.model})

    def roll_out(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Rollout]:
        """See :class:`RolloutSource`.

        Raises:
            EndpointError: the server refused a request, or went away.
        """
        params = [sampling_of(self.settings, seed, self.stop_ids, self.unwanted) for seed in seeds]
        with ThreadPoolExecutor(self.settings.max_num_seqs) as pool:
            return list(pool.map(self._ask, prompts, params))

    def _ask(self, prompt: list[int], params: SamplingParams) -> Rollout:
        fields = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "max_pairs", "threshold", "seed")
        assert params.max_pairs is not None
        body: dict[str, Any] = {name: getattr(params, name) for name in fields}
        body |= {"model": self.model, "prompt": prompt, "stop_token_ids": list(params.stop_token_ids)}
        if params.logit_bias is not None:
            body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
        # Two tokens to a pair at most: so pairs are the limit, and not OpenAI's few tokens.
        body |= {"max_tokens": 2 * params.max_pairs, "return_pairs": True}
        (choice,) = self.endpoint.post("/v1/completions", body)["choices"]
        return Rollout(prompt, list(_records(choice["pairs"])), choice["finish_reason"], params.tau)


def _records(pairs: Iterable[dict[str, Any]]) -> Iterator[PairRecord]:
    for pair in pairs:
        yield PairRecord(
            token1=pair["token1_id"],
            draft=pair["draft_id"],
            confidence=pair["confidence"],
            committed=pair["committed"],
            logprob1=pair["logprob1"],
            logprob2=pair["logprob2"],
            drawn_logprob1=pair["drawn_logprob1"],
            drawn_logprob2=pair["drawn_logprob2"],
        )
