"""Answers that keep to a JSON schema, by llguidance (the extra `l4ctx[json]`): which tokens may come next.

Knows neither models nor logits: `l4ctx.engine.row` chooses among the tokens that are allowed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l4ctx.errors import ModelFailureError, RequestError

if TYPE_CHECKING:
    from l4ctx.checkpoint.tokenizer import Tokenizer

ANY_OBJECT = "json"
"""Stands for any JSON object, instead of a schema's file."""

_MOST_BYTES = 1 << 20
_SPACING: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # else a model may pad for ever


class IncompleteAnswerError(ModelFailureError):
    """An answer was cut before it was whole in its format."""


def read_format(given: str) -> str:
    """The schema in JSON, from the file `given`, or of any object. Raises RequestError."""
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError('--response-format: pip install "l4ctx[json]" adds what keeps answers to a schema')
    if given == ANY_OBJECT:
        return json.dumps({"type": "object"})
    try:
        raw = Path(given).read_bytes()
    except OSError as error:
        raise RequestError(f"--response-format {given}: {error.strerror}; give json, or a file with a schema") from None
    if len(raw) > _MOST_BYTES:
        raise RequestError(f"--response-format {given}: larger than 1 MiB; no schema is")
    try:
        schema = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--response-format {given}: not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise RequestError(f"--response-format {given}: not a JSON schema, which is an object")
    if problem := _problem(_grammar(json.dumps(schema))):
        raise RequestError(f"--response-format {given}: {problem}")
    return json.dumps(schema)


def _grammar(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=_SPACING)


def _problem(grammar: str) -> str:
    """Why this grammar cannot be followed, in one line; empty if it can."""
    from llguidance import LLMatcher

    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return " ".join(" ".join(messages).split())[:300] if is_error else ""


class ResponseFormat:
    """A schema compiled for a tokenizer; each answer follows it from the beginning."""

    def __init__(self, schema: str, tokenizer: Tokenizer, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        """Raises RequestError for a tokenizer whose tokens are not bytes, and for a model without a stop token."""
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        if not tokenizer.byte_level or not stop_tokens:
            raise RequestError("--response-format: this needs a byte-level tokenizer and a token that ends answers")
        described = TokenizerWrapper(_Described(tokenizer, vocabulary, stop_tokens))
        known = LLTokenizer(described, n_vocab=vocabulary, eos_token=sorted(stop_tokens))
        self._begun = LLMatcher(known, _grammar(schema))
        if self._begun.is_error():
            raise RequestError(f"--response-format: {' '.join(self._begun.get_error().split())[:300]}")

    def answer(self) -> Constraint:
        """Of an answer that begins."""
        return Constraint(self._begun.deep_copy())


class Constraint:
    """What an answer may go on with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self) -> bytes:
        """A byte for each token of the vocabulary, which is not 0 where the token may come next."""
        found: bytes = self._matcher.compute_logit_bias()
        if self._matcher.is_error():
            raise IncompleteAnswerError(f"--response-format: {' '.join(self._matcher.get_error().split())[:300]}")
        return found

    def accept(self, token: int) -> None:
        """One of those that were allowed."""
        self._matcher.consume_token(token)


class _Described:
    """A tokenizer in the terms of llguidance."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_tokens: frozenset[int]) -> None:
        self.eos_token_id, self.bos_token_id = min(stop_tokens), tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocabulary)]
        self.special_token_ids = [token for token, spelled in enumerate(self.tokens) if not spelled]
        for token in self.special_token_ids:
            self.tokens[token] = b"<|%d|>" % token
        self._encode: Callable[[str], list[int]] = lambda text: list(tokenizer.encode_data(text).ids)

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))
