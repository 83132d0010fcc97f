"""A pair as one int64 token, which is what SGLang's scheduler, prefix tree and buffers carry.

`id = (next + 1) << 40 | token1 << 20 | (token2 + 1)`. The low field is 0 where the second slot is filler: so filler is a flag here too.
The high field names token 1 of the pair that follows, and is 0 as long as that is not known. The MTP block's keys and values at a pair
are computed from it, so with it an id tells everything that a pair's cache entries were computed from, and the prefix tree, whose keys
are ids, shares what is equal and nothing else. Every id is non-negative, as the tree wants.

Works alike on ints and on int64 tensors. Shape legend: N pairs, in whatever shape they come; T tokens and L pairs of one text.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipo.errors import UnsupportedModelError
from pipo.pair_memory import Sizes
from pipo.pairing import Pair

if TYPE_CHECKING:
    from torch import Tensor

FIELD_BITS = 20
_FIELD = (1 << FIELD_BITS) - 1
_PAIR = (1 << 2 * FIELD_BITS) - 1
MAX_VOCAB_SIZE = _FIELD
"""Entries of the largest vocabulary that fits."""
NO_TOKEN = -1
"""What :func:`token2` gives for filler, and :func:`next_token1` where it is not known."""


def refuse_vocabulary(vocab_size: int) -> None:
    """Raise `UnsupportedModelError` for a vocabulary that does not fit."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise UnsupportedModelError(f"pairs of ids up to {vocab_size} do not fit: at most {MAX_VOCAB_SIZE} entries")


def token1(ids: Any) -> Any:
    """First tokens of pair ids."""
    return (ids >> FIELD_BITS) & _FIELD


def token2(ids: Any) -> Any:
    """Second tokens of pair ids, `NO_TOKEN` for filler."""
    return (ids & _FIELD) - 1


def next_token1(ids: Any) -> Any:
    """First tokens of the pairs that follow, `NO_TOKEN` where they are not known."""
    return (ids >> 2 * FIELD_BITS) - 1


def pair_id(first: int, second: int | None) -> int:
    """The id of a pair, whose next is not known yet."""
    return first << FIELD_BITS | (0 if second is None else second + 1)


def pair_of(one: int) -> Pair:
    """The pair of an id."""
    second = token2(one)
    return Pair(token1(one), None if second == NO_TOKEN else second)


def followed_by(one: int, first: int) -> int:
    """The id of the same pair, before one whose token 1 is `first`."""
    return (first + 1) << 2 * FIELD_BITS | one & _PAIR


def ids_of(tokens: Sequence[int], sizes: Sizes) -> array[int]:
    """Ids of a text in pairs that hold 1 or 2 tokens each, in the type that SGLang keeps token ids in.

    What follows the last pair is not known.
    """
    tokens_T = np.asarray(tokens, dtype=np.int64)
    ends_L = sizes.cumsum(dtype=np.int64)
    first_L = tokens_T[ends_L - sizes]
    ids_L = (first_L << FIELD_BITS) | np.where(sizes == 2, tokens_T[ends_L - 1] + 1, 0)
    ids_L[:-1] |= (first_L[1:] + 1) << 2 * FIELD_BITS
    return array("q", ids_L.tobytes())


def sizes_of(ids: array[int]) -> Sizes:
    """How many tokens each pair holds."""
    return np.where(np.frombuffer(ids, dtype=np.int64) & _FIELD, 2, 1).astype(np.uint8)


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
