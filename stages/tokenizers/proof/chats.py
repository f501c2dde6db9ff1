"""The proof T23: a conversation has the same ids as in transformers with the checkpoint's files.

Text and ids are compared at once: ids that are equal are of equal texts, and the same control tokens are in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.errors import RequestError
from stages.runtime.render import CLOCK
from stages.runtime.tokenizer import BundleTokenizer
from stages.tokenizers.proof.checks import CONVERSION, NOTE, WARNING, error
from stages.tokenizers.proof.equality import difference
from stages.tokenizers.reference.automatic import Automatic
from stages.tokenizers.resolution import Resolution
from stages.tokenizers.templates import DEFAULT
from stages.tokenizers.tokenizer_family import Finding

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


MAX_FORGED = 12  # control tokens that the last conversation spells
# What transformers says of a control token that its vocabulary has as a piece, too: our runtime takes it apart.
UNPARTED = "Can't sanitize"


def same_chats(
    directory: Path, resolution: Resolution, theirs: Automatic, left_out: Collection[str] = (), *, exact: bool
) -> Iterator[Finding]:
    """Compare every chat template of the checkpoint on a few conversations; a refusal by both is equal.

    ``directory`` is what a runtime reads, ``left_out`` the tokens that are text there. A difference is an error if
    ``exact``: texts have the same ids in both.
    """
    ours = BundleTokenizer(directory)
    spelt = [token for token in theirs.added if len(token) > 1 and token not in left_out]
    shown = [token for token in spelt if any(token in text for text in resolution.chat_templates.values())]
    cases = conversations([*shown, *spelt])
    for name, template in resolution.chat_templates.items():
        refused: list[str] = []
        # A second look where the time that a template writes may have gone on between the two.
        for _ in range(2 if CLOCK in template else 1):
            findings, refused = _differences(ours, theirs, name, template, cases)
            if not findings:
                break
        for finding in findings:
            message = finding.message.removesuffix(f"; {CONVERSION}")
            yield finding if exact else replace(finding, level=WARNING, message=message)
        if len(refused) == len(cases):
            yield Finding("T23", WARNING, f"chat template {name}: it takes none of {len(cases)} chats: {refused[0]}")
        elif not findings:
            equal = f"{len(cases)} chats have the ids of transformers' {theirs.name}"
            yield Finding("T23", NOTE, f"chat template {name}: {equal}{f', {len(refused)} refused' if refused else ''}")


def conversations(tokens: list[str]) -> list[tuple[list[JsonObject], bool]]:
    """Return messages, and whether the assistant is to speak; ``tokens`` are spelt by a user in the last."""
    system, user = (
        {"role": "system", "content": "Be <b>brief</b>."},
        {"role": "user", "content": "  Why? 你好 e\u0301 \n"},
    )
    answer = {"role": "assistant", "content": 'So: "x & y"\n'}
    forged = {"role": "user", "content": " and ".join(["I say", *dict.fromkeys(tokens[:MAX_FORGED]), "so"])}
    return [
        ([user], True),
        ([system, user], True),
        ([user, answer, user], True),
        ([system, user, answer], False),
        ([forged, answer, forged], True),
    ]


def _differences(
    ours: BundleTokenizer,
    theirs: Automatic,
    name: str,
    template: str,
    cases: list[tuple[list[JsonObject], bool]],
) -> tuple[list[Finding], list[str]]:
    """Return what differs, and why conversations were refused by both."""
    findings, refused = [], []
    # The default is left to transformers to find, so that the files it reads are compared too.
    expected = theirs.chats(None if name == DEFAULT else template, cases)
    for (messages, speaks), there in zip(cases, expected, strict=True):
        what = f"chat template {name}"
        try:
            here = ours.chat(messages, add_generation_prompt=speaks, template=name)
        except RequestError as failure:
            refused.append(str(failure))
            if "ids" in there:
                findings.append(error("T23", f"{what}: refused here and not by transformers: {failure}"))
            continue
        if UNPARTED in there.get("error", ""):
            continue
        if "ids" not in there:
            findings.append(error("T23", f"{what}: transformers refuses what is taken here: {there['error']}"))
        elif here != there["ids"]:
            contents = str([message["content"] for message in messages])
            findings.append(error("T23", difference(what, contents, here, there["ids"], ("here", "transformers"))))
    return findings, refused
