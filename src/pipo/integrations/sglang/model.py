"""`PipoForCausalLM` on SGLang's own layers: reads pair ids, gives hidden states and token 1's logits; :mod:`.step` calls the rest.

Shape legend: N pairs of all requests, one after the other; R requests; H width; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_model
from torch import Tensor, nn

from pipo.errors import UnsupportedModelError
from pipo.integrations.sglang import hooks, pair_ids
from pipo.integrations.sglang.config import backbone
from pipo.integrations.sglang.families import Family, Weights, family_of
from pipo.integrations.sglang.serving import current
from pipo.integrations.sglang.weights import Checklist, expected_shapes
from pipo.model.compressor import Compressor
from pipo.model.confidence import ConfidenceHead
from pipo.model.step import finite_rows


class MtpBlock(nn.Module):
    """One decoder layer of the backbone's kind, on token 1's embedding and the backbone's hidden state (eq. 3)."""

    def __init__(self, config: Any, family: Family) -> None:
        super().__init__()
        h, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * h, h, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = family.norm(h, eps), family.norm(h, eps)
        body: Any = family.body(family.one_layer(config), "mtp")
        body.embed_tokens = None  # the backbone's serves both
        for module in body.modules():
            if isinstance(module, RadixAttention):
                module.layer_id = config.pipo_num_backbone_layers
        self.body: Any = body

    def forward(self, embeddings_NH: Tensor, hidden_NH: Tensor, positions_N: Tensor, forward_batch: Any) -> Tensor:
        """`d [N, H]`."""
        both = [self.pre_fc_norm_embedding(embeddings_NH), self.pre_fc_norm_hidden(hidden_NH)]
        states: Tensor = self.body(None, positions_N, forward_batch, self.fc(torch.cat(both, dim=-1)))
        return states


class PipoForCausalLM(nn.Module):
    """A PIPO model. Weights: ours or the authors' layout, checked strictly."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        hooks.verify()
        assert quant_config is None, "refused where the server's arguments are read"
        self.config = config
        self.family = family_of(config)
        h, eps = config.hidden_size, config.rms_norm_eps
        self.model: Any = self.family.body(backbone(config), "model")
        self.mtp = MtpBlock(config, self.family)
        self.compressor = Compressor(h, config.pipo_compressor_type)
        sees_draft = config.pipo_confidence_features == "draft"
        self.confidence_head = ConfidenceHead(h, self.family.norm(2 * h, eps), sees_draft=sees_draft)
        if config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(config.vocab_size, h, prefix="lm_head")
        self.logits_processor = LogitsProcessor(config)
        self._expected = expected_shapes(current().config)
        self._is_filled = get_model().load_format == "dummy"

    @property
    def start_layer(self) -> int:
        """SGLang counts a stage's layers with these two."""
        return 0

    @property
    def end_layer(self) -> int:
        """The MTP block's layer comes last."""
        return int(self.config.num_hidden_layers)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of token ids."""
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: Any, input_embeds: Tensor | None = None
    ) -> LogitsProcessorOutput:
        """Logits of token 1 for each request's last pair, and in `hidden_states` `h [N, H]` of every pair.

        `input_ids [N]`: pair ids.
        """
        slots_N2 = pair_ids.slots(input_ids, self.config.pipo_pad_id)
        slots_N2 = slots_N2.clamp(max=self.config.vocab_size - 1)  # a row that is being ended holds an id that is none
        embeddings_TH = self.model.embed_tokens(slots_N2.flatten())
        latents_NH = self.compressor(embeddings_TH[None])[0]
        hidden_NH = self.model(input_ids, positions, forward_batch, latents_NH)
        # A state that is not finite must not reach the draw; `step` ends its request.
        output = self.logits_processor(input_ids, finite_rows(hidden_NH)[0], self.lm_head, forward_batch)
        output.hidden_states = hidden_NH
        return output

    def draft(self, token1_N: Tensor, hidden_NH: Tensor, positions_N: Tensor, forward_batch: Any) -> Tensor:
        """Run the MTP block after every pair, filling its keys and values: `d [N, H]`. `token1_N`: of the pair that follows."""
        states: Tensor = self.mtp(self.model.embed_tokens(token1_N), hidden_NH, positions_N, forward_batch)
        return states

    def second_logits(self, mtp_hidden_RH: Tensor, forward_batch: Any) -> Tensor:
        """Logits of token 2, float32 `[R, V]`."""
        metadata = LogitsMetadata.from_forward_batch(forward_batch)
        logits = self.logits_processor._get_logits(mtp_hidden_RH, self.lm_head, metadata, use_logits_buffer=False)
        return logits[:, : self.config.vocab_size].float()  # type: ignore[no-any-return]

    def confidence(self, hidden_RH: Tensor, mtp_hidden_RH: Tensor, features_R3: Tensor | None = None) -> Tensor:
        """Calibrated confidence in [0, 1], float32 `[R]` (eq. 4)."""
        config = self.config
        logits_R = self.confidence_head(hidden_RH, mtp_hidden_RH, features_R3)
        return torch.sigmoid(config.pipo_confidence_scale * logits_R + config.pipo_confidence_offset)

    # --- weights

    def load_weights(self, weights: Weights) -> set[str]:
        """Fill parameters from a checkpoint's tensors: at first all of them; later, when a server's weights are updated, those that come.

        Raises:
            CheckpointError: names tensors that are missing, unexpected, misshapen or stored twice.
        """
        now = current()
        checklist = Checklist(self._expected, tied=self.config.tie_word_embeddings, has_vision=now.has_vision)
        whole, own = not self._is_filled, dict(self.named_parameters())
        filled: set[str] = set()
        for part, tensors in groupby(_ours(checklist.check(weights, whole=whole)), key=_part):
            if part in BODIES:
                inside = ((name.removeprefix(part), tensor) for name, tensor in tensors)
                filled |= {part + name for name in self.family.load(self.get_submodule(part[:-1]), inside)}
            else:
                for name, tensor in tensors:
                    getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)
                    filled.add(name)
        if lost := sorted(filled - set(own)) + sorted(set(own) - filled if whole else ()):
            raise UnsupportedModelError(f"SGLang's {self.family.architecture} and the checkpoint disagree on {lost}")
        self._is_filled = True
        return filled


BODIES = ("model.", "mtp.body.")


def _part(named: tuple[str, Tensor]) -> str:
    """Which body a tensor belongs to, or none."""
    return next((body for body in BODIES if named[0].startswith(body)), "")


def _ours(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the names of our modules: what is inside the MTP block's layer lies in a body of its own."""
    for name, tensor in weights:
        inside = name.startswith(("mtp.layers.", "mtp.norm."))
        yield name.replace("mtp.", "mtp.body.", 1) if inside else name, tensor
