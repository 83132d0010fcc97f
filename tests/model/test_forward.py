"""The training forward, for every family: what a batch, a mask, a loss and a gradient must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from families import FAMILIES, VOCAB, base_model, config_of, pipo_model
from pipo import PipoConfig, PipoForCausalLM
from pipo.errors import PairingError
from pipo.losses import OutputMap, chunked, token
from pipo.pairing import IGNORE_INDEX as IGN

# Lengths in slots. The first two reach beyond twice the sliding window of 8 pairs.
LENGTHS = [44, 38, 6, 2]
RELATIVE = 1e-4
# transformers runs attention sinks and soft-capped attention in eager attention only.
EAGER_ONLY = {"gpt_oss", "gemma2"}


def rows_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator) for n in lengths]


def padded(rows: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor, list[slice]]:
    """Ids, attention mask, and where each row's slots are."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), fill), torch.zeros(len(rows), longest, dtype=torch.long)
    places = [slice(longest - len(r), longest) if side == "left" else slice(0, len(r)) for r in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, places


def close(found: Tensor, expected: Tensor, what: str, relative: float = RELATIVE) -> None:
    assert found.shape == expected.shape, what
    if expected.numel():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, atol=relative * scale, rtol=0, msg=lambda text: f"{what}: {text}")


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def supervised(model: PipoForCausalLM, seed: int = 0, **options: Any) -> Any:
    """A forward over two rows with labels at every slot but the first six."""
    ids = torch.stack(rows_of([20, 20], seed))
    labels = ids.clone()
    labels[:, :6] = labels[0, 9] = labels[1, 13:16] = IGN
    return model(ids, labels=labels, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_gets_in_a_batch_what_it_gets_alone(family: str, side: str) -> None:
    """Breaks when padding is seen by attention, by a linear-attention state, or shifts a row's positions."""
    model = pipo_model(family)
    rows = rows_of(LENGTHS)
    ids, mask, places = padded(rows, side, fill=7)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, return_logits=True)
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        with torch.no_grad():
            alone = model(row[None], return_logits=True)
        pairs = slice(place.start // 2, place.stop // 2)
        steps = slice(pairs.start, pairs.stop - 1)
        for key, where in (
            ("backbone_hidden", pairs),
            ("logits", pairs),
            ("mtp_hidden", steps),
            ("mtp_logits", steps),
            ("confidence_logits", steps),
        ):
            close(batch[key][i, where], alone[key][0], f"row {i} {key}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_s_losses_are_the_rows_own(side: str) -> None:
    """Breaks when a row's first pair, which nothing predicts, is learnt from the padding before it."""
    model = pipo_model("qwen3_5")
    rows = rows_of(LENGTHS)
    ids, mask, places = padded(rows, side)
    labels = torch.full_like(ids, IGN)
    for i, place in enumerate(places):
        labels[i, place] = rows[i]
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, labels=labels)
        alone = [model(row[None], labels=row[None]) for row in rows]
    steps = torch.tensor([len(row) // 2 - 1 for row in rows])
    for key in ("backbone_loss", "mtp_loss", "confidence_loss"):
        mean = (torch.stack([a[key] for a in alone]) * steps).sum() / steps.sum()
        torch.testing.assert_close(batch[key], mean, atol=1e-5, rtol=1e-5)


def test_a_pair_is_real_when_either_slot_is() -> None:
    """Breaks when a pair whose second slot is masked (an odd prompt's PAD) vanishes from the text."""
    model = pipo_model("qwen3")
    ids = torch.stack(rows_of([12]))
    mask = torch.ones_like(ids)
    mask[0, 5] = mask[0, 8] = 0
    with torch.no_grad():
        some, whole = model(ids, attention_mask=mask), model(ids)
        mask[0, 4] = 0
        without = model(ids, attention_mask=mask)
    close(some.backbone_hidden, whole.backbone_hidden, "hidden")
    assert not torch.allclose(without.backbone_hidden[0, 3:], whole.backbone_hidden[0, 3:], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_family_s_own(family: str) -> None:
    """Breaks when a family's logit scale or soft cap is left out, or another one is invented."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config_of(family)).eval()
    with torch.no_grad():
        causal_lm.get_output_embeddings().weight.mul_(60)  # far enough for a soft cap to bend the logits
    model = PipoForCausalLM(PipoConfig(causal_lm.config), causal_lm=causal_lm).eval()
    ids = torch.stack(rows_of([9]))
    with torch.no_grad():
        expected = causal_lm(ids).logits
        hidden, _ = model.run_backbone(model.embed(ids))
        close(model.head(hidden), expected, "logits", relative=1e-5)
    model.backbone.check_output_map(causal_lm)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in EAGER_ONLY])
def test_eager_and_sdpa_agree(family: str) -> None:
    """Breaks when the MTP block is given a mask that only one attention implementation understands."""
    model = pipo_model(family)
    ids, mask, _ = padded(rows_of(LENGTHS), "left")
    outs = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.model.config._attn_implementation == attention
        with torch.no_grad():
            outs.append(model(ids, attention_mask=mask))
    real = mask[:, ::2].bool()
    close(outs[0].backbone_hidden[real], outs[1].backbone_hidden[real], "hidden")
    steps = real[:, :-1]
    close(outs[0].mtp_hidden[steps], outs[1].mtp_hidden[steps], "mtp hidden")


def test_an_odd_number_of_slots_is_refused() -> None:
    with pytest.raises(PairingError, match="got 5 of them"):
        pipo_model("qwen3")(torch.stack(rows_of([5])))
    with pytest.raises(PairingError, match="got 5 of them"):
        pipo_model("qwen3").compress(torch.stack(rows_of([5])))


@pytest.mark.parametrize("family", ["qwen3_5", "gemma2", "granite"])
def test_each_loss_is_a_mean_over_its_own_positions(family: str) -> None:
    """Breaks when a loss is divided by another's count, or a label is read at another slot."""
    model = pipo_model(family)
    out = supervised(model, return_logits=True)
    ids = torch.stack(rows_of([20, 20]))
    one, two, sure = [], [], []
    for b in range(2):
        for i in range(9):
            masked = set(range(6)) | ({9} if b == 0 else {13, 14, 15})
            if 2 * i + 2 not in masked:
                one.append(-out.logits[b, i].log_softmax(-1)[ids[b, 2 * i + 2]])
            if 2 * i + 3 not in masked:
                log_p = out.mtp_logits[b, i].log_softmax(-1)[ids[b, 2 * i + 3]]
                two.append(-log_p)
                c = out.confidence_logits[b, i]
                p = log_p.detach().exp()
                sure.append(-(p * F.logsigmoid(c) + (1 - p) * F.logsigmoid(-c)))
    assert len(one) != len(two)
    for found, terms in ((out.backbone_loss, one), (out.mtp_loss, two), (out.confidence_loss, sure)):
        torch.testing.assert_close(found, torch.stack(terms).mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, out.backbone_loss + out.mtp_loss + out.confidence_loss)


@pytest.mark.parametrize("kept", ["first slots", "nothing"])
def test_nothing_supervised_is_a_loss_of_zero(kept: str) -> None:
    """Breaks with 0/0: one row without second labels would turn every weight into NaN."""
    model = pipo_model("qwen3_5")
    ids = torch.stack(rows_of([12]))
    labels = ids.clone()
    labels[:, 1::2] = IGN
    if kept == "nothing":
        labels[:] = IGN
    out = model(ids, labels=labels)
    assert out.mtp_loss.item() == 0.0
    assert out.confidence_loss.item() == 0.0
    assert (out.backbone_loss.item() == 0.0) == (kept == "nothing")
    found = gradients(model, out.loss)
    assert all(g.isfinite().all() for g in found.values())
    assert all(not g.any() for name, g in found.items() if name.startswith(("mtp.", "confidence_head.")))


def test_the_confidence_loss_moves_only_the_confidence_head() -> None:
    """Breaks when the gate's loss can make the draft, or the backbone, worse."""
    model = pipo_model("qwen3_5")
    found = gradients(model, supervised(model).confidence_loss)
    moved = {name for name, g in found.items() if g.any()}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("confidence_head.")}


@pytest.mark.parametrize("compressor", ["mlp", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_every_part(family: str, compressor: str) -> None:
    """Breaks when a part is cut off from the loss: it would stay at its start while everything seems to train."""
    model = pipo_model(family, compressor)
    found = gradients(model, supervised(model).loss)
    still = {name for name, _ in model.named_parameters() if name not in found or not found[name].any()}
    assert not still
    backbone_only = gradients(model, supervised(model).backbone_loss)
    assert not any(name.startswith(("mtp.", "confidence_head.")) and g.any() for name, g in backbone_only.items())
    assert all(backbone_only[name].any() for name, _ in model.named_parameters() if name.startswith("compressor."))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_moe", "gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(family: str, reentrant: bool) -> None:
    """Breaks when a layer called again for its gradient is called otherwise, or its calls confuse the MTP block."""
    model = pipo_model(family).train()
    plain = gradients(model, supervised(model).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls: list[int] = []
    model.mtp.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    saved = gradients(model, supervised(model).loss)
    assert len(calls) == 2, "the MTP layer is not checkpointed"
    assert saved.keys() == plain.keys()
    for name, gradient in plain.items():
        close(saved[name], gradient, name, relative=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_losses_in_chunks_are_the_whole_s(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a chunk's end falls on another position, or a chunk's gradient is left out."""
    model = pipo_model(family)
    out = supervised(model)
    whole = gradients(model, out.loss)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 4 * chunked.NUM_WIDE * VOCAB)  # three positions
    in_chunks = supervised(model)
    torch.testing.assert_close(in_chunks.loss, out.loss)
    for name, gradient in gradients(model, in_chunks.loss).items():
        close(gradient, whole[name], name, relative=1e-5)


@pytest.mark.parametrize("supervise", [1.0, 0.5, 0.0])
def test_chunked_cross_entropy_is_the_plain_one(supervise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, probabilities of the labels, and gradients in hidden states and head."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 4 * chunked.NUM_WIDE * 40)  # three positions
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 16, generator=generator, requires_grad=True)
    weight = torch.randn(40, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 40, (2, 7), generator=generator)
    labels[torch.rand(2, 7, generator=generator) >= supervise] = IGN
    found = token.cross_entropy(hidden, OutputMap(weight), labels)
    fast = torch.autograd.grad(found.mean, (hidden, weight), allow_unused=True)
    if not supervise:
        assert found.mean.item() == 0.0
        assert found.label_probability.shape == (0,)
        assert not fast[0].any()
        return
    kept = labels != IGN
    log_probs = (hidden @ weight.T).log_softmax(-1)[kept].gather(-1, labels[kept][:, None])[:, 0]
    torch.testing.assert_close(found.mean, -log_probs.mean())
    torch.testing.assert_close(found.label_probability, log_probs.exp().detach())
    for one, other in zip(fast, torch.autograd.grad(-log_probs.mean(), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other)


def test_losses_are_float32_under_bfloat16() -> None:
    """Breaks when bf16 logits are summed or softmaxed as they are: log-probabilities in steps of 0.1."""
    model = pipo_model("qwen3").to(torch.bfloat16)
    out = supervised(model)
    assert {out[k].dtype for k in ("loss", "backbone_loss", "mtp_loss", "confidence_loss")} == {torch.float32}
    assert out.confidence_logits.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(model, out.loss).values())


def _deepcopied(model: PipoForCausalLM, _: Any) -> PipoForCausalLM:
    return copy.deepcopy(model)


def _moved(model: PipoForCausalLM, _: Any) -> PipoForCausalLM:
    return model.to(torch.float64).to(torch.float32)


def _saved(model: PipoForCausalLM, folder: Any) -> PipoForCausalLM:
    model.save_pretrained(folder)
    return PipoForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("how", [_deepcopied, _moved, _saved])
@pytest.mark.parametrize("family", ["qwen3_tied", "gemma2"])
def test_a_tied_head_stays_tied(family: str, how: Callable[..., PipoForCausalLM], tmp_path: Any) -> None:
    """Breaks when embedding and head part company: both would then train apart, and a save would lose one."""
    before = pipo_model(family)
    ids = torch.stack(rows_of([8]))
    with torch.no_grad():
        expected = before(ids, return_logits=True)
        model = how(before, tmp_path)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        close(model(ids, return_logits=True).mtp_logits, expected.mtp_logits, "mtp logits", relative=1e-5)
        model.model.embed_tokens.weight.zero_()
        assert not model.head(torch.ones(1, model.config.hidden_size)).any()


def test_a_deep_copy_is_independent() -> None:
    """Breaks when the copy's view of its backbone is the original's: it would run the weights of another model."""
    model = pipo_model("qwen3_5")
    ids = torch.stack(rows_of([8]))
    with torch.no_grad():
        expected = model(ids, return_logits=True)
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        found = twin(ids, return_logits=True)
    for key in ("logits", "mtp_logits", "confidence_logits"):
        torch.testing.assert_close(found[key], expected[key], atol=0, rtol=0)


def test_the_head_in_use_is_the_model_s_head() -> None:
    """Breaks when a replaced head (an adapter, a resized vocabulary) is never called."""
    model = pipo_model("qwen3")
    model.resize_token_embeddings(VOCAB + 8)
    assert model.config.vocab_size == VOCAB + 8
    assert model.head(torch.ones(1, 64)).shape == (1, VOCAB + 8)
    base = base_model("qwen3")
    base.lm_head = torch.nn.Linear(64, 5)
    assert base.head(torch.ones(1, 64)).shape == (1, 5)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3", "gemma2"])
def test_the_compressors_start_as_the_spec_says(family: str) -> None:
    """Breaks when a start is random: the backbone could read nothing, and training would begin from noise."""
    for kind in ("linear", "mlp"):
        model = PipoForCausalLM(PipoConfig(config_of(family), compressor_type=kind))
        slots = torch.stack(rows_of([8]))
        with torch.no_grad():
            a, b = model.embed(slots[:, ::2]), model.embed(slots[:, 1::2])
            expected = a + b if kind == "linear" else F.silu(a) + F.silu(b)
            torch.testing.assert_close(model.compress(slots), expected, atol=1e-7, rtol=1e-6)


def test_the_mtp_block_starts_as_a_copy() -> None:
    """Breaks when a fresh block starts random: it would draft noise for long."""
    model = PipoForCausalLM(PipoConfig(config_of("qwen3_5")))
    for name, weight in model.model.layers[3].state_dict().items():
        assert torch.equal(model.mtp.layers[0].state_dict()[name], weight), name
    assert torch.equal(model.mtp.norm.weight, model.model.norm.weight)
    assert model.mtp.layers[0].self_attn.layer_idx == 4


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next", "gemma2"])
def test_norms_of_the_new_parts_are_of_the_backbone_s_kind(family: str) -> None:
    """Breaks when a norm that multiplies by (1 + weight) is taken for one that multiplies by the weight."""
    model = pipo_model(family)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    eps = model.config.text_config.rms_norm_eps
    for norm in (model.confidence_head.norm, model.mtp.norm, model.mtp.pre_fc_norm_hidden):
        width = norm.weight.shape[0]
        part = x[:, :width]
        expected = part * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + eps) * (1 + norm.weight)
        torch.testing.assert_close(norm(part), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_regular_model_s_rows_and_losses(family: str) -> None:
    """The base model beside its MTP block: a padded batch gives each row its own, and losses fit the shifts."""
    model = base_model(family)
    rows = rows_of([21, 8])
    ids, mask, _ = padded(rows, "left")
    labels = torch.where(mask.bool(), ids, IGN)
    with torch.no_grad():
        batch = model(ids, attention_mask=mask, labels=labels)
        alone = [model(row[None], labels=row[None]) for row in rows]
    close(batch.backbone_hidden[1, 13:], alone[1].backbone_hidden[0], "hidden")
    close(batch.mtp_hidden[1, 13:], alone[1].mtp_hidden[0], "mtp hidden")
    mean = (alone[0].backbone_loss * 20 + alone[1].backbone_loss * 7) / 27
    torch.testing.assert_close(batch.backbone_loss, mean, atol=1e-4, rtol=1e-4)
