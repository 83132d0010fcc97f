"""`LLM`: load a checkpoint, generate. The Python interface of the embedded engine."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipo.data.conversation import encode_text, load_tokenizer, render_chat
from pipo.engine.baselines import BaseRunner, MtpRunner, RegularRunner, SpeculativeRunner
from pipo.engine.capture import capture_for
from pipo.engine.constraint import ConstraintFactory
from pipo.engine.core import Engine
from pipo.engine.detokenize import Detokenizer, TextDecoder
from pipo.engine.loading import (
    OF_CHECKPOINT,
    DraftVocabulary,
    accept_model,
    cache_budget,
    choose_draft_ids,
    copy_weights,
    generation_defaults,
    ids_of,
    load_model,
    use_kernels,
)
from pipo.engine.prompts import default_prefill_positions
from pipo.engine.quantization import Quantization, is_quantized
from pipo.engine.request import RequestOutput, SamplingParams, StreamEvent
from pipo.engine.runner import PipoRunner, Runner
from pipo.engine.sequence import Sequence, StepText
from pipo.engine.stepper import Stepper, Subscription
from pipo.errors import CheckpointError, ConfigError, RequestError, UnsupportedModelError
from pipo.model.adapter import tokenizer_home
from pipo.model.config import DEFAULT_THRESHOLD
from pipo.model.files import find_checkpoint
from pipo.model.modeling import PipoForCausalLM
from pipo.model.sampling import derive_seed
from pipo.pair_memory import PairMemory

BASELINES: dict[str, type[BaseRunner]] = {"regular": RegularRunner, "mtp": MtpRunner, "speculative": SpeculativeRunner}
Prompt = str | Mapping[str, Any] | Seq[Mapping[str, Any]]


class LLM:
    """A model ready to generate.

    Args:
        model: a checkpoint folder, a hub id, or a model in memory, whose weights are then used without a copy.
        device: `cpu`, `cuda`, …; by default CUDA where there is a GPU (for a model in memory, where it is).
        dtype: `float32`, `bfloat16`, `float16`; by default the checkpoint's.
        method: `pipo` on a PIPO checkpoint; `regular`, `mtp` (no verification) or `speculative` on a base checkpoint.
        tokenizer: for a model in memory; by default the checkpoint's. Without one, prompts are token ids and texts empty.
        max_num_seqs: samples that decode together at most.
        max_model_len: positions a sample may hold: **pairs** for PIPO (up to two tokens each), tokens otherwise.
        cache_budget_bytes: memory for caches at most; by default half of the free RAM, or 85% of the free GPU memory.
        prefix_cache_bytes: memory for the caches of finished prompts and replies, which later requests that begin alike take over
            (PIPO only; 0 is off). After changing the weights of a model in memory, call :meth:`forget`.
        remember_pairs: tokens of finished replies whose pairing is remembered, so that a later prompt reads them as they were written.
        seed: of requests that bring none; by default different each time.
        draft_vocab: what drafts are drawn from. `checkpoint`: the checkpoint's `draft_vocab.json` where it has one (a model in memory has
            none), else the whole vocabulary; `None`: the whole; a file that `pipo draft-vocab` wrote, or its folder; token ids; or a
            number, for the first so many ids. `regular` drafts nothing, and leaves it alone.
        kernels: on a CPU, `native`: decode by kernels of our own, compiled on first use; `torch`: PyTorch's; `auto`: native for bfloat16
            weights. By default `auto` for a checkpoint, and `torch` for a model in memory. What runs through ours is in `fusion`.
        max_prefill_positions: positions of prompts (as for `max_model_len`) that are read between two decoding steps at most: a
            longer prompt is read in chunks, and others write on meanwhile. By default 512 on a CPU, else 8192.
        cuda_graphs: decode by captured CUDA graphs, one per batch size, with the host one step behind. By default on a GPU, where the
            model's step can be captured.
        quantization: `int8` or `fp8`: weights of eight bits in the linear layers of backbone and MTP block. Only for a checkpoint that
            is loaded, and its weights can't be replaced later.

    Raises:
        CheckpointError, ConfigError, KernelError, UnsupportedModelError
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        method: str = "pipo",
        tokenizer: Any = None,
        subfolder: str | None = None,
        attn_implementation: str | None = None,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        cache_budget_bytes: int | None = None,
        prefix_cache_bytes: int = 0,
        remember_pairs: int = 0,
        seed: int | None = None,
        draft_vocab: DraftVocabulary = OF_CHECKPOINT,
        kernels: str | None = None,
        max_prefill_positions: int | None = None,
        cuda_graphs: bool | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        if method not in ("pipo", *BASELINES):
            raise ConfigError(f"method must be one of pipo, {', '.join(BASELINES)}, got {method!r}")
        self.method = method
        if isinstance(model, nn.Module):
            self.model = accept_model(model, method, device, dtype, quantization)
            self.tokenizer = tokenizer
            generation: dict[str, Any] = {}
            folder = None
        else:
            folder = find_checkpoint(model, subfolder)
            self.model = load_model(folder, method, device, dtype, attn_implementation, quantization)
            home = tokenizer_home(folder)
            self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(home)
            generation = generation_defaults(home)
        self.fusion = use_kernels(self.model, kernels, shared=isinstance(model, nn.Module))
        text_config = self.model.backbone.config
        self.vocab_size = int(text_config.vocab_size)
        self.eos_token_ids = ids_of(text_config.eos_token_id) | ids_of(generation.get("eos_token_id"))
        if self.tokenizer is not None and getattr(self.tokenizer, "eos_token_id", None) is not None:
            self.eos_token_ids |= {int(self.tokenizer.eos_token_id)}
        self._decoder = TextDecoder(self.tokenizer) if self.tokenizer is not None else None
        draft_ids = choose_draft_ids(draft_vocab, folder, self.vocab_size)
        capture = capture_for(self.model.device, cuda_graphs)
        runner: Runner = (
            PipoRunner(self.model, prefix_cache_bytes, draft_ids, capture)
            if isinstance(self.model, PipoForCausalLM)
            else BASELINES[method](self.model, draft_ids, capture)
        )
        if cuda_graphs and runner.graphs is None:
            raise ConfigError(
                f"cuda_graphs=True (--cuda-graphs): a step of the method {method!r} waits for the host and can't be captured; leave it out"
            )
        budget = cache_budget(runner, self.model.device, cache_budget_bytes)
        self.engine = Engine(
            runner,
            budget,
            max_positions=int(text_config.max_position_embeddings),
            max_num_seqs=max_num_seqs,
            max_prefill_positions=(
                default_prefill_positions(self.model.device) if max_prefill_positions is None else max_prefill_positions
            ),
            max_model_len=max_model_len,
        )
        self._constraints = ConstraintFactory(self.tokenizer, self.vocab_size, self.eos_token_ids)
        self.pair_memory = PairMemory(remember_pairs)
        self.engine.on_finish = lambda sequence: self.pair_memory.remember([*sequence.prompt_pairs, *sequence.pairs])
        self._seeds = random.Random(seed)
        self._request_ids = itertools.count()
        self._lock = threading.RLock()
        self._stepper = Stepper(self.engine, self._lock)
        if runner.graphs is not None:
            self._try_graphs(runner, required=cuda_graphs is True)

    def _try_graphs(self, runner: Runner, required: bool) -> None:
        """Capture a first step now, so that a model whose step can't be captured is known before it serves."""
        params = SamplingParams(temperature=0, threshold=0.0, max_tokens=4, ignore_eos=True, seed=0)
        try:
            self.generate({"prompt_token_ids": [0]}, params)
        except UnsupportedModelError as error:
            if required:
                raise
            warnings.warn(f"{error}; decoding without, which is slower", stacklevel=3)
            runner.graphs = None
        runner.reset()
        self.forget()

    @property
    def threshold(self) -> float:
        """τ of requests that name none."""
        return self.model.config.threshold if isinstance(self.model, PipoForCausalLM) else DEFAULT_THRESHOLD

    # --- generating

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        on_finish: Callable[[], None] | None = None,
    ) -> list[RequestOutput]:
        """Generate for one prompt or many, together.

        Args:
            prompts: each a text, `{"prompt_token_ids": […]}`, or chat messages (`[{"role": …, "content": …}]`).
            params: for all prompts, or one per prompt.
            on_finish: called each time a sample finishes, for progress.

        Returns:
            Results, prompts × n, in order.

        Raises:
            RequestError: a prompt or parameters that can't be served; nothing has been generated then.
        """
        listed = _as_prompts(prompts)
        settings = _as_params(params, len(listed))
        requests = [self.prepare(prompt, setting) for prompt, setting in zip(listed, settings, strict=True)]
        samples = [sequence for request in requests for sequence in request]
        pending = set(map(id, samples))

        def listen(sequence: Sequence, step: StepText) -> None:
            if sequence.finished:
                pending.discard(id(sequence))
                if on_finish is not None:
                    on_finish()

        with self._lock:
            added: list[int] = []
            try:
                for request in requests:
                    self.engine.add(request, listen)
                    added.append(request[0].request_id)
                while pending:
                    self.engine.step()
            except BaseException:
                for request_id in added:
                    self.engine.abort(request_id)
                raise
        return [sequence.output() for sequence in samples]

    def forget(self) -> None:
        """After a change of weights or gate: drop all kept prefixes, captured steps, and how replies were paired; take the draft
        vocabulary's rows over anew."""
        with self._lock:
            if self.engine.runner.graphs is not None:
                self.engine.runner.graphs.forget_weights()
            if (vocab := self.engine.runner.sampling.draft_vocab) is not None:
                vocab.refresh()
            if isinstance(self.engine.runner, PipoRunner) and self.engine.runner.prefixes is not None:
                self.engine.runner.prefixes.clear()
            self.pair_memory.clear()

    def load_weights(self, path: str | Path) -> None:
        """Take over the weights of another checkpoint of this model, in place, between two steps; kept prefixes are forgotten.

        What drafts are drawn from stays, whatever the folder says of it.

        Args:
            path: a folder: a whole checkpoint, or an adapter beside its base.

        Raises:
            CheckpointError: it can't be read, or is of another model; or these weights are quantised. RequestError: samples wait or run.
                Then nothing has changed.
        """
        if is_quantized(self.model):
            raise CheckpointError(
                "quantised weights can't be replaced in place: load the other checkpoint in a new LLM"
            )
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is no folder on this machine: weights are taken over from a checkpoint's folder"
            )
        fresh = load_model(folder, self.method, "cpu", self.model.dtype, None)
        with self._lock:
            if self.engine.has_work:
                number = sum(map(len, (self.engine.waiting, self.engine.reading, self.engine.running)))
                raise RequestError(
                    f"{number} samples wait or run, half of them would be another model's: try again when they are done"
                )
            copy_weights(fresh, self.model)
            self.forget()

    def wait_until_idle(self) -> None:
        """Wait until all that asyncio callers asked for has ended or was cancelled: a program that exits amid a step crashes."""
        self._stepper.wait_until_idle()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamEvent, None, None]:
        """Generate for one prompt; an event per step of each sample, as they come. Closing the iterator aborts."""
        samples = self.prepare(prompt, params or SamplingParams())
        events: list[StreamEvent] = []
        with self._lock:
            self.engine.add(samples, lambda sequence, step: events.append(sequence.event(step)))
        running = len(samples)
        try:
            while running:
                with self._lock:
                    if not events:
                        self.engine.step()
                    ready, events[:] = list(events), []
                for event in ready:
                    running -= event.finish_reason is not None
                    yield event
        finally:
            if running:
                with self._lock:
                    self.engine.abort(samples[0].request_id)

    async def astream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[StreamEvent, None]:
        """As :meth:`stream`, for asyncio: many may run at once and decode together. Cancelling or closing aborts."""
        samples = await asyncio.to_thread(self.prepare, prompt, params or SamplingParams())
        async with aclosing(self.run_requests([samples])) as events:
            async for _, event in events:
                yield event

    async def agenerate(self, prompt: Prompt, params: SamplingParams | None = None) -> list[RequestOutput]:
        """The finished samples of one prompt, for asyncio."""
        done: dict[int, RequestOutput] = {}
        async for event in self.astream(prompt, params):
            if event.finish_reason is not None:
                done[event.index] = event.output
        return [done[index] for index in sorted(done)]

    async def run_requests(self, requests: list[list[Sequence]]) -> AsyncGenerator[tuple[int, StreamEvent], None]:
        """Run requests that :meth:`prepare` made: the number of the request and an event, as they come. Closing aborts what still runs."""
        subscription = Subscription(requests, asyncio.get_running_loop())
        running = sum(map(len, requests))
        self._stepper.submit(subscription)
        try:
            while running:
                letter = await subscription.queue.get()
                if isinstance(letter, BaseException):
                    raise letter
                running -= letter[1].finish_reason is not None
                yield letter
        finally:
            if running:
                self._stepper.cancel(subscription)

    # --- requests

    def prepare(self, prompt: Prompt, params: SamplingParams) -> list[Sequence]:
        """The samples of one request, checked and ready for :meth:`run_requests`. Any thread may call this; it never waits for a step.

        Raises:
            RequestError: a prompt or parameters that can't be served (`ContextLengthError`: too long).
        """
        arrival_s = time.perf_counter()
        prompt_ids, text = self.encode(prompt)
        params.validate(self.vocab_size)
        if params.threshold is None:
            params = replace(params, threshold=self.threshold)
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request_id = next(self._request_ids)
        prompt_pairs = self.pair_memory.pack(prompt_ids)  # one list for all samples: they share a prefill
        samples = [
            Sequence(
                request_id=request_id,
                index=index,
                prompt_ids=prompt_ids,
                prompt_pairs=prompt_pairs,
                params=params,
                seed=derive_seed(seed, index),
                stop_ids=frozenset(stops),
                max_tokens=params.max_tokens or 2 * self.engine.max_model_len,
                detokenizer=Detokenizer(self._decoder, params.stop_strings),
                arrival_s=arrival_s,
                prompt=text,
                constraint=self._constraints.build(params),
            )
            for index in range(params.n)
        ]
        self.engine.check(samples)
        return samples

    def encode(self, prompt: Prompt) -> tuple[list[int], str | None]:
        """Token ids of a prompt, and its text where it has one.

        Raises:
            RequestError: empty, of an unknown form, or with ids outside the vocabulary.
        """
        text: str | None = None
        if isinstance(prompt, str):
            text = prompt
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer; pass {'prompt_token_ids': [...]} instead of a text")
            ids = encode_text(self.tokenizer, prompt)
        elif isinstance(prompt, Mapping):
            if "prompt_token_ids" not in prompt:
                raise RequestError(f"a prompt given as a mapping needs prompt_token_ids, got keys {sorted(prompt)}")
            ids = list(prompt["prompt_token_ids"])
        else:
            text = render_chat(self.tokenizer, prompt)
            ids = encode_text(self.tokenizer, text, add_special_tokens=False)
        if not ids:
            raise RequestError("the prompt is empty: it has no tokens")
        wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.vocab_size]
        if wrong:
            raise RequestError(f"the prompt has ids outside the vocabulary of {self.vocab_size}: {wrong[:5]}")
        return ids, text


def _as_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    # One chat is a list of messages; several prompts are a list of texts, mappings with ids, or chats.
    if listed and all(isinstance(item, Mapping) and "role" in item for item in listed):
        return [listed]
    return listed


def _as_params(params: SamplingParams | Seq[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(f"{num_prompts} prompts need as many SamplingParams, or one for all; got {len(params)}")
    return list(params)
