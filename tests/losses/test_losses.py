"""The fast losses and the golden ones against the naive losses of `pipo.reference`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipo.losses import chunked
from pipo.model.modeling import PipoForCausalLM
from pipo.pairing import IGNORE_INDEX as IGN
from pipo.reference import sft_losses

torch.set_num_threads(1)
GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = ["tiny-linear-untied", "tiny-mlp-tied"]


@pytest.mark.parametrize("name", NAMES)
def test_the_golden_losses(name):
    """Means over the supervised positions of both rows of the batch, from the logits that the reference gave."""
    golden = load_file(GOLDEN / name / "expected.safetensors")
    labels = golden["labels"].tolist()
    rows = [
        sft_losses(golden["logits1"][b], golden["logits2"][b], golden["conf_logit"][b], labels[b]) for b in range(2)
    ]
    counts = [[sum(y != IGN for y in row[2 + k :: 2]) for row in labels] for k in (0, 1, 1)]
    for term, count, key in zip(range(3), counts, ("backbone_loss", "mtp_loss", "conf_loss"), strict=True):
        mean = sum(n * row[term] for n, row in zip(count, rows, strict=True)) / sum(count)
        assert mean.item() == pytest.approx(golden[key].item(), abs=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_s_chunked_losses_equal_the_naive_ones(name, monkeypatch):
    """Values, and gradients in every part of the model, with chunks that end in the middle of a row."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 3 * 4 * chunked.NUM_WIDE * 320)  # three positions
    model = PipoForCausalLM.from_pretrained(GOLDEN / name)
    ids = torch.randint(0, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :5] = labels[0, 9] = IGN
    fast = model(input_ids=ids, labels=labels)
    plain = model(input_ids=ids, return_logits=True)
    naive = sft_losses(plain.logits[0], plain.mtp_logits[0], plain.confidence_logits[0], labels[0].tolist())
    for found, expected in zip((fast.backbone_loss, fast.mtp_loss, fast.confidence_loss), naive, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (fast.loss, naive.total())]
    assert sum(g is not None for g in gradients[0]) > 20
    for found, expected in zip(*gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()) + 1e-7, rtol=1e-3)
