"""RWKV World: ``rwkv_vocab_*.txt``, whose lines hold an id, a Python literal of the token, and its length in bytes."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_bytes, read_text
from stages.tokenizers.formats.ranks import MAX_TOKEN_BYTES, bound_lines
from stages.tokenizers.formats.world_vocabulary import END, END_TEXT, FILE, WorldTokenizer
from stages.tokenizers.tokenizer_family import TokenizerFamily

if TYPE_CHECKING:
    from stages.tokenizers.resolution import Resolution

MAX_LINE = 8 * MAX_TOKEN_BYTES


def convert(resolution: Resolution) -> Any:
    """Build the tokenizer; :class:`TokenizerError` with every line that is not sound."""
    path = resolution.vocabulary
    tokens: dict[int, bytes] = {}
    problems, seen = [], set()
    bound_lines(read_bytes(path), path)
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            index, token = _parse(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if index in tokens or token in seen:
            problems.append(f"{path}:{number}: id {index} or token {token!r} again")
        tokens[index] = token
        seen.add(token)
    absent = [byte for byte in range(256) if bytes([byte]) not in seen]
    if absent:
        problems.append(f"{path}: T11: {len(absent)} of the 256 single bytes have no token; the file is truncated")
    if tokens and max(tokens) != len(tokens):
        problems.append(f"{path}: ids 1..{max(tokens)} but {len(tokens)} tokens: lines are missing")
    if problems:
        raise TokenizerError(*problems)
    return WorldTokenizer(tokens)


def _parse(line: str) -> tuple[int, bytes]:
    """Read ``id literal length``; the literal is a string or bytes and nothing that could run."""
    if len(line) > MAX_LINE:
        raise ValueError(f"a line of {len(line):,} characters is no token")
    index, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not index.isdecimal() or int(index) == END or not length.strip().isdecimal():
        raise ValueError(f"expected `id literal length`, found {line[:60]!r}")
    try:
        value = ast.literal_eval(literal)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{literal[:60]!r} is no Python literal ({error})") from None
    if not isinstance(value, str | bytes):
        raise ValueError(f"{literal[:60]!r} is neither a string nor bytes")
    token = value.encode() if isinstance(value, str) else value
    if len(token) != int(length) or not token:
        raise ValueError(f"{literal[:60]} has {len(token)} bytes and the line says {length.strip()}")
    return int(index), token


class GreedyReference:
    """Longest match by looking slices up, longest first: no trie, and its own reading of the source file."""

    prefix: list[int] = []

    def __init__(self, resolution: Resolution) -> None:
        self._tokens: dict[int, bytes] = {}
        for line in resolution.vocabulary.read_bytes().decode().split("\n"):
            if line:
                value = ast.literal_eval(line[line.index(" ") + 1 : line.rindex(" ")])
                self._tokens[int(line[: line.index(" ")])] = value.encode() if isinstance(value, str) else value
        self._ids = {token: index for index, token in self._tokens.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of ``text``; with ``specials`` the end of text in it is id 0."""
        ids: list[int] = []
        for i, part in enumerate(text.split(END_TEXT) if specials else [text]):
            ids += [END] if i else []
            ids += self._greedy(part.encode("utf-8", "surrogatepass"))
        return ids

    def _greedy(self, data: bytes) -> Iterator[int]:
        at = 0
        while at < len(data):
            lengths = (*self._lengths.get(data[at : at + 2], ()), 1)
            token = next(data[at : at + n] for n in lengths if data[at : at + n] in self._ids)
            yield self._ids[token]
            at += len(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        text, pending = "", b""
        for index in ids:
            if index == END:
                text, pending = text + pending.decode(errors="replace") + END_TEXT, b""
            else:
                pending += self._tokens[index]
        return text + pending.decode(errors="replace")

    def tokens(self) -> dict[int, bytes]:
        """Return every id with its bytes."""
        return {END: END_TEXT.encode(), **self._tokens}


FAMILY = TokenizerFamily(
    name="rwkv-world",
    convert=convert,
    reference=GreedyReference,
    normalize=None,
    end_of_text=(END_TEXT,),
    chats={},
    file=FILE,
    transformers_needs=None,
)
