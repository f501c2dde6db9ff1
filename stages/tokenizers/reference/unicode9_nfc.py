"""NFC as the tokenizers library computes it: with the Unicode 9 tables of its time, stated here and not asked of it."""

from __future__ import annotations

import re
import unicodedata

# Combining marks that Unicode got after version 9: tables of that version know nothing of them, so they are neither
# ordered nor composed. The last range is the second half of the one pair that composes since Unicode 13.
_LATER = (
    "\u07fd\u0898-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1ace\u1df6-\u1dfa\ua82c"
    "\U00010d24-\U00010d27\U00010eab\U00010eac\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b"
    "\U0001145e\U00011839\U0001183a\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47\U00011a99"
    "\U00011d42\U00011d44\U00011d45\U00011d97\U00016ff0\U00016ff1\U0001e130-\U0001e136\U0001e2ae"
    "\U0001e2ec-\U0001e2ef\U00011930"
)
_SPLIT = re.compile(f"([{_LATER}])")


def nfc(text: str) -> str:
    """Return ``text`` in NFC where characters after Unicode 9 take no part: each stands between two texts."""
    if text.isascii():
        return text
    return "".join(unicodedata.normalize("NFC", part) for part in _SPLIT.split(text))
