"""Decoding in GPU graphs: SGLang's own, up to token 1's logits, and one more per batch size for what follows token 1.

SGLang captures the model's forward; its hidden states leave the graph with the logits. SGLang then draws token 1 as ever. The second
graph is captured right after the first one of its size, by SGLang's machinery, on the same static batch and the same attention
metadata, so a replay finds there what the forward before it has put in place. It holds the MTP block, the second head for all rows (a
graph can't leave out those whose draft is rejected), and the gate, unless that sees the draft, which is drawn later.

**Not run on a GPU yet.** Each graph is checked against the same computation without a graph, on random states when it is captured; with
several ranks on the first batch, because before that their graphs are not connected. A difference stops the server.

Shape legend: R requests of a batch, S of a graph's size; H width; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

from pipo.errors import PipoError, UnsupportedModelError
from pipo.integrations.sglang.hooks import Hook
from pipo.integrations.sglang.serving import served
from pipo.model.step import finite_rows

TOLERANCE = 0.02
"""Largest difference, in parts of the largest value, that the order of sums may make in half precision."""


class SecondPhase(NamedTuple):
    """What follows from token 1."""

    mtp_hidden_RH: Tensor
    """`d`, zero where it is not finite."""
    finite_R: Tensor
    """bool."""
    logits_RV: Tensor | None = None
    """Of token 2, float32; from a graph."""
    confidence_R: Tensor | None = None
    """From a graph, unless the gate sees the draft."""


class PairGraph:
    """The second phase for one batch size of SGLang's decoding graphs."""

    def __init__(self, runner: Any, key: Any, forward_batch: Any, attn_backend: Any) -> None:
        """Capture, on the static batch that SGLang's graph `key` was just captured with."""
        self._runner, self._key = runner, replace(key, variant_label=f"{key.variant_label or ''}+pair")
        self._model = runner.model_runner.model
        self._forward_batch, self._attn_backend = forward_batch, attn_backend
        config, size, device = self._model.config, len(forward_batch.input_ids), forward_batch.input_ids.device
        self._hidden_SH = torch.randn(size, config.hidden_size, dtype=runner.model_runner.dtype, device=device)
        self._token1_S = torch.randint(0, config.vocab_size, (size,), device=device)
        after_warmup = getattr(attn_backend, "on_after_cuda_graph_warmup", None)
        runner.backend.capture_one(self._key, self._run, capture_inputs=None, post_warmup_hook=after_warmup)
        self._checked = False
        if get_parallel().tp_size == 1:
            self._check()

    def replay(self, hidden_RH: Tensor, token1_R: Tensor) -> SecondPhase:
        """After SGLang's graph of this size was replayed for the same batch. What it gives is overwritten by the next step."""
        num = len(token1_R)
        self._hidden_SH[:num].copy_(hidden_RH)
        self._token1_S[:num].copy_(token1_R)
        if not self._checked:
            self._check()
        mtp_hidden_SH, finite_S, *rest = self._replay()
        return SecondPhase(mtp_hidden_SH[:num], finite_S[:num], *(None if one is None else one[:num] for one in rest))

    @torch.no_grad()
    def _run(self) -> SecondPhase:
        model, batch = self._model, self._forward_batch
        with forward_context(ForwardContext(attn_backend=self._attn_backend), forward_batch=batch):
            mtp_hidden_SH, finite_S = finite_rows(model.draft(self._token1_S, self._hidden_SH, batch.positions, batch))
            logits_SV = model.second_logits(mtp_hidden_SH, batch)
            sees_draft = model.confidence_head.draft is not None
            confidence_S = None if sees_draft else model.confidence(self._hidden_SH, mtp_hidden_SH)
        return SecondPhase(mtp_hidden_SH, finite_S, logits_SV, confidence_S)

    def _replay(self) -> SecondPhase:
        with self._runner.model_context(), self._runner.backend.replay_session():
            found: SecondPhase = self._runner.backend.replay(self._key, self._forward_batch)
        return found

    def _check(self) -> None:
        """Compare a replay with the same computation without a graph.

        Raises:
            PipoError: they differ.
        """
        expected = [None if one is None else one.clone() for one in self._run()]
        for name, one, other in zip(SecondPhase._fields, expected, self._replay(), strict=True):
            if one is None or other is None:
                continue
            one, other = one.float().nan_to_num(), other.float().nan_to_num()
            difference, largest = float((one - other).abs().max()), float(one.abs().max())
            if not difference <= TOLERANCE * max(largest, 1e-3):
                raise PipoError(
                    f"the GPU graph of batch size {len(self._token1_S)} computes another {name}: it differs by {difference:.3g}"
                    f" where values reach {largest:.3g}; start with --disable-cuda-graph and report this"
                )
        self._checked = True


