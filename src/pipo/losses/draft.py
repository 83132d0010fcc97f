"""What a draft looks like beside the distribution that it was drawn from: three numbers that the gate may see.

Shape legend: C drafts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_DRAFT_FEATURES = 3
RARE = -16.0
"""Log-probabilities below this, and margins above its opposite, tell no more."""


def draft_features(log_probs_CV: Tensor, draft_log_prob_C: Tensor) -> Tensor:
    """`[C, 3]`: log-probability of the draft, entropy, and margin between the two most likely tokens, each of order 1.

    In this order `max(log p(y), −16) / 4`, `−Σ p log p / 2` in nats, and `min(log p₍₁₎ − log p₍₂₎, 16) / 4`, all of the head's own
    distribution: temperature 1, before penalties, filters and grammar. `draft_log_prob_C` is log p(y).

    In the dtype of the log-probabilities; no gradient.
    """
    log_probs_CV = log_probs_CV.detach()
    entropy_C = torch.special.entr(log_probs_CV.exp()).sum(-1)
    return _features(draft_log_prob_C.detach(), entropy_C, log_probs_CV.topk(2, dim=-1).values)


def draft_features_of_logits(logits_CV: Tensor, draft_C: Tensor, best_C2: Tensor) -> Tensor:
    """As :func:`draft_features` of the logits' log-softmax, up to rounding, in fewer passes over the vocabulary.

    Args:
        draft_C: int64, the drafts y. best_C2: the two largest logits.
    """
    # Below −100 a weight is 0 in float32; an excluded token's −inf would make NaN of 0 · −inf.
    shifted_CV = (logits_CV - best_C2[:, :1]).clamp_(min=-100)
    weights_CV = shifted_CV.exp()
    mass_C = weights_CV.sum(-1)
    entropy_C = mass_C.log() - (weights_CV.mul_(shifted_CV)).sum(-1) / mass_C
    draft_log_prob_C = logits_CV.gather(1, draft_C[:, None])[:, 0] - best_C2[:, 0] - mass_C.log()
    return _features(draft_log_prob_C, entropy_C, best_C2)


def _features(draft_log_prob_C: Tensor, entropy_C: Tensor, best_C2: Tensor) -> Tensor:
    margin_C = best_C2[:, 0] - best_C2[:, 1]
    scaled = (draft_log_prob_C.clamp(min=RARE) / 4, entropy_C / 2, margin_C.clamp(max=-RARE) / 4)
    return torch.stack(scaled, dim=-1)
