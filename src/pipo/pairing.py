"""The rules of pairs: the one home of parity, PAD placement, label offsets, compaction and counts.

A *slot* is one token position; two consecutive slots ``2i, 2i+1`` are *pair* ``i``. PAD fills the second
slot of a pair whose second token does not exist (an odd prompt) or was rejected by the gate. PAD never
sits in a first slot, and as a filler it is never text: whether a slot is filler is a flag, not an id,
because the PAD id is an ordinary vocabulary entry that a model may sample.

No torch here. Slices and comparisons below work alike on lists, arrays and tensors.
Source: arXiv 2605.27255, sections 3 and 4.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipo.errors import PairingError

IGNORE_INDEX = -100
"""Label of a slot that carries no loss."""

# Step i of the backbone (after pair i) predicts slot 2i+2; step i of the MTP block predicts slot 2i+3.
TOKEN1_LABELS = slice(2, None, 2)
"""``labels[..., TOKEN1_LABELS]``: label of backbone step ``i`` at index ``i``, for steps ``0 … L-2``."""
TOKEN2_LABELS = slice(3, None, 2)
"""``labels[..., TOKEN2_LABELS]``: label of MTP step ``i`` at index ``i``, for steps ``0 … L-2``."""
MTP_INPUTS = slice(2, None, 2)
"""``input_ids[..., MTP_INPUTS]``: the token 1 that MTP step ``i`` reads, for steps ``0 … L-2``."""
FIRST_SLOTS = slice(0, None, 2)
SECOND_SLOTS = slice(1, None, 2)


class Pair(NamedTuple):
    """One pair. ``token2`` is ``None`` where the second slot is filler (PAD by flag)."""

    token1: int
    token2: int | None


# --- tokens <-> pairs ---------------------------------------------------------------------------------


def num_pairs(num_tokens: int) -> int:
    """Pairs that ``num_tokens`` consecutive tokens take: ⌈n/2⌉."""
    return (num_tokens + 1) // 2


def pairs_from_tokens(tokens: Sequence[int]) -> list[Pair]:
    """Pack tokens two by two; the last pair of an odd sequence has an empty second slot."""
    return [Pair(tokens[i], tokens[i + 1] if i + 1 < len(tokens) else None) for i in range(0, len(tokens), 2)]


def pairs_from_sizes(tokens: Sequence[int], sizes: Iterable[int]) -> list[Pair]:
    """Pack tokens into pairs that hold 1 or 2 of them, as `sizes` says, which must add up to their number."""
    pairs: list[Pair] = []
    at = 0
    for size in sizes:
        pairs.append(Pair(tokens[at], tokens[at + 1] if size == 2 else None))
        at += size
    if at != len(tokens):
        raise PairingError(f"{len(tokens)} tokens can't be packed into pairs that hold {at}")
    return pairs


def tokens_from_pairs(pairs: Iterable[Pair]) -> list[int]:
    """The tokens a user sees: both slots in order, fillers left out. Inverse of :func:`pairs_from_tokens`."""
    return [token for pair in pairs for token in pair if token is not None]


def slots_from_pairs(pairs: Iterable[Pair], pad_id: int) -> list[int]:
    """Slot ids ``[2·L]`` as the model reads them: PAD in every empty second slot."""
    return [slot for t1, t2 in pairs for slot in (t1, pad_id if t2 is None else t2)]


def pair_slots_from_tokens(tokens: Sequence[int], pad_id: int) -> list[int]:
    """A prompt's slots: the tokens, with one PAD appended when their number is odd."""
    return slots_from_pairs(pairs_from_tokens(tokens), pad_id)


def pair_mask(attention_mask: Any) -> Any:
    """``[..., T] → [..., L]``: a pair is real when either of its slots is (arrays or tensors)."""
    return attention_mask[..., FIRST_SLOTS] | attention_mask[..., SECOND_SLOTS]


# --- the gate -----------------------------------------------------------------------------------------


def accept(confidence: Any, threshold: Any) -> Any:
    """The gate: commit the draft when ``confidence ≥ threshold``.

    ``confidence`` lies in [0, 1], so a threshold ≤ 0 always commits and one above 1 never does.
    Works on floats and on tensors of equal shape.
    """
    return confidence >= threshold


def draws_drafts(threshold: float) -> bool:
    """Whether any draft can be committed at this threshold; where none can, the MTP block need not run."""
    return threshold <= 1.0


# --- capacity -----------------------------------------------------------------------------------------


def max_total_pairs(num_prompt_tokens: int, max_tokens: int, threshold: float) -> int:
    """Most pairs a request can come to hold: its prompt's, and those of ``max_tokens`` generated tokens.

    A gate that may reject can spend a whole pair on each token; at ``threshold ≤ 0`` every pair holds two.
    """
    generated = num_pairs(max_tokens) if threshold <= 0 else max_tokens
    return num_pairs(num_prompt_tokens) + generated


