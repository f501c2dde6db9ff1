"""T22: compares vocabularies that our own readers prove with transformers, if that can load the files.

Its AutoTokenizer is no reference here: for a ``tokenizer.model`` it chooses a class by names beside the file, and some
of them take the pieces for another kind of model. So a difference is a warning, and the ids are those of the library
that the vocabulary was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.proof.checks import NOTE, WARNING
from stages.tokenizers.proof.equality import difference
from stages.tokenizers.reference.automatic import Automatic
from stages.tokenizers.resolution import Resolution
from stages.tokenizers.tokenizer_family import Finding, ReferenceTokenizer, TokenizerFamily


class Unread(Exception):  # noqa: N818 - it says what is so, and fails nothing
    """Why transformers' reading is not there to be compared with, as a finding."""

    def __init__(self, level: str, why: str) -> None:
        self.finding = Finding("T22", level, f"texts and chats are not compared with transformers: {why}")


def open_files(family: TokenizerFamily, resolution: Resolution) -> Automatic:
    """Return what transformers loads; :class:`Unread` where it has no reader, or lacks a library, or refuses."""
    if family.transformers_needs is None:
        raise Unread(NOTE, f"transformers has no reader of {resolution.name}")
    absent = [name for name in family.transformers_needs if not _installed(name)]
    if absent:
        raise Unread(NOTE, f"transformers reads {resolution.name} where {' and '.join(absent)} are installed")
    try:
        return Automatic(resolution.files)
    except TokenizerError as error:
        raise Unread(NOTE, str(error)) from None


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def compare(reference: ReferenceTokenizer, theirs: Automatic, texts: Sequence[tuple[str, str]]) -> list[Finding]:
    """Compare every token, every one of the (kind, text) and what goes before a text; :class:`Unread` if it is no use.

    A T22 that is a note says that the ids of every text are equal; a warning has the first difference.
    """
    ours, named = reference.tokens(), theirs.tokens()
    unlike = [index for index, token in sorted(ours.items()) if named.get(index) != token]
    if unlike:
        index = unlike[0]
        counts = f"{len(unlike):,} of the {len(ours):,} ids"
        what = f"{counts} stand for other tokens in transformers' {theirs.name}, as {index} does"
        raise Unread(WARNING, f"{what}: {ours[index]!r} here and {named.get(index)!r} there")
    marks = {content[:2] for content in theirs.added}
    found = _tokens(theirs, named.keys() - ours.keys())
    theirs.read([text for _, text in texts])
    other = [
        (text, here, there)
        for _, text in texts
        for specials in ((True, False) if any(token in text for token in marks) else (True,))
        if (here := reference.encode(text, specials=specials)) != (there := theirs.encode(text, specials=specials))
    ]
    if other:
        count = len({text for text, _, _ in other})
        example = difference("such as", *other[0], ("here", theirs.name))
        found.append(
            Finding("T22", WARNING, f"transformers has other ids for {count:,} of {len(texts):,} texts, {example}")
        )
    else:
        found.append(Finding("T22", NOTE, f"{len(texts):,} texts have the same ids in transformers' {theirs.name}"))
    if theirs.prefix != reference.prefix or theirs.suffix:
        text = f"before a text the bundle puts {reference.prefix}, and transformers' {theirs.name} {theirs.prefix}"
        text += f" and after it {theirs.suffix}" if theirs.suffix else ""
        found.append(Finding("T17", WARNING, f"{text}; `add_bos_token` of tokenizer_config.json decides there"))
    return found


def _tokens(theirs: Automatic, more: Sequence[int] | set[int]) -> list[Finding]:
    if not more:
        return []
    shown = ", ".join(repr(theirs.tokens()[index].decode(errors="replace")) for index in sorted(more)[:3])
    text = f"transformers' {theirs.name} adds {len(more)} tokens of its own: {shown}"
    return [Finding("T22", WARNING, f"{text}; the bundle has those of the checkpoint alone")]
