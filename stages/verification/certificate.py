"""Writes certificate.json: what was verified. It has no times or paths, so that equal results are equal bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stages.runtime import certificate, seal
from stages.runtime.wording import wording
from stages.verification.reference import digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stages.documents.verification import Verification
    from stages.runtime.documents import Certificate, Golden, JsonObject
    from stages.verification.case import Case

CARD = "README.md"
_LICENCE_FILE = re.compile(r"LICEN[SC]E|COPYING")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
_LICENCE = re.compile(r"^(license|license_name|license_link):[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_CARD_LIMIT = 1 << 20  # bytes of a model card that are looked at


def document(case: Case, verified: Verification, golden: Golden | None, source: str, made: JsonObject) -> Certificate:
    """Return the certificate without its seal, which is added when it is written (:mod:`stages.runtime.seal`).

    ``verified`` is verify.json, ``golden`` what :mod:`stages.runtime.golden` made. ``source`` is the repository and
    commit of the checkpoint, where its folder tells; ``made`` is the document that the key of this execution is the
    digest of.
    """
    bundle = case.manifest
    return {
        "format": f"stagegraph-certificate-{certificate.FORMAT}",
        "verdict": verified["verdict"],
        "bundle": {
            "name": bundle.name,
            "target": bundle.target,
            "scheme": bundle.model["scheme"],
            "sha256": bundle.sha256,
        },
        "checkpoint": {
            "blake3": digest_of(case.digests),
            "files": dict(case.digests),
            "licence": licence(case.files),
            "source": source,
        },
        "made": {
            "code": seal.seal(made["code"]),
            "tools": made["tools"],
            "libraries": made.get("libraries", {}),
            "inputs": made["inputs"],
        },
        "verification": verified,
        "tokenizer": {
            **wording({text: case.prompt(text) for text in case.texts}, case.tokenizer, case.manifest.folder),
            "proof": case.proof,
        },
        "golden": golden,
    }


def licence(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the licence of a checkpoint by its folder: the front matter of its card, and the licence file."""
    found: dict[str, str] = {}
    if CARD in files:
        with files[CARD].open("rb") as file:
            text = file.read(_CARD_LIMIT).decode("utf-8", "replace").replace("\r\n", "\n")
        front = _FRONT_MATTER.match(text)
        found = {key: value.strip("\"'") for key, value in _LICENCE.findall(front[1])} if front else {}
    texts = sorted(name for name in files if _LICENCE_FILE.match(name))
    return {**found, **({"file": texts[0]} if texts else {})}
