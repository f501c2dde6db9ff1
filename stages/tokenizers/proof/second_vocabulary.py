"""Checks that two vocabulary files of one checkpoint, such as tokenizer.json and tokenizer.model, agree."""

from __future__ import annotations

from collections.abc import Iterator

from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.proof.checks import WARNING, error
from stages.tokenizers.proof.equality import PROBES, difference, sample_corpus
from stages.tokenizers.resolution import Resolution, second_vocabularies
from stages.tokenizers.tokenizer_family import Finding, ReferenceTokenizer


def agree(resolution: Resolution, reference: ReferenceTokenizer) -> Iterator[Finding]:
    """T05 and T21: ids that name other tokens in the second file are an error, other ids for a text are a warning.

    What stands in the two files is often not quite the same, and transformers never looks at the second; but a file
    of another model has other tokens.
    """
    for resolved in second_vocabularies(resolution):
        try:
            other = load_tokenizer_family(resolved.family).reference(resolved)
        except (TokenizerError, ValueError, KeyError, TypeError, IndexError) as fault:
            text = f"{resolved.name} cannot be read as {resolved.family} and is not compared: {fault}"
            yield Finding("T21", WARNING, text)
            continue
        yield from _compare(resolution.name, reference, resolved.name, other)


def _compare(name: str, reference: ReferenceTokenizer, other_name: str, other: ReferenceTokenizer) -> Iterator[Finding]:
    ours, theirs = reference.tokens(), other.tokens()
    unlike = [index for index, token in sorted(theirs.items()) if ours.get(index) != token]
    if unlike:
        index = unlike[0]
        text = (
            f"{len(unlike)} ids differ between {other_name} and {name}, such as {index}: {theirs[index]!r} there "
            f"and {ours.get(index)!r} here"
        )
        yield error("T05", text, "one of its tokenizer files belongs to another model: remove the wrong one")
        return
    for text in [*PROBES, *(text for _, text in sample_corpus())]:
        here, there = reference.encode(text, specials=False), other.encode(text, specials=False)
        if here != there:
            found = difference(
                f"{other_name} and {name} hold the same tokens; text", text, here, there, (name, other_name)
            )
            yield Finding("T21", WARNING, f"{found}; {name} is used, as transformers does")
            break
    if reference.prefix != other.prefix:
        text = (
            f"before a text {name} puts the ids {reference.prefix} and {other_name} {other.prefix}; the first is used"
        )
        yield Finding("T17", WARNING, text)