# --- training slots -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """A training example as slots. All three lists have the same even length ``T``.

    ``ids``: token or PAD id. ``labels``: the id to predict at this slot, or −100. ``filler``: True where the
    slot is PAD by rule; labels there are −100 unless a rejected draft is recorded for the second head.
    """

    ids: list[int]
    labels: list[int]
    filler: list[bool]

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.labels) == len(self.filler):
            raise PairingError(
                f"ids, labels and filler must be equally long, got {len(self.ids)}, {len(self.labels)}, {len(self.filler)}"
            )
        if len(self.ids) % 2:
            raise PairingError(f"slots come in pairs, got an odd number of them: {len(self.ids)}")
        if any(self.filler[FIRST_SLOTS]):
            where = 2 * self.filler[FIRST_SLOTS].index(True)
            raise PairingError(f"PAD may only fill second slots, but slot {where} is a first slot")

    def without_loss(self) -> Slots:
        """The same slots without labels."""
        return Slots(self.ids, [IGNORE_INDEX] * len(self.labels), self.filler)


def slots_from_turns(turns: Sequence[tuple[Sequence[int], bool]], pad_id: int) -> Slots:
    """Lay a conversation out in slots.

    ``turns`` are ``(token ids, supervised)`` in order; neighbours of the same kind count as one. Every
    supervised turn starts on a pair boundary: where what precedes it is odd, one PAD is appended to that.
    The total is padded to even. Fillers and unsupervised tokens carry −100. (Section 3.1.)
    """
    ids: list[int] = []
    labels: list[int] = []
    filler: list[bool] = []

    def pad_to_boundary() -> None:
        if len(ids) % 2:
            ids.append(pad_id)
            labels.append(IGNORE_INDEX)
            filler.append(True)

    previous_supervised = False
    for tokens, supervised in turns:
        if supervised and not previous_supervised and tokens:
            pad_to_boundary()
        ids.extend(tokens)
        labels.extend(tokens if supervised else [IGNORE_INDEX] * len(tokens))
        filler.extend([False] * len(tokens))
        if tokens:
            previous_supervised = supervised
    pad_to_boundary()
    return Slots(ids, labels, filler)


def split_pairs(slots: Slots, ratio: float, rng: random.Random, pad_id: int) -> Slots:
    """PAD augmentation: split ``ratio`` of the pairs whose second slot is supervised.

    ``(a, b) → (a, PAD), (b, PAD)``. The other pairs stay as they are. The number split is ``ratio`` times the
    number of candidates, rounded to the nearest integer, so ratio 0 splits none and ratio 1 splits all. (Section 3.1.)
    """
    if not 0.0 <= ratio <= 1.0:
        raise PairingError(f"the share of pairs to split must lie in [0, 1], got {ratio}")
    candidates = [
        i for i in range(len(slots.ids) // 2) if slots.labels[2 * i + 1] != IGNORE_INDEX and not slots.filler[2 * i + 1]
    ]
    chosen = set(rng.sample(candidates, round(ratio * len(candidates))))
    ids: list[int] = []
    labels: list[int] = []
    filler: list[bool] = []
    for i in range(len(slots.ids) // 2):
        if i not in chosen:
            ids += slots.ids[2 * i : 2 * i + 2]
            labels += slots.labels[2 * i : 2 * i + 2]
            filler += slots.filler[2 * i : 2 * i + 2]
            continue
        for slot in (2 * i, 2 * i + 1):
            ids += [slots.ids[slot], pad_id]
            labels += [slots.labels[slot], IGNORE_INDEX]
            filler += [False, True]
    return Slots(ids, labels, filler)


def reject_drafts(slots: Slots, ratio: float, rng: random.Random, pad_id: int) -> Slots:
    """Lay supervised turns out as a gate does that rejects each draft with probability ``ratio``.

    What follows a rejected draft is paired anew, as in decoding: ``(a, b), (c, d) → (a, PAD), (b, c), (d, PAD)``.
    :func:`split_pairs` never shows a model that: there ``b`` and ``d`` stay in slots of their own. The token that was rejected
    stays as the label of its slot, so the second head learns there too.
    """
    if not 0.0 <= ratio <= 1.0:
        raise PairingError(f"the share of drafts to reject must lie in [0, 1], got {ratio}")
    ids: list[int] = []
    labels: list[int] = []
    filler: list[bool] = []
    pair = 0
    while pair < len(slots.ids) // 2:
        if slots.labels[2 * pair] == IGNORE_INDEX:
            ids += slots.ids[2 * pair : 2 * pair + 2]
            labels += slots.labels[2 * pair : 2 * pair + 2]
            filler += slots.filler[2 * pair : 2 * pair + 2]
            pair += 1
            continue
        first = 2 * pair
        while pair < len(slots.ids) // 2 and slots.labels[2 * pair] != IGNORE_INDEX:
            pair += 1
        kept = [slot for slot in range(first, 2 * pair) if not slots.filler[slot]]
        at = 0
        while at < len(kept):
            token1, token2 = kept[at], kept[at + 1] if at + 1 < len(kept) else None
            # What follows a turn in its last pair is given, and no draft.
            drafted = token2 is not None and slots.labels[token2] != IGNORE_INDEX
            commit = token2 is not None and (not drafted or rng.random() >= ratio)
            ids += [slots.ids[token1], slots.ids[token2] if token2 is not None and commit else pad_id]
            labels += [slots.labels[token1], IGNORE_INDEX if token2 is None else slots.labels[token2]]
            filler += [False, not commit]
            at += 1 + commit
    return Slots(ids, labels, filler)


def cut_slots(slots: Slots, max_slots: int) -> Slots:
    """The first `max_slots` slots, an even number: no pair is cut."""
    if max_slots < 0 or max_slots % 2:
        raise PairingError(f"slots come in pairs: the number to keep must be even, got {max_slots}")
    return Slots(slots.ids[:max_slots], slots.labels[:max_slots], slots.filler[:max_slots])


# --- a regular teacher's view of paired text ----------------------------------------------------------


def teacher_tokens(slots: Slots) -> list[int]:
    """What a regular teacher reads: the slots with the fillers removed."""
    return [token for token, pad in zip(slots.ids, slots.filler, strict=True) if not pad]


def teacher_positions(filler: Sequence[bool]) -> list[int]:
    """``g(p) = #nonPAD(≤ p) − 1``: the teacher position whose state stands for slot ``p``.

    A filler inherits the token before it. Because first slots are never filler, ``g(p) ≥ 0``. (Section 3.2.)
    """
    positions: list[int] = []
    seen = 0
    for pad in filler:
        seen += not pad
        positions.append(seen - 1)
    return positions


def teacher_positions_of_steps(filler: Sequence[bool]) -> tuple[list[int], list[int]]:
    """Teacher positions to compare steps ``0 … L-2`` with: ``g(2i+1)`` for the backbone, ``g(2i+2)`` for MTP."""
    positions = teacher_positions(filler)
    return positions[1:-1:2], positions[2::2]


def never_commit_slots(slots: Slots, pad_id: int) -> list[int]:
    """The same text as a model that never commits would have come to hold it.

    Everything before the first label stays as it is; each token from there on is a pair of its own, ``(token, PAD)``.
    """
    start = _first_label(slots)
    alone = (token for token, pad in zip(slots.ids[start:], slots.filler[start:], strict=True) if not pad)
    return slots.ids[:start] + [slot for token in alone for slot in (token, pad_id)]


def never_commit_pairs(slots: Slots) -> list[int]:
    """For each token of :func:`teacher_tokens`, the pair of :func:`never_commit_slots` that holds it."""
    start = _first_label(slots)
    prompt = [slot // 2 for slot in range(start) if not slots.filler[slot]]
    num_alone = len(slots.filler[start:]) - sum(slots.filler[start:])
    return prompt + list(range(start // 2, start // 2 + num_alone))


def _first_label(slots: Slots) -> int:
    """The first slot with a label, which is a first slot; the end where none has one."""
    first = next((slot for slot, label in enumerate(slots.labels) if label != IGNORE_INDEX), len(slots.labels))
    return first - first % 2


# --- token-exact counts -------------------------------------------------------------------------------


@dataclass
class TokenCounts:
    """What a generation used, in tokens a user can see. Pairs and rejected drafts are kept beside them."""

    num_tokens: int = 0
    num_pairs: int = 0
    num_committed: int = 0
    num_rejected: int = 0

    def add_pair(self, *, num_tokens: int, judged: bool, committed: bool) -> None:
        """Count one pair.

        `num_tokens`: what it showed. `judged`: the gate judged its draft, and nothing cut the draft off.
        """
        self.num_pairs += 1
        self.num_tokens += num_tokens
        self.num_committed += committed
        self.num_rejected += judged and not committed

    @property
    def commit_rate(self) -> float:
        """Committed drafts / pairs; NaN before the first pair."""
        return self.num_committed / self.num_pairs if self.num_pairs else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """``1 + commit_rate``; NaN before the first pair."""
        return self.num_tokens / self.num_pairs if self.num_pairs else float("nan")
