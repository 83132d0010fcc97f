"""Batches of slots: padding adds nothing and loses nothing."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import PAD, pipo_model
from pipo.data.collate import collate_slots
from pipo.errors import PairingError
from pipo.losses import NumItems, SupervisedObjective
from pipo.pairing import IGNORE_INDEX, Slots, reject_drafts, slots_from_turns

turns = st.lists(st.tuples(st.lists(st.integers(1, 50), max_size=7), st.booleans()), min_size=1, max_size=5)


def rejected(turns, seed):
    rng = random.Random(seed)
    return reject_drafts(slots_from_turns(turns, PAD), rng.random(), rng, PAD)


@given(st.lists(st.builds(rejected, turns, st.integers(0, 99)), min_size=1, max_size=4), st.sampled_from([2, 8, 64]))
def test_rows_come_back_from_a_batch(rows, multiple):
    """Breaks when a label or a PAD inside a row is lost, or padding carries a label."""
    batch = collate_slots(rows, PAD, multiple)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape == labels.shape
    assert ids.shape[1] % multiple == 0
    assert ids.shape[1] - max(len(row.ids) for row in rows) < multiple
    for number, row in enumerate(rows):
        real = mask[number].bool()
        assert ids[number, real].tolist() == row.ids
        assert labels[number, real].tolist() == row.labels
        assert mask[number].tolist() == sorted(mask[number].tolist(), reverse=True)
        assert (ids[number, ~real] == PAD).all()
        assert (labels[number, ~real] == IGNORE_INDEX).all()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "gemma2"])
def test_padding_never_changes_losses(family):
    """Breaks when a row reads its padding: each row alone against all of them padded to one width (also by linear attention)."""
    model = pipo_model(family)
    rng = random.Random(3)
    rows = []
    for length in (4, 9, 22):
        tokens = [rng.randrange(3, model.config.vocab_size) for _ in range(2 * length)]
        rows.append(rejected([(tokens[:length], False), (tokens[length:], True)], length))
    one = SupervisedObjective(NumItems(1, 1))
    names = ("backbone_loss", "mtp_loss", "confidence_loss")
    with torch.no_grad():
        whole = model(**collate_slots(rows, PAD, multiple=16), objective=one)
        alone = [model(**collate_slots([row], PAD), objective=one) for row in rows]
    for name in names:
        torch.testing.assert_close(whole[name], sum(part[name] for part in alone), rtol=1e-4, atol=1e-4, msg=name)


def test_odd_widths_and_empty_batches_are_refused():
    row = Slots([1, 2], [1, 2], [False, False])
    with pytest.raises(PairingError, match="even multiple, got 3"):
        collate_slots([row], PAD, multiple=3)
    with pytest.raises(PairingError, match="at least one row"):
        collate_slots([], PAD)
