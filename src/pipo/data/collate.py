"""Examples of different lengths to one batch of slots.

Each row of a batch is one example. Several examples in one row would save padding, but the linear-attention layers of Qwen3.5 carry
a state along the row that no attention mask stops: the second example would read the first.

Shape legend: B batch, T slots (even).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipo.errors import PairingError
from pipo.pairing import IGNORE_INDEX, Slots


def collate_slots(rows: Sequence[Slots], pad_id: int, multiple: int = 2) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them, and that up to a multiple of `multiple` (even).

    Padding carries the PAD id, no label, and 0 in the mask. The PADs inside a row are slots as any other: they are in the mask.

    Returns:
        `input_ids`, `attention_mask`, `labels`, int64 `[B, T]`: arguments of `PipoForCausalLM.forward`.

    Raises:
        PairingError: no rows, or an odd `multiple`.
    """
    if not rows:
        raise PairingError("a batch needs at least one row")
    if multiple < 2 or multiple % 2:
        raise PairingError(f"slots come in pairs: rows are padded to an even multiple, got {multiple}")
    width = -(-max(len(row.ids) for row in rows) // multiple) * multiple
    shape = (len(rows), width)
    input_ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for number, row in enumerate(rows):
        length = len(row.ids)
        input_ids[number, :length] = torch.tensor(row.ids)
        labels[number, :length] = torch.tensor(row.labels)
        mask[number, :length] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
