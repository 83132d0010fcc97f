"""A regular model that runs here and says what it would have written: the teacher of distillation. Section 3.2 of the paper.

`served_teacher` asks one over HTTP, or reads what one has said before.

Shape legend: B batch, T slots, S = T/2 − 1 steps that have a next pair, N tokens of a text, H width, V vocabulary, k known entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from pipo.errors import ConfigError, DataError
from pipo.losses import LocalTeacher, OutputMap, PairLosses, PairObjective, PairStates, Teacher
from pipo.model.base import BaseForCausalLM
from pipo.pairing import Slots, teacher_positions_of_steps, teacher_tokens


class TeacherModel(Protocol):
    """Says of rollouts what the student's two heads are compared with."""

    def targets(self, rows: Sequence[Slots]) -> tuple[Teacher, Teacher]:
        """For the backbone's and for the MTP block's steps, each in the shape `[B, S]` of their labels."""
        ...


def step_positions(rows: Sequence[Slots]) -> tuple[Tensor, Tensor]:
    """Which of a text's states the backbone's and the MTP block's steps are compared with, `[B, S]` each, zeros where a row has no
    such step. A text is a row's slots without the fillers; its state `j` follows its token `j`."""
    num_steps = max(len(row.ids) for row in rows) // 2 - 1
    found = torch.zeros(2, len(rows), num_steps, dtype=torch.long)
    for index, row in enumerate(rows):
        for which, positions in enumerate(teacher_positions_of_steps(row.filler)):
            found[which, index, : len(positions)] = torch.tensor(positions, dtype=torch.long)
    return found[0], found[1]


class LocalTeacherModel:
    """A frozen regular model in this process. Keeps hidden states, never logits: the losses multiply with its head in chunks.

    Args:
        model: its MTP block, where it has one, is dropped: nobody asks it.
        vocab_size: entries that it shares with the student; its head is cut to them.
        shard: split the weights of its layers over the processes (FSDP2), each of which gathers a layer while it runs.
            Embeddings and head stay whole: the losses read the head everywhere.
    """

    def __init__(
        self,
        model: BaseForCausalLM,
        vocab_size: int | None = None,
        *,
        shard: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        model.mtp = None
        model.eval().requires_grad_(False)
        if shard:
            shard_layers(model, torch.device(device or model.device))
        self.model = model.to(device) if device is not None else model
        self.head = cut_head(self.model.output_map(), vocab_size)

    @torch.no_grad()
    def targets(self, rows: Sequence[Slots]) -> tuple[LocalTeacher, LocalTeacher]:
        """See :class:`TeacherModel`.

        Raises:
            DataError: the student wrote a token that the teacher does not have.
        """
        texts = [teacher_tokens(row) for row in rows]
        largest, size = max(map(max, texts)), int(self.model.config.vocab_size)
        if largest >= size:
            raise DataError(f"the student wrote token {largest}, and the teacher has {size} entries")
        longest = max(map(len, texts))
        # Padded on the right, where causal attention and recurrent states never look.
        ids_BN = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=self.model.device)
        with torch.autocast(ids_BN.device.type, enabled=False):
            hidden_BNH, _ = self.model.run_backbone(self.model.embed(ids_BN))
        starts_B1 = torch.arange(len(rows))[:, None] * longest
        first, second = (
            LocalTeacher(hidden_BNH, self.head, (starts_B1 + positions_BS).to(ids_BN.device))
            for positions_BS in step_positions(rows)
        )
        return first, second


def shard_layers(model: BaseForCausalLM, device: torch.device) -> None:
    """Split the weights of a model's layers over all processes, in place.

    Raises:
        ConfigError: there is no process group.
    """
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not distributed.is_initialized():
        raise ConfigError(
            "teacher.shard: true needs several processes to share the teacher: start them with `torchrun` or `accelerate launch`"
        )
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in cast(Any, model.model).layers:
        fully_shard(layer, mesh=mesh)


# --- vocabularies ---------------------------------------------------------------------------------------


def common_vocabulary(student: Any, teacher: Any, student_size: int, teacher_size: int) -> int:
    """Entries that both models share: those below the smaller of their sizes, where the tokenizers agree on all of them.

    Families round their embeddings up, so sizes may differ where vocabularies don't.

    Args:
        student, teacher: tokenizers. None: unknown, which only equal sizes can stand for.

    Raises:
        ConfigError: the tokenizers disagree on an id, or sizes differ and a tokenizer is unknown.
    """
    size = min(student_size, teacher_size)
    if student is None or teacher is None:
        if student_size != teacher_size:
            raise ConfigError(
                f"student and teacher have {student_size} and {teacher_size} vocabulary entries, and without the tokenizers of both "
                "nobody can say which of them agree"
            )
        return size
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        ids = ours.get(token), theirs.get(token)
        if ids[0] != ids[1] and any(index is not None and index < size for index in ids):
            raise ConfigError(
                f"student and teacher must share a vocabulary, but {token!r} is token {ids[0]} of the student and {ids[1]} of the teacher"
            )
    return size


def cut_head(head: OutputMap, vocab_size: int | None) -> OutputMap:
    """The head's first `vocab_size` entries; the softmax is then taken over these alone."""
    if vocab_size is None or vocab_size == head.vocab_size:
        return head
    bias = None if head.bias is None else head.bias[:vocab_size]
    return OutputMap(head.weight[:vocab_size], bias, head.scale)


class CommonVocabulary(NamedTuple):
    """An objective over the entries that student and teacher share."""

    objective: PairObjective
    vocab_size: int

    def __call__(self, head: OutputMap, states: PairStates) -> PairLosses:
        """See :class:`pipo.losses.PairObjective`."""
        return self.objective(cut_head(head, self.vocab_size), states)
