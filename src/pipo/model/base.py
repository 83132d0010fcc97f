"""`BaseForCausalLM`: a regular model beside its MTP block, as Qwen3.5 checkpoints hold both.

What PIPO starts from, and what the baselines run: regular decoding, MTP without verification, speculative decoding.

Shape legend: B batch, T tokens, H width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from pipo.errors import ConfigError
from pipo.losses.token import cross_entropy
from pipo.model.backbone import Backbone, build_causal_lm
from pipo.model.convert import as_dtype, load_base, load_mtp, split_hub_options
from pipo.model.drafter import Drafter
from pipo.model.files import find_checkpoint, write_checkpoint
from pipo.model.modeling import PipoOutput
from pipo.model.mtp import MtpBlock
from pipo.pairing import IGNORE_INDEX


class BaseForCausalLM(Drafter, nn.Module):
    """A regular decoder and head, and its MTP block where it has one (`mtp` is None otherwise)."""

    def __init__(self, causal_lm: Any, mtp: bool = True) -> None:
        """Take over a regular model; `mtp=True` adds an MTP block that starts as a copy of its last full-attention layer."""
        super().__init__()
        self.config: PreTrainedConfig = causal_lm.config
        self.model = cast(nn.Module, causal_lm.get_decoder())
        self.lm_head = cast(nn.Module, causal_lm.get_output_embeddings())
        self.backbone = Backbone(self.model, self.config)
        self.mtp: MtpBlock | None = None
        if mtp:
            weight = cast(Tensor, self.lm_head.weight)
            self.mtp = MtpBlock(self.backbone).to(device=weight.device, dtype=weight.dtype)
            self.mtp.copy_from(self.backbone)

    @classmethod
    def from_config(
        cls, config: PreTrainedConfig, mtp: bool = True, dtype: str | torch.dtype | None = None
    ) -> BaseForCausalLM:
        """A freshly initialised model of a transformers config."""
        return cls(build_causal_lm(config, as_dtype(dtype)), mtp=mtp)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        subfolder: str | None = None,
        attn_implementation: str | None = None,
        **hub: Any,
    ) -> BaseForCausalLM:
        """Load a regular checkpoint, with its `mtp.*` tensors where it has them, strictly.

        Raises:
            CheckpointError, UnsupportedModelError
        """
        options = split_hub_options(hub)
        if hub:
            raise ConfigError(f"from_pretrained does not know {', '.join(sorted(hub))}")
        folder = find_checkpoint(path_or_id, subfolder, **options)
        causal_lm, _, files = load_base(folder, as_dtype(dtype), attn_implementation)
        model = cls(causal_lm, mtp=any(key.startswith("mtp.") for key in files))
        if model.mtp is not None:
            load_mtp(model.mtp, files)
        return model.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the head's weights."""
        return cast(Tensor, self.lm_head.weight).dtype

    @property
    def device(self) -> torch.device:
        """Of the head's weights."""
        return cast(Tensor, self.lm_head.weight).device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = False,
        mtp_weight: float = 1.0,
    ) -> PipoOutput:
        """Teacher-forced pass over tokens `[B, T]`. `labels [B, T]`: the id at each position or −100.

        `backbone_hidden [B, T, H]` at position `t` predicts token `t+1`; `mtp_hidden [B, T-1, H]` predicts token `t+2`.
        `loss = backbone_loss + mtp_weight · mtp_loss`.
        """
        positions = None if attention_mask is None else (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        hidden, call = self.run_backbone(self.embed(input_ids), positions, attention_mask)
        output = PipoOutput(backbone_hidden=hidden)
        if return_logits:
            output.logits = self.head(hidden)
        if self.mtp is not None:
            following = torch.cat([input_ids[:, 1:], input_ids[:, -1:]], dim=1)
            output.mtp_hidden = self.run_mtp(following, hidden, call)[:, :-1]
            if return_logits:
                output.mtp_logits = self.head(output.mtp_hidden)
        if labels is not None:
            next_BT, beyond_BT = labels[:, 1:], F.pad(labels[:, 2:], (0, 1), value=IGNORE_INDEX)
            if attention_mask is not None:  # left padding predicts nothing
                absent_BT = ~attention_mask[:, :-1].bool()
                next_BT = next_BT.masked_fill(absent_BT, IGNORE_INDEX)
                beyond_BT = beyond_BT.masked_fill(absent_BT, IGNORE_INDEX)
            output.backbone_loss = output.loss = cross_entropy(hidden[:, :-1], self.output_map(), next_BT).mean
            if output.mtp_hidden is not None:
                output.mtp_loss = cross_entropy(output.mtp_hidden, self.output_map(), beyond_BT).mean
                output.loss = output.backbone_loss + mtp_weight * output.mtp_loss
        return output

    def save_pretrained(self, directory: str | Path, max_shard_size: int | str = "5GB") -> None:
        """Write a stock Hugging Face checkpoint, plus the `mtp.*` tensors that transformers ignores on load."""
        folder = Path(directory)
        tensors = dict(self.state_dict())
        if self.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        config = {**self.config.to_dict(), "dtype": str(self.dtype).removeprefix("torch.")}
        architecture = type(self.config).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"
        config["architectures"] = [architecture]
        write_checkpoint(folder, tensors, config, max_shard_size)
