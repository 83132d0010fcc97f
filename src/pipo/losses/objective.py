"""What one position costs, and the gradient of that in its logits, written out. Section 3.2 of the paper.

With `p = softmax(z)` of the student and `q` of the teacher:

    cross-entropy   −log p(y)                          p − onehot(y)
    reverse KL      L = Σ p (log p − log q)            p (log p − log q − L)
    forward KL      Σ q (log q − log p)                p − q
    general β       β KL(q‖m) + (1−β) KL(p‖m)          (1−β) p (log p − log m − KL(p‖m)),  m = (1−β) p + β q
    sampled         c log p(y), c held fixed           c (onehot(y) − p),  c = ratio (log p(y) − log q(y))

β = 1 is the reverse KL, β = 0 the forward one. Everything is in the dtype of the logits, float32 or float64; probabilities are
taken from log-probabilities, never the other way.

Shape legend: C positions of a chunk, V vocabulary, K entries of a set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipo.errors import ConfigError
from pipo.losses.teacher import Targets

OUT_OF_SET = -1e30
"""Log-probability of what is not in a set: finite, so that it takes part in differences, and its exponential is zero."""


class Chunk(NamedTuple):
    """What an objective reads. `targets` and `teacher_label_C` (log q(y)) are None where there is no teacher."""

    log_probs_CV: Tensor
    labels_C: Tensor
    label_C: Tensor
    """log p(y)."""
    targets: Targets | None
    teacher_label_C: Tensor | None
    ratios_C: Tensor | None


class Cost(NamedTuple):
    """`value_C`, and its gradient in the logits: `[C, V]`, or `[C, K]` at the entries `ids_CK` and zero elsewhere."""

    value_C: Tensor
    gradient: Tensor
    ids_CK: Tensor | None = None


@dataclass(frozen=True)
class CrossEntropy:
    """`−log p(y)`."""

    def cost(self, chunk: Chunk) -> Cost:
        """Of each position."""
        return Cost(-chunk.label_C, _probabilities_less_label(chunk))


@dataclass(frozen=True)
class Full:
    """The divergence over the whole vocabulary."""

    beta: float = 1.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for β outside [0, 1]."""
        _check_beta(self.beta)

    def cost(self, chunk: Chunk) -> Cost:
        """Of each position."""
        assert chunk.targets is not None
        assert chunk.targets.log_probs_CV is not None
        return Cost(*generalised_kl(chunk.log_probs_CV, chunk.targets.log_probs_CV, self.beta))


@dataclass(frozen=True)
class TopK:
    """The divergence over the `k` best of either and the label, each once, both renormalised there."""

    k: int = 32
    beta: float = 1.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for β outside [0, 1] or k below 1."""
        _check_beta(self.beta)
        if self.k < 1:
            raise ConfigError(f"k must be at least 1, got {self.k}")

    def cost(self, chunk: Chunk) -> Cost:
        """Of each position."""
        assert chunk.targets is not None
        k = min(self.k, chunk.log_probs_CV.shape[1])
        best_CK = chunk.log_probs_CV.topk(k).indices
        ids_CK = torch.cat([best_CK, chunk.targets.top(k), chunk.labels_C[:, None]], dim=1).sort(-1).values
        kept_CK = ids_CK >= 0
        kept_CK[:, 1:] &= ids_CK[:, 1:] != ids_CK[:, :-1]
        ids_CK = ids_CK.clamp_min(0)
        log_p_CK = _renormalised(chunk.log_probs_CV.gather(1, ids_CK), kept_CK)
        log_q_CK = _renormalised(chunk.targets.at(ids_CK, kept_CK), kept_CK)
        return Cost(*generalised_kl(log_p_CK, log_q_CK, self.beta), ids_CK)


@dataclass(frozen=True)
class Sampled:
    """The reverse KL's score-function estimate from the label alone.

    Averaged over y ~ p the gradient is that of the reverse KL. Differentiating `log p(y) − log q(y)` itself would not do:
    the teacher then has no effect on the gradient. The value means nothing; `c` estimates the divergence.
    """

    def cost(self, chunk: Chunk) -> Cost:
        """Of each position."""
        assert chunk.teacher_label_C is not None
        held_C = chunk.label_C - chunk.teacher_label_C
        if chunk.ratios_C is not None:
            held_C = held_C * chunk.ratios_C
        return Cost(held_C * chunk.label_C, _probabilities_less_label(chunk).mul_(-held_C[:, None]))


Objective = CrossEntropy | Full | TopK | Sampled


def generalised_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence `[C]` of log-probabilities `[C, K]`, and its gradient `[C, K]` in the logits behind `log_p`."""
    p = log_p.exp()
    if beta == 0:
        q = log_q.exp()
        return (q * (log_q - log_p)).sum(-1), p.sub_(q)
    log_m = log_q if beta == 1 else torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    apart = log_p - log_m
    student_C = (p * apart).sum(-1)
    gradient = p.mul_(apart.sub_(student_C[:, None]))
    if beta == 1:
        return student_C, gradient
    teacher_C = torch.sub(log_q, log_m, out=log_m).mul_(log_q.exp()).sum(-1)
    return beta * teacher_C + (1 - beta) * student_C, gradient.mul_(1 - beta)


def _renormalised(log_probs_CK: Tensor, kept_CK: Tensor) -> Tensor:
    return F.log_softmax(log_probs_CK.masked_fill(~kept_CK, OUT_OF_SET), dim=-1)


def _probabilities_less_label(chunk: Chunk) -> Tensor:
    """`p − onehot(y)` `[C, V]`."""
    p_CV = chunk.log_probs_CV.exp()
    return p_CV.scatter_(1, chunk.labels_C[:, None], chunk.label_C.expm1()[:, None])


def _check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta must lie in [0, 1], got {beta}")
