"""Leaves out added tokens beyond the rows of the model's embedding.

transformers loads such a checkpoint and fails on a text that holds one of them. They are left out of what is emitted,
so that what spells one is ordinary text and no runtime reads beyond the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.tokenizers import library
from stages.tokenizers.formats.world_vocabulary import WorldTokenizer
from stages.tokenizers.proof.checks import WARNING, error
from stages.tokenizers.tokenizer_family import Finding, ModelFacts, ReferenceTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.tokenizers.resolution import Resolution

MAX_SHOWN = 10


def leave_out(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, dict[int, str]]:
    """Return the tokenizer without its added tokens from id ``rows`` on, and these: id -> text.

    Where other tokens are beyond the rows too, the vocabulary is another model's, which T06 says: nothing is left out.
    RWKV's own has ordinary tokens alone.
    """
    beyond = {index: text for text, index in tokenizer.get_vocab(with_added_tokens=True).items() if index >= rows}
    if not beyond or isinstance(tokenizer, WorldTokenizer):
        return tokenizer, {}
    document = json.loads(tokenizer.to_str())
    remaining = [token for token in document["added_tokens"] if token["id"] not in beyond]
    if len(document["added_tokens"]) - len(remaining) != len(beyond):
        return tokenizer, {}
    vocab = document["model"]["vocab"]
    if isinstance(vocab, dict):  # which may hold them too
        document["model"]["vocab"] = {text: index for text, index in vocab.items() if index not in beyond}
    else:
        document["model"]["vocab"] = vocab[:rows]
    shown = listed(beyond)
    cut = library.load(
        json.dumps({**document, "added_tokens": remaining}), f"T06: the vocabulary cannot be read without {shown}"
    )
    return cut, beyond


def without(resolution: Resolution, beyond: Mapping[int, str]) -> Resolution:
    """Return the checkpoint's declarations without the tokens that are left out."""
    texts = {*beyond.values()}
    return replace(
        resolution,
        declared={index: text for index, text in resolution.declared.items() if index not in beyond},
        roles={role: text for role, text in resolution.roles.items() if text not in texts},
        assumed={role: text for role, text in resolution.assumed.items() if text not in texts},
    )


def free_of(texts: Sequence[tuple[str, str]], beyond: Mapping[int, str]) -> list[tuple[str, str]]:
    """Return the (kind, text) pairs that spell none of the tokens."""
    return [pair for pair in texts if not any(token in pair[1] for token in beyond.values())]


def findings(
    resolution: Resolution, reference: ReferenceTokenizer, facts: ModelFacts, beyond: Mapping[int, str]
) -> list[Finding]:
    """T06: say which tokens are left out; an error where every text, or every chat, needs one."""
    if not beyond:
        return []
    where = f"beyond the {facts.rows:,} rows of {facts.embedding}"
    if set(reference.prefix) & beyond.keys():
        text = f"every text is preceded by the ids {reference.prefix}, which are {where}"
        return [error("T06", text, "the tokenizer belongs to another model")]
    found = [
        Finding(
            "T06",
            WARNING,
            f"added tokens {where} are left out: {listed(beyond)}; a text that spells one is read as plain text "
            "(transformers fails on it)",
        )
    ]
    roles = [f"{role}_token {text!r}" for role, text in resolution.roles.items() if text in beyond.values()]
    if roles:
        problem = f"tokenizer_config.json names {', '.join(roles)}, which the model can neither read nor write"
        found.append(Finding("T14", WARNING, f"{problem}; left out"))
    for name, template in resolution.chat_templates.items():
        written = sorted(text for text in beyond.values() if text in template)
        if written:
            found.append(
                Finding("T16", WARNING, f"chat template {name} writes {', '.join(written[:MAX_SHOWN])}, {where}")
            )
    return found


def listed(beyond: Mapping[int, str]) -> str:
    """Return the first few of the tokens with their ids, and how many more there are."""
    shown = ", ".join(f"{text!r} ({index})" for index, text in sorted(beyond.items())[:MAX_SHOWN])
    return f"{shown} and {len(beyond) - MAX_SHOWN:,} more" if len(beyond) > MAX_SHOWN else shown
