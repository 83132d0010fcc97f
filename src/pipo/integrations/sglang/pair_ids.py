"""A pair as one int64 token, which is what SGLang's scheduler, prefix tree and buffers carry.

`id = token1 << 20 | (token2 + 1)`; the low field is 0 where the second slot is filler. So filler is a flag here too, and every id is
non-negative, as the prefix tree wants.

Works alike on ints and on int64 tensors. Shape legend: N pairs, in whatever shape they come.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipo.errors import UnsupportedModelError
from pipo.pairing import Pair

if TYPE_CHECKING:
    from torch import Tensor

FIELD_BITS = 20
_FIELD = (1 << FIELD_BITS) - 1
MAX_VOCAB_SIZE = _FIELD
"""Entries of the largest vocabulary that fits."""
NO_TOKEN = -1
"""What :func:`token2` gives for filler."""


def refuse_vocabulary(vocab_size: int) -> None:
    """Raise `UnsupportedModelError` for a vocabulary that does not fit."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise UnsupportedModelError(f"pairs of ids up to {vocab_size} do not fit: at most {MAX_VOCAB_SIZE} entries")


def token1(ids: Any) -> Any:
    """First tokens of pair ids."""
    return ids >> FIELD_BITS


def token2(ids: Any) -> Any:
    """Second tokens of pair ids, `NO_TOKEN` for filler."""
    return (ids & _FIELD) - 1


def pair_id(first: int, second: int | None) -> int:
    """The id of a pair."""
    return first << FIELD_BITS | (0 if second is None else second + 1)


def pair_of(one: int) -> Pair:
    """The pair of an id."""
    second = token2(one)
    return Pair(token1(one), None if second == NO_TOKEN else second)


def ids_of(pairs: Iterable[Pair]) -> array[int]:
    """Ids of pairs, in the type that SGLang keeps token ids in."""
    return array("q", (pair_id(first, second) for first, second in pairs))


def tokens_of(ids: Iterable[int]) -> list[int]:
    """The tokens that a user sees: both of each pair, fillers left out."""
    return [token for one in ids for token in pair_of(one) if token is not None]


def join(token1_N: Tensor, token2_N: Tensor, committed_N: Tensor) -> Tensor:
    """Pair ids on the device, int64: filler where a draft is not committed."""
    second_N = (token2_N.long() + 1) * committed_N
    return (token1_N.long() << FIELD_BITS) | second_N


def slots(ids_N: Tensor, pad_id: int) -> Tensor:
    """`[N, 2]` slot ids as the model reads them: PAD in empty second slots."""
    import torch

    second_N = token2(ids_N)
    return torch.stack([token1(ids_N), second_N.masked_fill(second_N == NO_TOKEN, pad_id)], dim=-1)
