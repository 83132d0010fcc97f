"""What is evaluated: a checkpoint in the embedded engine, or a model behind an OpenAI-compatible server. No torch at import."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipo.data.endpoint import Endpoint, EndpointSettings
from pipo.data.generator import Generator, Sample
from pipo.data.rows import Message
from pipo.evaluation.settings import Condition
from pipo.evaluation.task import Sampling

if TYPE_CHECKING:
    from pipo.engine.llm import LLM
    from pipo.engine.loading import DraftVocabulary
    from pipo.engine.quantization import Quantization
    from pipo.engine.request import SamplingParams

THINK = "<think>\n"


class Subject(Protocol):
    """A model, ready to be asked under any condition."""

    name: str
    """For readers."""
    concurrency: int
    """Samples that it can work on at the same time."""

    def describe(self) -> dict[str, Any]:
        """What decides its answers beside condition and sampling, as plain JSON: a checkpoint's fingerprint, dtype, engine; or a
        server's model and options. A run is gone on with only where this is the same."""
        ...

    def generator(self, condition: Condition, sampling: Sampling, *, record_pairs: bool) -> Generator:
        """What answers under a condition. Texts are whole: with the opening of the thinking block.

        Raises:
            PipoError: this model can't decode so.
        """
        ...

    async def prepare(self, condition: Condition) -> None:
        """Load what decoding so needs, so that no clock counts it as generation. Any number of callers may wait for it.

        Raises:
            PipoError: it can't be had.
        """
        ...

    async def aclose(self) -> None:
        """Give everything back."""
        ...


class EngineSubject:
    """A checkpoint in the embedded engine. Weights are loaded when the first sample is asked for, once for all methods.

    Args:
        path: a checkpoint folder or a hub id. subfolder: of it.
        device, dtype, max_num_seqs, max_model_len, max_prefill_positions, cache_budget_bytes, draft_vocab, kernels, quantization: as
            `pipo.engine.llm.LLM` takes them.
        device, dtype, max_num_seqs, max_model_len, max_prefill_positions, cache_budget_bytes, draft_vocab, kernels,
            cuda_graphs: as `pipo.engine.llm.LLM` takes them.

    Raises:
        CheckpointError: there is no checkpoint, or no draft vocabulary where one was named.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        subfolder: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        max_prefill_positions: int | None = None,
        cache_budget_bytes: int | None = None,
        draft_vocab: DraftVocabulary = "checkpoint",
        kernels: str | None = None,
        quantization: Quantization | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        from pipo.engine.loading import choose_draft_ids, find_checkpoint, kind_of, threshold_of

        self.name = str(path)
        self.folder = find_checkpoint(path, subfolder)
        self.kind = kind_of(self.folder)
        self.threshold = threshold_of(self.folder)
        self.concurrency = max_num_seqs
        self._device, self._dtype, self._kernels, self._quantization = device, dtype, kernels, quantization
        self._limits: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "max_prefill_positions": max_prefill_positions,
            "cache_budget_bytes": cache_budget_bytes,
            "cuda_graphs": cuda_graphs,
        }
        # A number's ids depend on the model's vocabulary, which only the engine knows.
        self._draft_ids = choose_draft_ids(draft_vocab, self.folder)
        self._limits["draft_vocab"] = draft_vocab if isinstance(draft_vocab, int) else self._draft_ids
        self._engine: LLM | None = None
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """As `Subject.describe`; nothing is loaded for it."""
        from pipo.engine.loading import describe_checkpoint

        about = describe_checkpoint(self.folder, self._device, self._dtype, self._draft_ids, self._quantization)
        return {"generator": "engine", **about, "max_model_len": self._limits["max_model_len"]}

    def generator(self, condition: Condition, sampling: Sampling, *, record_pairs: bool) -> Generator:
        """As `Subject.generator`. `record_pairs` matters for the method pipo alone: the others write no pairs.

        Raises:
            CheckpointError: the method needs another kind of checkpoint. ConfigError: it needs an MTP block.
            RequestError: a value of `sampling` is out of range.
        """
        from pipo.engine.loading import check_method

        check_method(self.folder, condition.method)
        return _OnEngine(self, condition, _engine_params(condition, sampling, record_pairs))

    def engine(self, method: str) -> LLM:
        """The engine that decodes so. Only the latest is kept, and all share one model in memory.

        Raises:
            PipoError: it can't be had.
        """
        from pipo.engine.llm import LLM

        with self._lock:
            before = self._engine
            if before is None:
                wanted: dict[str, Any] = {"device": self._device, "dtype": self._dtype}
                wanted |= {"kernels": self._kernels, "quantization": self._quantization}
                self._engine = LLM(self.folder, method=method, **wanted, **self._limits)
            elif before.method != method:
                before.wait_until_idle()
                self._engine = LLM(before.model, method=method, tokenizer=before.tokenizer, **self._limits)
                # A model in memory does not bring what the checkpoint says beside its config.
                self._engine.eos_token_ids = before.eos_token_ids
            assert self._engine is not None
            return self._engine

    async def prepare(self, condition: Condition) -> None:
        """As `Subject.prepare`."""
        if self._engine is None or self._engine.method != condition.method:
            await asyncio.to_thread(self.engine, condition.method)

    async def aclose(self) -> None:
        """Wait for the step that still runs after its callers were cancelled, and let the model go."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.wait_until_idle)


