"""The tokenizers library, whose reader panics at some files where it refuses others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.tokenizers.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load(text: str, refused: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json; :class:`TokenizerError`, ``refused`` and why, if it is none."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        # It raises plain Exception for every fault of the file, and a panic of Rust is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{refused}: {str(error)[:400]}") from None
