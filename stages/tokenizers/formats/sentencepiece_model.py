"""Reads the file of sentencepiece, a protocol buffer, without protobuf: pieces, scores and normalisation.

Only the wire format and the fields that decide ids are known here; the numbers are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_bytes
from stages.tokenizers.formats.ranks import MAX_TOKEN_BYTES

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
MODELS = {UNIGRAM: "Unigram", BPE: "BPE", 3: "Word", 4: "Char"}
MAX_PIECES = 1 << 19  # twice the largest published
MAX_BYTES = 16 << 20  # of a file; the largest published ones have 5 MB
MAX_FIELDS = 1 << 20  # of a message; the largest hold a field for each piece
MAX_SHOWN = 3  # pieces in a message
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its position is its id. Of two possible merges the one of higher score is made."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides ids: the pieces and the two specifications; ids that are not used are -1."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    unk: int
    bos: int
    eos: int
    pad: int
    charsmap: bytes
    dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """Read ``tokenizer.model``; :class:`TokenizerError` for a file that is of another kind, damaged or too large."""
    data = read_bytes(path, MAX_BYTES)
    try:
        return _model(data)
    except (ValueError, struct.error) as error:
        raise TokenizerError(f"{path}: not a whole sentencepiece model: {error}") from None


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_message(number, value)))
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"more than {MAX_PIECES:,} pieces, far more than any model has")
        elif number == 2:
            trainer.update(_fields(_message(number, value)))
        elif number == 3:
            normalizer.update(_fields(_message(number, value)))
    if not pieces:
        raise ValueError("there are no pieces in it")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_integer(trainer, 3, UNIGRAM),
        byte_fallback=bool(_integer(trainer, 35, 0)),
        whitespace_as_suffix=bool(_integer(trainer, 24, 0)),
        unk=_integer(trainer, 40, 0),
        bos=_integer(trainer, 41, 1),
        eos=_integer(trainer, 42, 2),
        pad=_integer(trainer, 43, -1),
        charsmap=_message(2, normalizer.get(2, b"")),
        dummy_prefix=bool(_integer(normalizer, 3, 1)),
        remove_extra_whitespaces=bool(_integer(normalizer, 4, 1)),
        escape_whitespaces=bool(_integer(normalizer, 5, 1)),
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = _message(1, fields.get(1, b"")).decode("utf-8")
    raw = fields.get(2, b"\0\0\0\0")
    score = struct.unpack("<f", raw)[0] if isinstance(raw, bytes) else math.nan
    kind = _integer(fields, 3, NORMAL)
    if not 0 < len(text) <= MAX_TOKEN_BYTES:
        raise ValueError(f"a piece of {len(text):,} characters (1 to {MAX_TOKEN_BYTES} are possible)")
    if not math.isfinite(score) or not NORMAL <= kind <= BYTE:
        raise ValueError(f"piece {text!r} has score {score} and type {kind}")
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one message: an int of a varint, the bytes of anything else."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS:,} fields, far more than any model has")
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in {FIXED64, FIXED32}:
            length = 8 if wire == FIXED64 else 4
        else:
            raise ValueError(f"byte {at} is of no known kind of field ({wire})")
        if length > len(data) - at:
            raise ValueError(f"a field of {length:,} bytes begins at byte {at} of {len(data):,}: the file is truncated")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file ends within a number: it is truncated")
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            # Negative numbers are written as 64 bits.
            return value - (1 << 64) if value >= 1 << 63 else value, at
    raise ValueError(f"the number before byte {at} has more than 64 bits")


def _integer(fields: dict[int, Any], number: int, default: int) -> int:
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return value


def _message(number: int, value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError(f"field {number} is a number and should be text")
    return value
