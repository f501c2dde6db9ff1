"""Results of selftests on other machines, kept in ``attestations/`` beside a bundle and shown on a card there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.runtime import certificate, seal, serving
from stages.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from stages.runtime.certificate import Sealed
    from stages.runtime.documents import Certificate, Result
    from stages.runtime.manifest import Manifest

CARD = "card.md"


def keep(bundle: Manifest, sealed: Sealed[Certificate], path: Path) -> str:
    """Keep the result at ``path`` beside the bundle and return the card; :class:`BundleError` if it is of another."""
    result = certificate.read_result(path)
    _refuse_foreign(bundle, sealed, result, path)
    folder = bundle.root / certificate.ATTESTATIONS
    try:
        folder.mkdir(exist_ok=True)
        # Named by what it says: the same result twice is one.
        (folder / f"{result.sha256[:16]}.json").write_bytes(seal.fixed(result.document))
        card = _card(bundle, sealed, found(bundle, sealed))
        (folder / CARD).write_text(card, "utf-8")
    except OSError as error:
        raise RequestError(f"{error.filename}: {error.strerror}") from None
    return card


def found(bundle: Manifest, sealed: Sealed[Certificate]) -> list[Sealed[Result]]:
    """Return the results kept beside a bundle; :class:`BundleError` for one that is damaged or of another."""
    results = []
    for path in sorted((bundle.root / certificate.ATTESTATIONS).glob("*.json")):
        results.append(certificate.read_result(path))
        _refuse_foreign(bundle, sealed, results[-1], path)
    return results


def _refuse_foreign(bundle: Manifest, sealed: Sealed[Certificate], result: Sealed[Result], path: Path) -> None:
    content = result.document
    problems = [
        f"{path}: it is of another {what}: run the selftest again with this one"
        for what, of, here in (
            ("bundle", content["bundle"], bundle.sha256),
            ("certificate", content["certificate"], sealed.sha256),
            ("certificate, which is of another bundle", sealed.document["bundle"]["sha256"], bundle.sha256),
        )
        if of != here
    ]
    if not problems and content["device"]["kind"] != bundle.device:
        problems = [f"{path}: it was run on {content['device']['kind']}, and the bundle is for {bundle.device}"]
    if problems:
        raise BundleError(problems[0])


def _card(bundle: Manifest, sealed: Sealed[Certificate], results: list[Sealed[Result]]) -> str:
    certified = sealed.document
    lines = [
        f"# {bundle.name} ({certified['bundle']['scheme']}, {bundle.target}): {certified['verdict']}",
        "",
        "What `selftest` said on other machines, of this bundle and its certificate.",
        "",
        "| device | result | largest difference | at most |",
        "| --- | --- | --- | --- |",
    ]
    for result in (each.document for each in results):
        measured = [check["measured"] for check in result["checks"] if check["measured"] is not None]
        bounds = [check["bound"] for check in result["checks"] if check["bound"] is not None]
        largest = f"{max(measured):.2e}" if measured else "not run"
        cells = (result["device"]["name"] or "-", result["result"], largest, f"{max(bounds):.1e}" if bounds else "")
        lines.append(f"| {' | '.join(serving.one_line(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"
