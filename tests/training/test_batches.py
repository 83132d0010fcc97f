"""Which examples a step reads: every one once an epoch, and the same ones however they are dealt out."""

import pytest

from pipo.pairing import IGNORE_INDEX
from pipo.training.batches import Again, EpochBatches, make_loader, num_steps
from pipo.training.config import RunSettings
from tiny_training import TinySlots


class Numbers:
    def __init__(self, count):
        self.lengths = [(7 * i) % 23 for i in range(count)]
        self.epoch = None

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return index

    def set_epoch(self, epoch):
        self.epoch = epoch


def batches(count, *, process=0, num_processes=1, epoch=0, **run):
    found = EpochBatches(Numbers(count), RunSettings(out="x", **run), process=process, num_processes=num_processes)
    found.set_epoch(epoch)
    listed = list(found)
    assert len(listed) == len(found)
    return listed


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("count", [1, 12, 13, 31])
def test_an_epoch_reads_every_example_once(count, group):
    order = [i for batch in batches(count, batch_size=4, accumulation=2, group_by_length=group) for i in batch]
    assert sorted(order) == list(range(count))


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("count", [16, 29])
def test_a_step_has_the_same_examples_however_it_is_split(count, group):
    """8 examples a step, as 8 × 1, 4 × 2, and 2 × 2 on two processes."""

    def steps(per_step, *listed):
        together = [[i for batch in row for i in batch] for row in zip(*listed, strict=True)]
        starts = range(0, len(together), per_step)
        return [sorted(i for batch in together[start : start + per_step] for i in batch) for start in starts]

    whole = steps(1, batches(count, batch_size=8, group_by_length=group))
    assert steps(2, batches(count, batch_size=4, accumulation=2, group_by_length=group)) == whole
    split = {"batch_size": 2, "accumulation": 2, "num_processes": 2, "group_by_length": group}
    two = steps(2, *(batches(count, process=p, **split) for p in range(2)))
    assert [[i for i in step if not isinstance(i, Again)] for step in two] == whole
    assert sum(isinstance(i, Again) for step in two for i in step) == count % 2


def test_what_only_fills_a_batch_has_no_loss():
    """Three examples on two processes: counted twice, the one that both read would weigh double in the step's means."""
    data, run = TinySlots(3), RunSettings(out="x", batch_size=2)
    dealt = [next(iter(make_loader(data, run, list, process=p, num_processes=2))) for p in range(2)]
    labels = [tuple(row.labels) for rows in dealt for row in rows if any(label != IGNORE_INDEX for label in row.labels)]
    assert sorted(labels) == sorted(tuple(data[i].labels) for i in range(3))
    assert [len(rows) for rows in dealt] == [2, 2]


def test_the_order_follows_seed_and_epoch():
    assert batches(20, seed=1) == batches(20, seed=1)
    assert batches(20, seed=1) != batches(20, seed=2)
    assert batches(20, epoch=1) != batches(20, epoch=0)


def test_batches_by_length_have_little_to_pad():
    lengths = Numbers(200).lengths

    def padding(group):
        listed = batches(200, batch_size=8, group_by_length=group)
        return sum(max(lengths[i] for i in batch) - lengths[i] for batch in listed for i in batch)

    assert padding(True) < padding(False) / 5


def test_the_dataset_hears_of_the_epoch():
    data = Numbers(5)
    loader = make_loader(data, RunSettings(out="x", batch_size=2), list)
    loader.set_epoch(3)
    assert data.epoch == 3
    assert sorted(i for batch in loader for i in batch) == list(range(5))


@pytest.mark.parametrize(
    ("settings", "num_processes", "steps"),
    [
        ({}, 1, 13),
        ({"batch_size": 2}, 1, 7),
        ({"batch_size": 2, "accumulation": 2}, 1, 4),
        ({"batch_size": 2, "accumulation": 2, "epochs": 2}, 1, 8),
        ({"batch_size": 2, "accumulation": 2, "epochs": 0.3}, 1, 2),
        ({"batch_size": 2, "accumulation": 2}, 2, 2),
        ({"batch_size": 8, "max_steps": 3}, 2, 3),
    ],
)
def test_steps_of_a_run_over_thirteen_examples(settings, num_processes, steps):
    assert num_steps(13, RunSettings(out="x", **settings), num_processes) == steps
