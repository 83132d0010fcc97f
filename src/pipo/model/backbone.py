"""The backbone: any Hugging Face decoder, unmodified, and what PIPO needs to know about it.

A decoder is run on embeddings or latents through `inputs_embeds`. The MTP block is one more layer of the decoder's own
class, and is called exactly as the decoder called its *template layer* (the last full-attention layer) for the same
pairs: same rotary embeddings, same mask. So nothing here depends on how a family computes those.

Shape legend: B batch, L pairs (or tokens, for a regular model), H width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import Cache

from pipo.errors import UnsupportedModelError
from pipo.losses.head import LogitScale, OutputMap

LayerCall = dict[str, Any]
"""The keyword arguments with which a decoder called its template layer."""

NO_ATTENTION = "it has no attention layer whose cache an MTP block could share positions with"
REFUSED = {
    "gemma3n": "its layers read per-layer embeddings of token ids, which latents do not have",
    "gemma3n_text": "its layers read per-layer embeddings of token ids, which latents do not have",
    "gemma4": "its layers read per-layer embeddings of token ids, which latents do not have",
    "gemma4_text": "its layers read per-layer embeddings of token ids, which latents do not have",
    "mamba": NO_ATTENTION,
    "mamba2": NO_ATTENTION,
    "falcon_mamba": NO_ATTENTION,
    "rwkv": NO_ATTENTION,
    "xlstm": NO_ATTENTION,
    "recurrent_gemma": NO_ATTENTION,
    "minimax": "it needs a cache of its own kind, which has no place for an MTP block",
    "longcat_flash": "each of its layers holds two attention layers, which share no place in a cache",
    "bert": "it is an encoder",
    "t5": "it is an encoder-decoder",
    "gpt2": "its positions are added inside the decoder to every input, and its layers are not built from a config and an index",
    "opt": "its positions are added inside the decoder to every input",
}
"""Families that can't be supported, with the reason. Others are checked when they are built."""

REFINED_LOGITS = 128
"""Per row, the logits that a CPU computes again in float32 where the head is narrower."""

_calls: ContextVar[list[LayerCall] | None] = ContextVar("template_layer_calls", default=None)


def _record_call(module: nn.Module, args: tuple[Any, ...], kwargs: LayerCall) -> None:
    calls = _calls.get()
    if calls is not None:
        calls.append(kwargs)


