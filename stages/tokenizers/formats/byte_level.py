"""Byte-level spelling: the GPT-2 table that writes every byte as one printable character in tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable


def _alphabet() -> tuple[str, ...]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


CHARACTERS = _alphabet()
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def spell(token: Iterable[int]) -> str:
    """Write bytes in the byte-level alphabet: ``b" hi"`` is ``"Ġhi"``."""
    return "".join(CHARACTERS[byte] for byte in token)


def unspell(token: str) -> bytes:
    """Read bytes back from the byte-level alphabet; :class:`KeyError` for a character outside it."""
    return bytes(BYTES[character] for character in token)


def read_token(token: str) -> bytes:
    """Return the bytes of a vocabulary's token; one outside the byte-level alphabet stands for its own UTF-8."""
    try:
        return unspell(token)
    except KeyError:
        return token.encode()
