"""Checks end-of-text tokens and the chat format of a bundle against the checkpoint's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.checkpoint import strict_json
from stages.checkpoint.generation import CONFIG, GENERATION, normalise
from stages.runtime.tokenizer import CONFIG as TOKENIZER_CONFIG
from stages.tokenizers.templates import emitted
from stages.verification.checks import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stages.verification.case import Case


def check(case: Case) -> Iterator[Check]:
    """Yield whether every id that the checkpoint ends a text with ends one in the bundle, and whether a chat template
    of the checkpoint is the bundle's.

    A bundle that lacks an end talks on for ever; one with another template talks nonsense, and computes rightly.
    """
    raw = {name: strict_json.read_object(case.files[name], name) for name in (CONFIG, GENERATION) if name in case.files}
    found, _ = normalise(raw.get(GENERATION, {}), raw[CONFIG], case.manifest.model["vocab_size"])
    missing = [token for token in found["stop"] if token not in case.tokenizer.stop]
    count = len(found["stop"])
    detail = f"{count} id{'s' * (count != 1)} of the checkpoint's files end{'s' * (count == 1)} a text"
    if missing:
        detail = f"the checkpoint has {missing}, the bundle {sorted(case.tokenizer.stop)}"
    yield Check("end-of-text ids", not missing, detail)
    wanted = emitted(case.resolution.chat_templates) if case.resolution else None
    if wanted is not None:
        same = case.manifest.folder.json(TOKENIZER_CONFIG).get("chat_template") == wanted
        yield Check("chat template", same, "the checkpoint's own" if same else "differs from the checkpoint's")
