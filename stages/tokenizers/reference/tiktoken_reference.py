"""tiktoken as the independent reference of the vocabularies that are ranks: their readers are not ours."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path


def ranks_of(path: Path) -> dict[bytes, int]:
    """Return token -> rank of a ``base64 rank`` file, read as tiktoken's own loader does."""
    lines = [line.split() for line in path.read_bytes().splitlines() if line]
    return {base64.b64decode(token): int(rank) for token, rank in lines}


class TiktokenReference:
    """A :class:`.tokenizer_family.ReferenceTokenizer` that is ``tiktoken.Encoding``; ``prefix`` goes before a text."""

    def __init__(
        self, name: str, pattern: str, ranks: Mapping[bytes, int], specials: Mapping[str, int], prefix: str | None
    ) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
        )
        self._known = [*ranks.values(), *specials.values()]
        self.prefix = [] if prefix is None else [specials[prefix]]

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of ``text``; ``specials`` as in ``allowed_special="all"``, else ``allowed_special=set()``."""
        return self._encoding.encode(text, allowed_special="all" if specials else set(), disallowed_special=())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids), errors="replace")

    def tokens(self) -> dict[int, bytes]:
        """Return every id with its bytes."""
        return {index: self._encoding.decode_single_token_bytes(index) for index in self._known}