class _OnEngine:
    """The embedded engine under one condition."""

    def __init__(self, subject: EngineSubject, condition: Condition, params: SamplingParams) -> None:
        self._subject = subject
        self._condition = condition
        self._params = params

    def describe(self) -> dict[str, Any]:
        """As `Generator.describe`."""
        return {**self._subject.describe(), "condition": self._condition.key}

    async def generate(self, messages: list[Message], seeds: list[int]) -> list[Sample]:
        """As `Generator.generate`."""
        from pipo.engine.generator import EngineGenerator

        engine = await asyncio.to_thread(self._subject.engine, self._condition.method)
        generator = EngineGenerator(engine, self._params, self._subject.name, whole=True)
        return await generator.generate(messages, seeds)


def _engine_params(condition: Condition, sampling: Sampling, record_pairs: bool) -> SamplingParams:
    from pipo.engine.request import SamplingParams

    params = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        max_tokens=sampling.max_tokens,
        max_pairs=sampling.max_pairs,
    )
    if condition.threshold is None:
        return params
    return replace(params, threshold=condition.threshold, record_pairs=record_pairs)


class EndpointSubject:
    """A model behind an OpenAI-compatible server, whose decoding is its own: the method of a condition is a label here.

    With the method pipo, requests carry the `threshold`, which `pipo serve` takes.

    Args:
        base_url: up to and with `/v1`. model: its name there. api_key: the server's key.
        fields: more fields of each request, for servers that need them.
        template_options: of the chat template (`chat_template_kwargs`), such as `enable_thinking`.
        max_requests, timeout_s, max_retries: as in `EndpointSettings`.

    Raises:
        ConfigError: a setting is out of range, or the client is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        fields: Mapping[str, Any] | None = None,
        template_options: Mapping[str, Any] | None = None,
        max_requests: int = 64,
        timeout_s: float = 3600.0,
        max_retries: int = 5,
    ) -> None:
        self.name = model
        self.concurrency = max_requests
        self._fields = dict(fields or {})
        self._settings = EndpointSettings(
            base_url=base_url,
            model=model,
            template_options=dict(template_options or {}),
            stream=True,
            max_requests=max_requests,
            timeout_s=timeout_s,
            max_retries=max_retries,
        )
        self._api_key = api_key
        self._opened = [Endpoint(self._settings, api_key)]

    def describe(self) -> dict[str, Any]:
        """As `Subject.describe`: what decides the text, and not where the server stands."""
        options = dict(self._settings.template_options)
        return {"generator": "endpoint", "model": self.name, "fields": self._fields, "template_options": options}

    def generator(self, condition: Condition, sampling: Sampling, *, record_pairs: bool) -> Generator:
        """As `Subject.generator`. Servers tell no pairs, so that `record_pairs` does nothing."""
        fields = {**_request_fields(condition, sampling), **self._fields}
        endpoint = Endpoint(replace(self._settings, sampling=fields), self._api_key)
        self._opened.append(endpoint)
        return _OnServer(endpoint)

    async def prepare(self, condition: Condition) -> None:
        """As `Subject.prepare`: a server is ready or not."""

    async def aclose(self) -> None:
        """Close the connections."""
        for endpoint in self._opened:
            await endpoint.aclose()


class _OnServer:
    """A server under one condition."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def describe(self) -> dict[str, Any]:
        """As `Generator.describe`."""
        return self._endpoint.describe()

    async def generate(self, messages: list[Message], seeds: list[int]) -> list[Sample]:
        """As `Generator.generate`."""
        return [_with_opening(sample) for sample in await self._endpoint.generate(messages, seeds)]


def _request_fields(condition: Condition, sampling: Sampling) -> dict[str, Any]:
    """The fields of a request. What is off by default and no part of OpenAI's own interface is left out: many servers refuse it."""
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
    }
    extensions = {"top_k": sampling.top_k or None, "min_p": sampling.min_p or None, "max_pairs": sampling.max_pairs}
    fields |= {name: value for name, value in extensions.items() if value is not None}
    if sampling.max_tokens is not None:
        fields["max_tokens"] = sampling.max_tokens
    if condition.threshold is not None:
        fields["threshold"] = condition.threshold
    return fields


def _with_opening(sample: Sample) -> Sample:
    """A text that closes a thinking block which it does not open: the server's chat template has opened it."""
    if "</think>" not in sample.text or "<think>" in sample.text.partition("</think>")[0]:
        return sample
    return replace(sample, text=THINK + sample.text)
