"""certificate.json: what was verified of a bundle, and golden vectors to check it again on any machine.

It names the bundle by the digest of its bundle.json, which names every file of the bundle, and is sealed itself
(docs/certificate.md). A result is what one machine found with it (:mod:`stages.runtime.selftest`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stages.runtime import seal
from stages.runtime.errors import BundleError
from stages.runtime.folder import read_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stages.runtime.documents import Certificate, CheckLine, JsonObject, Result

Document = TypeVar("Document")
FILE, FORMAT = "certificate.json", 1
RESULT_FORMAT = 1
PASS, FAIL = "pass", "FAIL"
ATTESTATIONS = "attestations"  # folder beside it of results from other machines


@dataclass(frozen=True)
class Sealed(Generic[Document]):
    """A document whose seal and form were checked, and the SHA-256 in hex of the file that it was in."""

    document: Document
    sha256: str


def read(path: Path) -> Sealed[Certificate]:
    """Read a certificate; :class:`BundleError` for one that is damaged, changed or of another format."""
    return _read(path, "certificate", FORMAT, _check_certificate)


def of(root: Path, elsewhere: Path | None = None) -> Sealed[Certificate]:
    """Read the certificate of the bundle at ``root``, or the one that lies ``elsewhere``."""
    path = elsewhere or root / FILE
    if elsewhere is None and not path.exists():
        raise BundleError(
            f"{path}: the bundle has no certificate there; `pipeline export` of a verified bundle writes it, or name "
            "one with --certificate"
        )
    return read(path)


def read_result(path: Path) -> Sealed[Result]:
    """Read what a selftest wrote; :class:`BundleError` likewise."""
    return _read(path, "result", RESULT_FORMAT, _check_result)


def _read(path: Path, what: str, version: int, check: Callable[[JsonObject], None]) -> Sealed[Any]:
    if not path.exists():
        raise BundleError(f"{path}: there is no such file")
    document, data = read_document(path)
    found = document.get("format") if isinstance(document, dict) else None
    if found != f"stagegraph-{what}-{version}":
        raise BundleError(f"{path}: not a {what} of format {version}, which this version reads: {found!r:.60}")
    try:
        sound = seal.fixed(document) == data
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        raise BundleError(f"{path}: it is not as it was written, so damaged or changed: get the {what} again")
    try:
        check(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: not a {what}: {type(error).__name__}: {error!s:.200}") from None
    return Sealed(document, hashlib.sha256(data).hexdigest())


def check_document(
    name: str, ok: bool, detail: str, measured: float | None = None, bound: float | None = None
) -> CheckLine:
    """Return one check as a result tells it; numbers are relative differences, where the check has any."""
    return {"name": name, "ok": ok, "detail": detail, "measured": measured, "bound": bound}


def _check_certificate(document: JsonObject) -> None:
    _text(document["verdict"], document["bundle"]["sha256"])
    tokenizer = document["tokenizer"]
    _text(*(entry["text"] for entry in tokenizer["texts"]))
    _ids(*(entry["ids"] for entry in tokenizer["texts"]), *filter(None, [tokenizer["conversation"]]))
    golden = document["golden"]
    if golden is None:
        return
    tokens, prompt = golden["tokens"], golden["prompt"]
    _text(golden["origin"])
    _ids(tokens, *(row["ids"] for row in golden["rows"]))
    if type(prompt) is not int or not 0 < prompt <= len(tokens):
        raise ValueError("golden: the prompt must be some of the tokens")
    _number(golden["bound"])
    for row in golden["rows"]:
        _number(row["largest"], *row["logits"])
        if not row["ids"] or len(row["ids"]) != len(row["logits"]):
            raise ValueError("golden: a row must have an id for each of its logits")
        if type(row["after"]) is not int or not 0 <= row["after"] < len(tokens):
            raise ValueError(f"golden: a row follows token {row['after']!r:.20} of {len(tokens)}")


def _check_result(document: JsonObject) -> None:
    device, checks = document["device"], document["checks"]
    _text(document["bundle"], document["certificate"], device["kind"], device["name"])
    _text(*document["tools"].values(), *document["unchecked"])
    for check in checks:
        _text(check["name"], check["detail"])
        _number(*(check[key] for key in ("measured", "bound") if check[key] is not None))
    passed = bool(checks) and all(check["ok"] is True for check in checks)
    if document["result"] != (PASS if passed else FAIL):
        raise ValueError("its result is not that of its checks")


def _text(*values: Any) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"expected text, found {value!r:.60}")


def _ids(*values: Any) -> None:
    for value in values:
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise TypeError(f"expected ids, found {value!r:.60}")


def _number(*values: Any) -> None:
    for value in values:
        if type(value) not in (int, float) or not abs(value) < 2**127:
            raise TypeError(f"expected a number, found {value!r:.60}")
