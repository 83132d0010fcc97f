"""Structured output: what a grammar lets a sample write next, for token 1 and, after it, for token 2.

Grammars are compiled and followed by `llguidance` (extra `serve`). Shape legend: V vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pipo.engine.request import SamplingParams
from pipo.errors import ConfigError, RequestError

WHITESPACE = r"( ?|\n {0,16})"
"""Between the parts of JSON: nothing, a space, or a new line with its indent. Without a bound, a weak model writes spaces forever."""


class Constraint:
    """One sample's place in its grammar. Lives on the host."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.failed = False
        """The grammar allows nothing, or was left: the sample can't go on."""

    @property
    def complete(self) -> bool:
        """Whether nothing more may be written."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """bool `[V]`: the tokens that may come next."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        flags = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        mask = flags.flatten()[: self._vocab_size].bool()
        if not mask.any():
            self.failed = True
            return torch.ones(self._vocab_size, dtype=torch.bool)
        return mask

    def allowed_after(self, token: int) -> Tensor:
        """bool `[V]`: the tokens that may come after `token`, which may come next. The place does not change."""
        if self.failed or self._matcher.try_consume_tokens([token]) != 1:
            return torch.ones(self._vocab_size, dtype=torch.bool)
        try:
            return torch.ones(self._vocab_size, dtype=torch.bool) if self.complete else self.allowed()
        finally:
            self._matcher.rollback(1)

    def accept(self, token: int) -> None:
        """Go on past a token that was written."""
        if not self._matcher.consume_token(token):
            self.failed = True


class ConstraintFactory:
    """Compiles the grammars of requests for one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(eos_ids)
        self._compiled_tokenizer: Any = None
        self._lock = threading.Lock()  # requests may be prepared in several threads

    def build(self, params: SamplingParams) -> Constraint | None:
        """A fresh constraint, or `None` where the request has none.

        Raises:
            RequestError: the grammar can't be compiled, or the model has no tokenizer.
            ConfigError: `llguidance` is not installed.
        """
        if params.json_schema is None and params.regex is None and params.grammar is None:
            return None
        if self._tokenizer is None:
            raise RequestError("structured output needs a tokenizer, and this model has none")
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise ConfigError("structured output needs llguidance: pip install 'pipo-llm[serve]'") from error
        with self._lock:
            if self._compiled_tokenizer is None:
                self._compiled_tokenizer = llguidance.hf.from_tokenizer(
                    self._tokenizer, self._vocab_size, self._eos_ids
                )
        make = llguidance.LLMatcher
        try:
            if params.json_schema is not None:
                schema = params.json_schema
                text = schema if isinstance(schema, str) else json.dumps(dict(schema))
                grammar = make.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
            elif params.regex is not None:
                grammar = make.grammar_from_regex(params.regex)
            else:
                grammar = make.grammar_from_lark(params.grammar or "")
            matcher = make(self._compiled_tokenizer, grammar)
        except (ValueError, TypeError) as error:
            raise RequestError(f"the grammar can't be compiled: {error}") from error
        if matcher.is_error():
            raise RequestError(f"the grammar can't be compiled: {matcher.get_error()}")
        return Constraint(matcher, self._vocab_size)