# --- hooks ------------------------------------------------------------------------------------------------


def after_prepare(prepared: tuple[Any, Any, Any], runner: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang has made the static batch of a size."""
    if served() is not None:
        runner.pipo_prepared = prepared[:2]


def after_capture(
    _: None,
    runner: Any,
    size: int,
    forward: Any,
    stream_idx: int | None = None,
    variant_label: str | None = None,
    attention_variant: str | None = None,
) -> None:
    """SGLang has captured the forward of a size."""
    if served() is None:
        return
    num_tokens = size * runner.captured_req_width
    key = runner._make_graph_key(
        runner._capture_graph_size(bs=size, num_tokens=num_tokens), stream_idx, variant_label, attention_variant
    )
    graphs = runner.__dict__.setdefault("pipo_graphs", {})
    graphs[key] = PairGraph(runner, key, *runner.pipo_prepared)


def after_execute(output: Any, runner: Any, forward_batch: Any, pp_proxy_tensors: Any = None) -> None:
    """SGLang has replayed a graph."""
    if served() is not None:
        output.pipo_graph = runner.pipo_graphs[runner._replay_graph_key]


def around_compatibility(apply: Callable[[Any], None], server_args: Any) -> None:
    """Which graphs a server captures: those for decoding, with CUDA. Prompts are read without: their graphs pad what the MTP block is
    to read unpadded.

    Raises:
        UnsupportedModelError: graphs were asked for that pairs do not run in.
    """
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    apply(server_args)
    model_config_of(server_args)  # from here on it is known what is served
    if served() is None:
        return
    settings = resolving_view(server_args)
    graphs = settings.cuda_graph_config
    if settings.device != "cuda":  # other devices have runners of their own
        for phase in Phase.ALL:
            graphs = with_phase(graphs, phase, backend=Backend.DISABLED)
        declare_resolution(server_args, "pipo", cuda_graph_config=graphs)
        return
    if graphs.decode.backend not in (Backend.FULL, Backend.DISABLED):
        raise UnsupportedModelError(
            f"PIPO decodes in 'full' GPU graphs or in none, not in '{graphs.decode.backend}' ones (--cuda-graph-backend-decode)"
        )
    if graphs.prefill.backend == Backend.DISABLED:
        return
    if (Phase.PREFILL, "backend") in server_args._cuda_graph_config_locked:
        raise UnsupportedModelError(
            f"PIPO reads prompts without GPU graphs: leave out --cuda-graph-backend-prefill {graphs.prefill.backend}"
        )
    without = with_phase(graphs, Phase.PREFILL, backend=Backend.DISABLED)
    declare_resolution(server_args, "pipo", cuda_graph_config=without)


RUNNER = "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
HOOKS = (
    Hook(f"{RUNNER}.capture_prepare", "after", after_prepare, ("self", "size", "stream_idx", "num_tokens")),
    Hook(
        f"{RUNNER}.capture_one_shape",
        "after",
        after_capture,
        ("self", "size", "forward", "stream_idx", "variant_label", "attention_variant"),
    ),
    Hook(f"{RUNNER}.execute", "after", after_execute, ("self", "forward_batch", "pp_proxy_tensors")),
    Hook("arg_groups.cuda_graph_hook.apply_cuda_graph_compatibility", "around", around_compatibility, ("server_args",)),
)
