"""Incremental text against `tokenizer.decode` of everything, on byte-level, byte-fallback and word tokenizers."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipo.engine.detokenize import Detokenizer, StopMatcher, TextDecoder
from pipo.errors import RequestError

SPECIALS = [AddedToken("<|end|>", special=True), AddedToken("<|pad|>", special=True)]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©"), ("â", "Ĥ"), ("ð", "Ł")]


def byte_level():
    """As Qwen's and Llama 3's: every token is a string of bytes, some of them half characters."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([*SPECIALS, AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback():
    """As Llama 2's: spaces as ▁, the first one stripped, unknown characters as runs of byte tokens."""
    words = ["<unk>", "▁", "▁hello", "▁world", "wor", "ld", "é", "E", "N", "D", "▁EN", "."]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def metaspace():
    """As T5's and Gemma's kin: the decoder drops the leading space of the first token only."""
    vocab = {word: i for i, word in enumerate(["<unk>", "▁hello", "▁world", "▁", "ing", "END", "▁EN", "D"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_pieces():
    """As BERT's: a space before every token but the first and the continued ones."""
    vocab = {word: i for i, word in enumerate(["[UNK]", "hello", "world", "##ing", ".", "END", "EN", "##D"])}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback, metaspace, word_pieces)}
DECODERS = {name: TextDecoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def full(name, ids):
    return TOKENIZERS[name].decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def random_ids(name, draw_text, rng):
    """Ids of real text with random tokens between, ids beyond the vocabulary and special ones included."""
    if name in ("metaspace", "word_pieces"):
        return [rng.randrange(len(TOKENIZERS[name]) + 3) for _ in draw_text]
    ids = TOKENIZERS[name](draw_text, add_special_tokens=False)["input_ids"]
    for _ in range(rng.choice([0, 0, 1, 5])):
        ids.insert(rng.randint(0, len(ids)), rng.randrange(len(TOKENIZERS[name]) + 3))
    return ids


texts = st.text(alphabet="hello wrd é€😀漢END.�\u0301\u200d", max_size=60)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=150)
@given(text=texts, rng=st.randoms(use_true_random=False))
def test_the_stream_adds_up_to_the_full_decode(name, text, rng):
    """A lost or doubled character, a wrong leading space, half a character given out, would all show here."""
    ids = random_ids(name, text, rng)
    detokenizer = Detokenizer(DECODERS[name])
    stream = ""
    for i, token_id in enumerate(ids):
        stream += detokenizer.push(token_id)
        assert full(name, ids[: i + 1]).startswith(stream)
        assert detokenizer.text == stream
    stream += detokenizer.finish()
    assert stream == detokenizer.text == full(name, ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(deadline=None, max_examples=100)
@given(rng=st.randoms(use_true_random=False))
def test_random_bytes_add_up_to_the_full_decode(name, rng):
    """What a random model writes: mostly invalid bytes, in runs longer than the window."""
    ids = [rng.randrange(len(TOKENIZERS[name])) for _ in range(rng.choice([3, 60, 150]))]
    detokenizer = Detokenizer(DECODERS[name])
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == full(name, ids)


def ids_of_bytes(name, data):
    if name == "byte_fallback":
        return [TOKENIZERS[name].convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    symbols = {}  # GPT-2's map from bytes to printable symbols
    spare = 0
    for byte in range(256):
        printable = chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)
        symbols[byte] = chr(byte) if printable else chr(256 + spare)
        spare += not printable
    return [TOKENIZERS[name].convert_tokens_to_ids(symbols[byte]) for byte in data]


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_half_a_character_is_never_given_out(name):
    detokenizer = Detokenizer(DECODERS[name])
    ids = ids_of_bytes(name, "😀".encode())
    assert full(name, ids) == "😀"
    assert [detokenizer.push(i) for i in ids[:3]] == ["", "", ""]
    assert detokenizer.push(ids[3]) + detokenizer.finish() == "😀"


def test_a_special_token_between_the_bytes_of_a_character_is_no_matter():
    name = "byte_level"
    ids = ids_of_bytes(name, "€".encode())
    ids.insert(1, TOKENIZERS[name].convert_tokens_to_ids("<|pad|>"))
    detokenizer = Detokenizer(DECODERS[name])
    assert "".join(map(detokenizer.push, ids)) == "€"


def test_added_tokens_that_are_not_special_are_text():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.convert_tokens_to_ids(["<think>", "<|end|>", "hello"])
    assert Detokenizer(DECODERS["byte_level"]).push_all(ids) == ("<think>hello", 3)


# --- stop strings -----------------------------------------------------------------------------------


def first_stop(text, stops):
    """Reference: character by character, the stop string completed first; of two, the longer."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


stop_lists = st.lists(st.text(alphabet="hel wEND.é😀", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None, max_examples=300)
@given(st.text(alphabet="hel wEND", max_size=40), stop_lists, st.randoms(use_true_random=False))
def test_matching_does_not_depend_on_how_the_text_is_split(text, stops, rng):
    matcher = StopMatcher(stops)
    given_out, fed = "", 0
    while fed < len(text) and matcher.matched is None:
        step = rng.randint(1, 7)
        given_out += matcher.feed(text[fed : fed + step])
        fed += step
    expected = first_stop(text, stops)
    if expected is None:
        assert matcher.matched is None
        assert given_out + matcher.held == text
    else:
        assert (given_out, matcher.matched) == (text[: expected[0]], expected[1])


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(deadline=None, max_examples=200)
@given(text=texts, stops=stop_lists, rng=st.randoms(use_true_random=False))
def test_stop_strings_end_the_text_at_the_token_that_completes_them(name, text, stops, rng):
    """Exact cut and exact token: the first prefix of the tokens whose whole text holds a stop string."""
    ids = random_ids(name, text, rng)
    stops = [stop for stop in stops if "�" not in stop]
    holds = [i for i in range(1, len(ids) + 1) if first_stop(full(name, ids[:i]), stops)]
    detokenizer = Detokenizer(DECODERS[name], stops)
    stream, num_taken = detokenizer.push_all(ids)
    stream += detokenizer.finish()
    if holds:
        whole = full(name, ids[: holds[0]])
        start, stop = first_stop(whole, stops)
        assert (stream, detokenizer.stop_string, num_taken) == (whole[:start], stop, holds[0])
    else:
        assert (stream, detokenizer.stop_string, num_taken) == (full(name, ids), None, len(ids))


def pieces(stops, tokens, **kwargs):
    detokenizer = Detokenizer(DECODERS["byte_level"], stops)
    ids = TOKENIZERS["byte_level"].convert_tokens_to_ids(tokens)
    return [detokenizer.push(i, **kwargs) for i in ids], detokenizer


def test_a_stop_string_inside_a_token_cuts_the_token():
    given_out, detokenizer = pieces(["ell"], ["hello", "h"])
    assert given_out == ["h", ""]
    assert detokenizer.stop_string == "ell"
    assert detokenizer.finish() == ""


def test_text_that_could_become_a_stop_string_is_held_back_and_given_out_when_it_does_not():
    given_out, detokenizer = pieces(["loop"], ["hello", "o", "h"])
    assert given_out == ["hel", "", "looh"]
    assert detokenizer.finish() == ""
    _, detokenizer = pieces(["loop"], ["hello"])
    assert detokenizer.finish() == "lo"
    assert detokenizer.text == "hello"


def test_before_min_tokens_stop_strings_do_not_count():
    detokenizer = Detokenizer(DECODERS["byte_level"], ["lo"])
    ids = TOKENIZERS["byte_level"].convert_tokens_to_ids(["hello", "l", "o", "hello"])
    assert detokenizer.push(ids[0], check_stop=False) == "hello"  # holds one
    assert detokenizer.push(ids[1], check_stop=False) == "l"
    assert detokenizer.push(ids[2]) == "o"  # begins before the boundary
    assert detokenizer.push(ids[3]) == "hel"
    assert detokenizer.stop_string == "lo"


def test_a_stop_string_in_an_open_run_of_bytes_before_min_tokens_does_not_count():
    ids = ids_of_bytes("byte_fallback", b"ENDxEND")
    detokenizer = Detokenizer(DECODERS["byte_fallback"], ["END"])
    for i in ids[:3]:
        detokenizer.push(i, check_stop=False)
    assert detokenizer.push_all(ids[3:]) == ("ENDx", 4)
    assert detokenizer.stop_string == "END"


# --- edges --------------------------------------------------------------------------------------------


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(None)
    assert detokenizer.push_all([1, 2, 3]) == ("", 3)
    assert detokenizer.finish() == ""
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        Detokenizer(None, ["x"])


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("data", [b"\x80" * 5000, "é".encode() * 2500, b"hello " * 800])
def test_the_work_does_not_grow_with_the_text(name, data, monkeypatch):
    """Decoding all of it for each token would decode 12 million tokens here."""
    decoded = 0
    plain = TextDecoder.decode

    def counting(self, ids):
        nonlocal decoded
        decoded += len(ids)
        return plain(self, ids)

    monkeypatch.setattr(TextDecoder, "decode", counting)
    detokenizer = Detokenizer(DECODERS[name], ["never"])
    ids = ids_of_bytes(name, data)
    detokenizer.push_all(ids)
    detokenizer.finish()
    assert decoded < 40 * len(ids)
    assert detokenizer.text == full(name, ids)


def test_windows_are_cut_anywhere():
    """Long valid text whose window is cut in the middle of characters again and again."""
    rng = random.Random(3)
    text = "".join(rng.choice(["é", "😀", "漢", "a", " "]) for _ in range(2000))
    ids = ids_of_bytes("byte_level", text.encode())
    detokenizer = Detokenizer(DECODERS["byte_level"])
    assert detokenizer.push_all(ids)[0] == text
