"""The demo's tokenizer: every piece of the world is one token, and any other text falls back to its bytes.

The vocabulary is the special tokens, the 256 bytes and the pieces of `world.PIECES`. Text is cut by `_CUT` into candidate
pieces; one that is in the vocabulary becomes its token, any other becomes one token per byte. So any text can be written
and read back exactly, and `pipo chat` or a server can be tried on the demo's checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pipo.demo.world import PIECES, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"
SPECIAL_TOKENS = (PAD_TOKEN, END_TOKEN, USER_TOKEN, ASSISTANT_TOKEN)
PAD_ID, END_ID, USER_ID, ASSISTANT_ID = range(len(SPECIAL_TOKENS))

VOCAB_SIZE = 384
"""Rows of the models' embedding: the vocabulary rounded up to a multiple of 128."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|end|>"
    "{%- else -%}<|user|>{{ message.content }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

_CUT = r" ?[+-]\d\d?(?!\d)| ?x\d| ?\p{L}+| ?\d|\s+(?!\S)|[^\p{L}\d]"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer; `save_pretrained` of what it returns writes `tokenizer.json` with the chat template."""
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for token in [*letters, *map(_spell, PIECES)]:
        vocabulary.setdefault(token, len(vocabulary))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def piece_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """The token of every piece of the world."""
    return {piece: tokenizer.convert_tokens_to_ids(_spell(piece)) for piece in PIECES}


def prompt_ids(problem: Problem, ids: dict[str, int]) -> list[int]:
    """The prompt of a problem: what the chat template makes of it as a user's message."""
    return [USER_ID, *(ids[piece] for piece in problem.pieces), ASSISTANT_ID]


def solution_ids(pieces: list[str], ids: dict[str, int]) -> list[int]:
    """A solution with the token that ends it."""
    return [*(ids[piece] for piece in pieces), END_ID]


def _spell(piece: str) -> str:
    """How the byte-level vocabulary writes a piece: a space is Ġ."""
    return piece.replace(" ", "Ġ")
