"""Structured output by llguidance: masks the tokens that cannot continue a text that fits a JSON schema."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stages.runtime.errors import RequestError
from stages.runtime.server.errors import ApiError

if TYPE_CHECKING:
    from stages.runtime.server.answer import Mask
    from stages.runtime.tokenizer import BundleTokenizer

LARGEST = 1 << 16  # characters of a grammar
KEPT = 64  # grammars that need not be compiled again
INSTALL = "pip install 'stagegraph[serve]' (or: pip install llguidance)"
Matcher: TypeAlias = Any  # llguidance's LLMatcher, which has no types
# A model that is unsure may go on with white space for ever: there is a most of it between two parts.
_JSON = {"whitespace_pattern": r"[ \n]{0,16}"}


class Grammars:
    """The grammars of one tokenizer; what llguidance makes of its tokens is made when the first is asked for."""

    def __init__(self, tokenizer: BundleTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: Any = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def json(self, schema: Any, where: str) -> Mask:
        """Return the mask of texts that fit a JSON schema; :class:`ApiError` for one that is wrong or too large."""
        if not isinstance(schema, dict | bool):
            raise ApiError(f"{where} must be a JSON schema", param=where)
        library = _library()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
        except ValueError as error:  # with a longer number than it reads
            raise ApiError(f"{where} cannot be used: {error!s:.300}", param=where) from None
        return self._mask(grammar, where)

    def lark(self, grammar: str, where: str) -> Mask:
        """Return the mask of texts of a grammar in llguidance's variant of Lark."""
        return self._mask(_library().LLMatcher.grammar_from_lark(grammar), where)

    def _mask(self, grammar: str, where: str) -> Mask:
        if len(grammar) > LARGEST:
            raise ApiError(f"{where} has more than {LARGEST:,} characters", param=where)
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
            else:
                self._tokens = self._tokens or _tokens(self._tokenizer)
                matcher = _library().LLMatcher(self._tokens, grammar, log_level=0)
                if not matcher.is_error():
                    matcher.compute_bitmask()  # some find only now that no text fits them
                if matcher.is_error():
                    reason = " ".join(matcher.get_error().split())
                    raise ApiError(f"{where} cannot be used: {reason:.300}", param=where)
                self._compiled[grammar] = matcher
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            matcher = self._compiled[grammar].deep_copy()
        return _Matching(matcher, self._tokenizer)


class _Matching:
    """Where one text is in its grammar."""

    def __init__(self, matcher: Matcher, tokenizer: BundleTokenizer) -> None:
        self._matcher = matcher
        self._count = tokenizer.active_vocab_size
        self._stop = np.zeros(self._count, bool)
        self._stop[[token for token in tokenizer.stop if token < self._count]] = True

    def allowed(self) -> np.ndarray:
        """Return a boolean for every id that has a token; where nothing can follow, the text may only end."""
        if self._matcher.is_stopped():
            self._check()
            return self._stop
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found: np.ndarray = np.unpackbits(bits, bitorder="little")[: self._count].astype(bool)
        return found | self._stop if self._matcher.is_accepting() else found & ~self._stop

    def accept(self, token: int) -> None:
        """Go on after an id."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())
            raise RequestError(
                f"the schema or grammar of the answer cannot be enforced, or exceeds a limit: {reason:.300}"
            )


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ApiError(f"structured output needs llguidance ({error}): {INSTALL}", status=501) from None
    return llguidance


def _tokens(tokenizer: BundleTokenizer) -> Any:
    """Return llguidance's view of a vocabulary: the bytes of each id."""
    library = _library()
    pieces = [tokenizer.piece(token) or b"" for token in range(tokenizer.active_vocab_size)]
    special = [token for token in range(len(pieces)) if tokenizer.is_special(token)]
    stop = sorted(token for token in tokenizer.stop if token < len(pieces))

    class Vocabulary:
        eos_token_id = stop[0] if stop else 0
        bos_token_id = None
        tokens = pieces
        special_token_ids = special

        def __call__(self, text: str | bytes) -> list[int]:
            return tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))

    return library.LLTokenizer(library.TokenizerWrapper(Vocabulary()), eos_token=stop or None)
