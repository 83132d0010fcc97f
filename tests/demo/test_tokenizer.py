"""The demo's tokenizer: any text survives, the world's pieces are single tokens, the chat template is the prompt."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo.demo.tokenizer import (
    ASSISTANT_ID,
    END_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    build_tokenizer,
    piece_ids,
    prompt_ids,
    solution_ids,
)
from pipo.demo.world import draw_problem, solve

TOKENIZER = build_tokenizer()
IDS = piece_ids(TOKENIZER)


@given(st.text().filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@pytest.mark.parametrize("text", ["Ann  is on 37.", "über 100 ≠ 99 🙂\n\tx", "+123 -8,x22 bread", " ", ""])
def test_awkward_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_text_of_the_world_is_one_token_a_piece(seed: int) -> None:
    rng = random.Random(seed)
    problem = draw_problem(rng, "train")
    solution = solve(problem, rng)
    assert TOKENIZER(problem.text).input_ids == [IDS[piece] for piece in problem.pieces]
    assert TOKENIZER("".join(solution)).input_ids == [IDS[piece] for piece in solution]


def test_the_chat_template_makes_the_prompt() -> None:
    rng = random.Random(0)
    problem = draw_problem(rng, "test")
    solution = solve(problem, rng)
    question = {"role": "user", "content": problem.text}
    answer = {"role": "assistant", "content": "".join(solution)}
    asked = TOKENIZER.apply_chat_template([question], add_generation_prompt=True, return_dict=False)
    assert asked == prompt_ids(problem, IDS)
    whole = TOKENIZER.apply_chat_template([question, answer], return_dict=False)
    assert whole == prompt_ids(problem, IDS) + solution_ids(solution, IDS)
    assert whole[-1] == END_ID
    again = TOKENIZER.apply_chat_template([question, answer, question], add_generation_prompt=True, return_dict=False)
    assert again == [*whole, *asked]


def test_ids_fit_the_models_and_survive_saving(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    assert len(TOKENIZER) <= VOCAB_SIZE
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, ASSISTANT_ID) == (PAD_ID, END_ID, 3)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Ann is on 37. Cards: +5. ß"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (PAD_ID, END_ID)