@contextmanager
def _recording() -> Iterator[list[LayerCall]]:
    calls: list[LayerCall] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise `UnsupportedModelError` for a family that PIPO is known not to fit."""
    reason = REFUSED.get(config.model_type)
    if reason is not None:
        raise UnsupportedModelError(f"PIPO does not support the family {config.model_type!r}: {reason}")


def build_causal_lm(config: PreTrainedConfig, dtype: torch.dtype | None, attention: str | None = None) -> nn.Module:
    """A freshly initialised regular model of `config`'s family (its `…ForCausalLM`).

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config, or not with this attention
            implementation; or PIPO refuses the family.
    """
    refuse_unsupported(config)
    kwargs: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if attention is not None:
        kwargs["attn_implementation"] = attention
    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, **kwargs)
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers can't build a causal language model of the family {config.model_type!r}: {error}"
        ) from error
    return model


class Backbone:
    """A view of a decoder: not a module, it owns no weights. The head is the model's, which may replace it.

    Raises:
        UnsupportedModelError: the decoder is not a stack of layers that PIPO can run and copy the kind of.
    """

    def __init__(self, decoder: Any, config: PreTrainedConfig) -> None:
        refuse_unsupported(config)
        for part in ("layers", "norm"):
            if not hasattr(decoder, part):
                raise UnsupportedModelError(
                    f"PIPO does not support the family {config.model_type!r}: its decoder has no `{part}`"
                )
        self.decoder = decoder
        self.config = config
        self.hidden_size = int(config.hidden_size)
        self.num_layers = len(decoder.layers)
        self.template_index = _template_index(config, self.num_layers)
        self.template_layer: nn.Module = decoder.layers[self.template_index]
        self.fusion: Any = None
        """The kernels of our own that this model decodes by: a :class:`pipo.model.fused.Fusion`."""
        self.template_layer.register_forward_pre_hook(_record_call, with_kwargs=True)

    # --- parts of the backbone's own kind

    def new_norm(self, size: int) -> nn.Module:
        """A norm over `size` features of the backbone's own class and epsilon."""
        norm = self.decoder.norm
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        try:
            made: nn.Module = type(norm)(size) if eps is None else type(norm)(size, eps=eps)
        except TypeError as error:
            raise UnsupportedModelError(
                f"PIPO does not support the family {self.config.model_type!r}: its {type(norm).__name__} can't be built for another width"
            ) from error
        return made

    def new_layer(self, cache_index: int) -> nn.Module:
        """A fresh layer of the template layer's class, which keeps its keys and values at `cache_index` of a cache."""
        try:
            layer: nn.Module = type(self.template_layer)(self.config, self.template_index)
        except TypeError as error:
            raise UnsupportedModelError(
                f"PIPO does not support the family {self.config.model_type!r}: its {type(self.template_layer).__name__} "
                "is not built from a config and a layer index"
            ) from error
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = cache_index  # type: ignore[assignment]
        return layer

    # --- running it

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings `[..., H]` of token ids `[...]`, as the family scales them."""
        return self.decoder.get_input_embeddings()(ids)  # type: ignore[no-any-return]

    def run(
        self,
        inputs_BLH: Tensor,
        position_ids_BL: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, LayerCall]:
        """The decoder's output after its final norm, `[B, L, H]`, and how it called its template layer."""
        if self.fusion is not None and self.fusion.stack is not None:
            step = self.fusion.stack.run(inputs_BLH, position_ids_BL, attention_mask, cache)
            if step is not None:
                return step  # type: ignore[no-any-return]
        with _recording() as calls:
            out = self.decoder(
                inputs_embeds=inputs_BLH,
                position_ids=position_ids_BL,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return out.last_hidden_state, calls[-1]

    def logit_scale(self) -> LogitScale:
        """The family's logit scale and soft cap."""
        return LogitScale(
            divisor=getattr(self.config, "logits_scaling", None),  # granite
            factor=getattr(self.config, "logit_scale", None),  # cohere
            cap=getattr(self.config, "final_logit_softcapping", None),  # gemma
        )

    def scale_logits(self, logits: Tensor) -> Tensor:
        """The family's logit scale and soft cap, applied to what the head matrix gives."""
        return self.logit_scale().apply(logits)

    def sampling_logits(self, head: nn.Module, hidden_BH: Tensor) -> Tensor:
        """Logits `[B, V]` to draw from, scaled and capped, float32 also where the weights are not.

        Sums rounded to bfloat16 would be off by up to 0.06 at a magnitude of 16. A GPU keeps the sums in float32. A CPU can't;
        there the `REFINED_LOGITS` largest of each row, which hold the mass that is drawn from, are computed again in float32.
        Autocast, under which rollouts run where training does, would round them all.
        """
        with torch.autocast(hidden_BH.device.type, enabled=False):
            return self._float32_logits(head, hidden_BH)

    def _float32_logits(self, head: nn.Module, hidden_BH: Tensor) -> Tensor:
        if isinstance(head, nn.Linear):
            hidden_BH = hidden_BH.to(head.weight.dtype)
        if not isinstance(head, nn.Linear) or head.weight.dtype == torch.float32:
            return self.scale_logits(head(hidden_BH).float())
        if head.weight.is_cuda and head.weight.dtype == hidden_BH.dtype == torch.bfloat16:
            logits_BV = torch.mm(hidden_BH, head.weight.T, out_dtype=torch.float32)
            return self.scale_logits(logits_BV if head.bias is None else logits_BV + head.bias)
        if self.fusion is not None:
            exact_BV = self.fusion.logits(head, hidden_BH)
            if exact_BV is not None:
                return self.scale_logits(exact_BV)
        logits_BV = head(hidden_BH).float()
        ids_BK = logits_BV.topk(min(REFINED_LOGITS, logits_BV.shape[-1])).indices
        exact_BK = torch.bmm(head.weight[ids_BK].float(), hidden_BH.float()[:, :, None])[:, :, 0]
        if head.bias is not None:
            exact_BK += head.bias[ids_BK]
        return self.scale_logits(logits_BV.scatter(1, ids_BK, exact_BK))

    def output_map(self, head: nn.Module) -> OutputMap:
        """The map from hidden states to logits as the losses take it, around the head's own weight.

        A head that FSDP shards is whole only while the model's forward runs: call this there.

        Raises:
            UnsupportedModelError: the head is not a plain linear layer with a whole weight.
        """
        kind = type(head).__name__
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise UnsupportedModelError(
                f"the losses need a plain linear head, and this model's is a {kind}: leave the head out of the adapter "
                "(peft: target_modules, modules_to_save) and of the quantisation, or merge the adapter first"
            )
        if hasattr(head.weight, "device_mesh"):
            raise UnsupportedModelError(
                f"the losses need the head's whole weight, and that of this {kind} is sharded over devices: compute the loss in "
                "the model's forward, and let head and decoder be sharded as one"
            )
        return OutputMap(head.weight, head.bias, self.logit_scale())

    def check_output_map(self, causal_lm: Any) -> None:
        """Compare head and :meth:`scale_logits` with the family's own forward on two tokens.

        Raises:
            UnsupportedModelError: the family maps hidden states to logits in a way that PIPO does not know.
        """
        head = causal_lm.get_output_embeddings()
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        with torch.no_grad():
            expected = causal_lm(input_ids=ids, use_cache=False).logits.float()
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            got = self.scale_logits(head(hidden)).float()
        if not torch.allclose(got, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max().clamp_min(1e-6))):
            raise UnsupportedModelError(
                f"PIPO does not support the family {self.config.model_type!r}: its output map is more than a head with a "
                f"logit scale or soft cap (largest difference {float((got - expected).abs().max()):.3g})"
            )


def checkpoint_activations(model: Any) -> None:
    """Let a transformers model keep one state per layer, and compute the rest again in the backward pass."""
    # Its name since transformers 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _template_index(config: PreTrainedConfig, num_layers: int) -> int:
    """The last full-attention layer; in a family whose every attention layer is sliding, the last of those."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return num_layers - 1
    for wanted in ("full_attention", "sliding_attention"):
        for index in reversed(range(num_layers)):
            if kinds[index] == wanted:
                return index
    raise UnsupportedModelError(
        f"PIPO does not support {config.model_type!r} with layers {sorted(set(kinds))}: {NO_ATTENTION}"
    )


def text_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the text part of a config, free to be changed."""
    return copy.deepcopy(config.get_text_config(decoder=True))
