"""Small heads, students, labels and teachers, and the naive losses of `pipo.reference` on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipo.losses import FullTeacher, LocalTeacher, LogitScale, OutputMap
from pipo.pairing import IGNORE_INDEX as IGN
from pipo.reference import divergence, log_softmax

PLAIN = LogitScale()


@dataclass
class Case:
    """A student's head at some positions beside a teacher's. All leaves, and the student's require gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    scale: LogitScale = PLAIN

    @property
    def head(self) -> OutputMap:
        return OutputMap(self.weight, self.bias, self.scale)

    @property
    def teacher_head(self) -> OutputMap:
        return OutputMap(self.teacher_weight, None, self.scale)

    @property
    def local(self) -> LocalTeacher:
        return LocalTeacher(self.teacher_hidden, self.teacher_head)

    @property
    def dense(self) -> FullTeacher:
        return FullTeacher(self.teacher_logits().log_softmax(-1))

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None and x.requires_grad]

    def exact(self) -> Case:
        """The same numbers in float64."""
        made = {
            k: v.detach().double() for k, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()
        }
        for name in ("hidden", "weight", "bias"):
            if name in made:
                made[name].requires_grad_(vars(self)[name].requires_grad)
        return replace(self, **made)

    def logits(self) -> Tensor:
        """Plain, by autograd's own formulas."""
        raw = self.hidden @ self.weight.T
        return self.scale.apply(raw if self.bias is None else raw + self.bias)

    def teacher_logits(self) -> Tensor:
        return self.scale.apply(self.teacher_hidden @ self.teacher_weight.T)

    def naive(self, mode: str, **options: Any) -> list[Tensor]:
        """Each supervised position's loss by the specification."""
        ratios = options.pop("ratios", None)
        found = []
        for n, label in enumerate(self.labels.tolist()):
            if label != IGN and mode == "cross_entropy":
                found.append(-log_softmax(self.logits()[n])[label])
            elif label != IGN:
                ratio = 1.0 if ratios is None else float(ratios[n])
                row, teacher = self.logits()[n], self.teacher_logits()[n]
                found.append(divergence(row, teacher, label, mode, ratio=ratio, **options))  # type: ignore[arg-type]
        return found


def make_case(
    num: int = 6,
    width: int = 8,
    vocab: int = 50,
    dtype: torch.dtype = torch.float32,
    *,
    supervise: float = 0.8,
    sharpness: float = 1.0,
    bias: bool = False,
    scale: LogitScale = PLAIN,
    train_head: bool = True,
    seed: int = 0,
) -> Case:
    """`sharpness` multiplies the logits; about one in five positions is left unsupervised."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.randint(0, vocab, (num,), generator=generator)
    labels[torch.rand(num, generator=generator) >= supervise] = IGN
    return Case(
        hidden=(normal(num, width) * sharpness).requires_grad_(),
        weight=normal(vocab, width).requires_grad_(train_head),
        bias=normal(vocab).requires_grad_(train_head) if bias else None,
        labels=labels,
        teacher_hidden=normal(num, width) * sharpness,
        teacher_weight=normal(vocab, width),
        scale=scale,
    )
