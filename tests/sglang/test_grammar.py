"""Grammars over pairs: what is written obeys them in both slots, and drafts that fit are kept."""

import json
import re

import llguidance
import pytest
import requests
import torch
import xgrammar
from llguidance.hf import from_tokenizer

from byte_tokenizer import byte_tokenizer
from checkpoints import EOS, MARGIN, VOCAB, prompt, save_pipo
from pipo import reference
from servers import REPLY_S, greedy, serving

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["pair", "slot", "draft"]},
        "sure": {"type": "boolean"},
        "num": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 2, "maxItems": 3},
    },
    "required": ["kind", "sure", "num"],
    "additionalProperties": False,
}
REGEX = r"[a-f]{3,9}-[0-9]{2}"
EBNF = 'root ::= "a" root "b" | "xyz" | ("q" "r")'
LARK = EBNF.replace("root ::=", "start:").replace("root", "start")
ENDS = re.compile(r"a*(xyz|qr)b*")


class XGrammar:
    """What xgrammar allows after some tokens."""

    def __init__(self, kind, text):
        tokenizer = xgrammar.TokenizerInfo.from_huggingface(byte_tokenizer(), vocab_size=VOCAB, stop_token_ids=[EOS])
        compiler = xgrammar.GrammarCompiler(tokenizer)
        compiled = {
            "json_schema": lambda: compiler.compile_json_schema(text, any_whitespace=False),
            "regex": lambda: compiler.compile_regex(text),
            "ebnf": lambda: compiler.compile_grammar(text),
        }[kind]()
        self.start = lambda: xgrammar.GrammarMatcher(compiled)

    def mask(self, tokens):
        matcher = self.start()
        for token in tokens:
            assert matcher.accept_token(token)
        words = xgrammar.allocate_token_bitmask(1, VOCAB)
        matcher.fill_next_token_bitmask(words, 0)
        return bits(words[0])


class Guidance:
    """What llguidance allows after some tokens."""

    def __init__(self, kind, text):
        self.tokenizer = from_tokenizer(byte_tokenizer(), n_vocab=VOCAB, eos_token=EOS)
        self.grammar = {
            "json_schema": lambda: llguidance.LLMatcher.grammar_from_json_schema(
                text, defaults={"whitespace_flexible": False}
            ),
            "regex": lambda: llguidance.grammar_from("regex", text),
            "ebnf": lambda: llguidance.grammar_from("ebnf", text),
        }[kind]()

    def mask(self, tokens):
        matcher = llguidance.LLMatcher(self.tokenizer, self.grammar)
        if tokens:
            assert matcher.consume_tokens(list(tokens))
        return (
            torch.tensor(list(matcher.compute_bitmask()), dtype=torch.uint8)[:, None]
            .bitwise_right_shift(torch.arange(8, dtype=torch.uint8))
            .bitwise_and(1)
            .bool()
            .flatten()[:VOCAB]
        )


def bits(words):
    """bool `[V]` of int32 words, 32 entries each."""
    return (words[:, None] >> torch.arange(32) & 1).bool().flatten()[:VOCAB]


def written(model, ids, oracle, threshold, max_tokens=80):
    """What `pipo.reference` writes under a grammar."""
    closest = [float("inf")]

    def pick(logits_V, tokens, step, slot):
        if tokens and tokens[-1] == EOS:  # the slot after the end: a draft that nobody sees
            return 0
        limited_V = logits_V.masked_fill(~oracle.mask(tokens), -torch.inf)
        best, second = limited_V.topk(2).values.tolist()
        closest[0] = min(closest[0], best - second)
        return int(limited_V.argmax())

    made = reference.generate(model, ids, max_tokens=max_tokens, threshold=threshold, stop_ids=[EOS], pick=pick)
    assert closest[0] > MARGIN
    return made


SERVERS = {
    "xgrammar": (XGrammar, {"gate": "draft"}, {"reasoning_parser": "qwen3", "enable_strict_thinking": True}),
    "llguidance": (Guidance, {}, {"disable_overlap_schedule": True}),
}


