"""sentencepiece's table of normal forms (``precompiled_charsmap``), read and applied as sentencepiece does it.

The table is a double array (darts-clone) of UTF-8 spellings, after its length in bytes, and then the normal forms, each
ended by a zero byte; numbers are little-endian and 32 bits wide.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_HEADER = 4
_LEAF = 1 << 31
_LONGEST = 64  # characters of a spelling; the published tables have at most 18


class Charsmap:
    """Spelling -> normal form; of several spellings that a text begins with the longest is replaced.

    The tokenizers library looks at whole grapheme clusters instead, or else at single characters, so it finds other
    spellings where a text has marks or carriage returns. ``ValueError`` for a table that is damaged.
    """

    def __init__(self, data: bytes) -> None:
        size = int.from_bytes(data[:_HEADER], "little")
        if len(data) < _HEADER or size % 1024 or not 0 < size <= len(data) - _HEADER:
            raise ValueError(f"the table of normal forms says {size:,} of its {len(data):,} bytes are the spellings")
        units = np.frombuffer(data, "<u4", size // 4, _HEADER)
        self._forms = data[_HEADER + size :]
        _check(units, self._forms)
        self._units: list[int] = units.tolist()
        self._form = lru_cache(maxsize=1 << 16)(self._find)

    def normalize(self, text: str) -> str:
        """Return the text with every spelling replaced, from the left."""
        found, at = [], 0
        while at < len(text):
            size, form = self._form(text[at : at + _LONGEST])
            found.append(form)
            at += size
        return "".join(found)

    def _find(self, text: str) -> tuple[int, str]:
        """Return how many characters at the beginning of ``text`` have a normal form, and the form."""
        node, last = _offset(self._units[0]), None
        data = text.encode("utf-8", "surrogatepass")
        for i, byte in enumerate(data):
            node ^= byte
            unit = self._units[node]
            if unit & (_LEAF | 0xFF) != byte:
                break
            node ^= _offset(unit)
            if unit >> 8 & 1:
                last = i + 1, self._units[node] & ~_LEAF
        if last is None:
            return 1, text[0]
        size, start = last
        return len(data[:size].decode("utf-8", "replace")), self._forms[start : self._forms.index(0, start)].decode()


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & 1 << 9) >> 6)


def _check(units: np.ndarray, forms: bytes) -> None:
    """Raise :class:`ValueError` where following the table could leave it: other readers of it do not look."""
    leaves = units >> 31 == 1
    places = np.arange(len(units), dtype=np.int64)
    inner = units[~leaves].astype(np.int64)
    reached = places[~leaves] ^ ((inner >> 10) << ((inner & 1 << 9) >> 6))
    if (reached | 0xFF).max(initial=0) >= len(units):
        raise ValueError("the table of normal forms leads out of itself: it is damaged")
    starts = np.unique(units[leaves].astype(np.int64) & ~np.int64(_LEAF))
    if len(starts) and (starts.max() >= len(forms) or not forms.endswith(b"\0")):
        raise ValueError("the table of normal forms ends before its forms: it is truncated")
    forms.decode()
