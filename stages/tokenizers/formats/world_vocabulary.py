"""The RWKV World vocabulary in a bundle: ``rwkv_vocab.txt``, its writer, and a tokenizer that reads it.

One token a line: its id in decimal, a space, its bytes in base64 (RFC 4648); ids ascend, id 0 is the end of text and
has no line. Text is tokenised greedily: at each byte the longest token that the following bytes begin with.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats.byte_level import CHARACTERS, spell

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


FILE = "rwkv_vocab.txt"
END, END_TEXT = 0, "<|endoftext|>"


@dataclass(frozen=True)
class Encoded:
    """The encoding of a text, with the tokenizers library's name for its ids."""

    ids: list[int]
    tokens: list[str]


class WorldTokenizer:
    """Used like ``tokenizers.Tokenizer``; tokens are named in the byte-level alphabet."""

    def __init__(self, tokens: Mapping[int, bytes]) -> None:
        self.encode_special_tokens = False
        self._tokens = dict(tokens)
        self._names = {index: spell(token) for index, token in tokens.items()} | {END: END_TEXT}
        self._ids = {name: index for index, name in self._names.items()}
        self._root: dict[int, Any] = {}
        for index, token in tokens.items():
            node = self._root
            for byte in token:
                node = node.setdefault(byte, {})
            node[-1] = index

    @classmethod
    def load(cls, path: Path) -> WorldTokenizer:
        """Read a file that :meth:`save` wrote; :class:`TokenizerError` for any other."""
        tokens: dict[int, bytes] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            index, _, text = line.partition(b" ")
            try:
                tokens[int(index)] = base64.b64decode(text, validate=True)
            except (ValueError, binascii.Error) as error:
                raise TokenizerError(f"T01: {path}:{number}: expected `id base64` ({error})") from None
        return cls(tokens)

    def save(self, path: str, pretty: bool = False) -> None:  # noqa: ARG002 - as the library has it
        """Write the file."""
        lines = [b"%d %s\n" % (index, base64.b64encode(self._tokens[index])) for index in sorted(self._tokens)]
        Path(path).write_bytes(b"".join(lines))

    def spec(self) -> JsonObject:
        """Return what tokenizer.json would say of it, for the checks: every byte goes in and out as it is."""
        return {
            "added_tokens": [{"id": END, "content": END_TEXT, "special": True, "normalized": False}],
            "model": {"vocab": {name: index for name, index in self._ids.items() if index != END}},
            "pre_tokenizer": {"type": "ByteLevel"},
            "decoder": {"type": "ByteLevel"},
        }

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:  # noqa: ARG002
        """Return every token's name and id."""
        return self._ids

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a name."""
        return self._ids.get(token)

    def id_to_token(self, index: int) -> str | None:
        """Return the name of an id."""
        return self._names.get(index)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:  # noqa: ARG002
        """Tokenise; the end of text is found in it unless ``encode_special_tokens`` says that it is ordinary."""
        parts = [text] if self.encode_special_tokens else text.split(END_TEXT)
        ids = self._greedy(parts[0].encode("utf-8", "surrogatepass"))
        for part in parts[1:]:
            ids += [END, *self._greedy(part.encode("utf-8", "surrogatepass"))]
        return Encoded(ids, [self._names[index] for index in ids])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text; the bytes between two ends of text are decoded together."""
        runs: list[list[bytes]] = [[]]
        for index in ids:
            if index == END:
                runs.append([])
            else:
                runs[-1].append(self._tokens.get(index, b""))
        return ("" if skip_special_tokens else END_TEXT).join(b"".join(run).decode(errors="replace") for run in runs)

    def _greedy(self, data: bytes) -> list[int]:
        ids, at, end = [], 0, len(data)
        while at < end:
            node: dict[int, Any] | None = self._root
            longest, i = -1, at
            while node is not None and i < end and (node := node.get(data[i])) is not None:
                i += 1
                if -1 in node:
                    longest, after = node[-1], i
            if longest < 0:
                raise TokenizerError(f"no token begins with byte {CHARACTERS[data[at]]!r}")
            ids.append(longest)
            at = after
        return ids