@pytest.fixture(scope="module", params=SERVERS)
def served(request, tmp_path_factory):
    oracle, gate, arguments = SERVERS[request.param]
    folder = tmp_path_factory.mktemp("grammar") / "model"
    model = save_pipo(folder, "qwen3", **gate)
    arguments = {"grammar_backend": request.param, "constrained_json_disable_any_whitespace": True, **arguments}
    with serving(folder, chunked_prefill_size=16, **arguments) as server:
        yield model, server, oracle


def test_both_tokens_obey_and_drafts_are_kept(served):
    """In one batch: every kind of grammar at several τ, a request without one, a long prompt that is read in parts."""
    model, server, oracle = served
    cases = [
        ("json_schema", json.dumps(SCHEMA)), ("regex", REGEX), ("ebnf", LARK if oracle is Guidance else EBNF)
    ]  # fmt: skip
    jobs = [
        (kind, text, tau, prompt(3 + 5 * index, seed=index))
        for index, (kind, text, tau) in enumerate((*case, tau) for case in cases for tau in (0.0, 0.5, 1.5))
    ]
    jobs.append((*cases[0], 0.0, prompt(80, seed=50)))
    params = [greedy(80, tau, **{kind: text, "ignore_eos": False}) for kind, text, tau, _ in jobs]
    plain = prompt(6, seed=60)
    replies = server.generate([*(ids for *_, ids in jobs), plain], [*params, greedy(30, 0.0)])
    assert replies[-1].token_ids == reference.generate(model, plain, max_tokens=30, threshold=0.0).token_ids
    for reply, (kind, text, tau, ids) in zip(replies, jobs, strict=False):
        made = written(model, ids, oracle(kind, text), tau)
        assert reply.token_ids == made.token_ids, (kind, tau)
        assert made.num_committed > 0 or tau > 0
        assert obeys(kind, reply.text), reply.text


def obeys(kind, text):
    if kind == "json_schema":
        found = json.loads(text)
        return found["kind"] in SCHEMA["properties"]["kind"]["enum"] and set(found) == set(SCHEMA["properties"])
    return re.fullmatch(REGEX, text) if kind == "regex" else ENDS.fullmatch(text)


def test_sampled_text_obeys_too_streamed_through_the_openai_client(served):
    from openai import OpenAI

    _, server, _ = served
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    for stream in (True, False):
        reply = client.chat.completions.create(
            model="default", messages=[{"role": "user", "content": "Write"}], response_format=wanted, max_tokens=200,
            temperature=1.0, stream=stream, n=3,
            extra_body={"custom_params": {"threshold": 0}, "chat_template_kwargs": {"enable_thinking": False}},
        )  # fmt: skip
        texts = ["", "", ""]
        if stream:
            for chunk in reply:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            texts = [choice.message.content for choice in reply.choices]
        assert all(obeys("json_schema", text) for text in texts), texts


def test_thinking_is_bounded_and_then_the_grammar_holds(served):
    """The end of thinking may fall into either slot; what follows it obeys."""
    _, server, oracle = served
    if oracle is not XGrammar:
        pytest.skip("only xgrammar can bound thinking")
    for budget, tau in ((5, 0.0), (6, 0.0), (7, 0.5), (4, 1.5)):
        body = {
            "input_ids": prompt(7, seed=70 + budget), "require_reasoning": True, "max_thinking_tokens": budget,
            "sampling_params": greedy(120, tau, regex=REGEX, ignore_eos=False),
        }  # fmt: skip
        response = requests.post(f"{server.url}/generate", json=body, timeout=REPLY_S)
        assert response.ok, response.text
        ids = response.json()["output_ids"]
        end = list(b"</think>")
        letters = {token: letter[0] for token, letter in enumerate(_bytes())}
        found = [letters.get(token) for token in ids]
        assert found[budget : budget + len(end)] == end, found
        assert re.fullmatch(REGEX, bytes(found[budget + len(end) : -1]).decode()), found
        assert ids[-1] == EOS


def _bytes():
    tokenizer = byte_tokenizer()
    alphabet = {letter: byte for byte, letter in _alphabet().items()}
    return [bytes([alphabet[letter]]) for letter in tokenizer.convert_ids_to_tokens(range(256))]


def _alphabet():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()
