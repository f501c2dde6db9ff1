"""Golden vectors: the largest logits that a reference gives for a text, and how close to them a bundle must come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.runtime.certificate import check_document
from stages.runtime.errors import BundleError
from stages.runtime.readings import readings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.runtime.documents import CheckLine, Golden, GoldenRow
    from stages.runtime.manifest import Manifest

SEQUENCES = 2  # read at once, where the library was built for as many
TOP = 16  # logits kept of each row


def vectors(tokens: Sequence[int], prompt: int, rows: np.ndarray, bound: float, sequences: int, origin: str) -> Golden:
    """Return what a certificate keeps of the logits ``rows`` [n, V], of which row i follows ``tokens[: i + 1]``.

    Kept are the rows that :func:`~stages.runtime.readings.readings` compare, of each the :data:`TOP` largest logits
    and the largest magnitude, which differences are relative to.
    """
    places = sorted({place for reading in readings(tokens, prompt, sequences) for place in reading.after})
    return {
        "origin": origin,
        "tokens": [int(token) for token in tokens],
        "prompt": prompt,
        "bound": bound,
        "rows": [_row(place, rows[place]) for place in places],
    }


def _row(place: int, row: np.ndarray) -> GoldenRow:
    # The order of equal logits is that of their ids: the same on every machine.
    ids = np.lexsort((np.arange(len(row)), -row))[:TOP]
    return {
        "after": place,
        "ids": [int(token) for token in ids],
        "logits": [_digits(row[token]) for token in ids],
        "largest": _digits(np.abs(row).max()),
    }


def _digits(value: np.floating[Any]) -> float:
    return float(f"{float(value):.9g}")  # nine digits tell any two float32 apart


def check(golden: Golden, manifest: Manifest, progress: Callable[[str], object]) -> list[CheckLine]:
    """Read the text of ``golden`` in every way with the bundle; return a check for each.

    ``progress`` is told what is read next. Raises :class:`BundleError` for what cannot be loaded, and
    :class:`~stages.runtime.errors.RequestError` for what the library does not take.
    """
    from stages.runtime.session import Session

    vocabulary = range(manifest.model["vocab_size"])
    if any(token not in vocabulary for row in golden["rows"] for token in row["ids"]):
        raise BundleError(f"the golden vectors hold ids outside the bundle's vocabulary of {len(vocabulary)}")
    golden_rows = {row["after"]: row for row in golden["rows"]}
    session = Session(manifest, sequences=min(SEQUENCES, manifest.model["max_batch"]))
    checks = []
    for reading in readings(golden["tokens"], golden["prompt"], session.sequences):
        progress(reading.name)
        missing = [place for place in reading.after if place not in golden_rows]
        if missing:
            raise BundleError(f"the golden vectors hold no logits after token {missing[0]}, for '{reading.name}'")
        rows = reading.read(session)
        measured = max(difference(row, golden_rows[place]) for row, place in zip(rows, reading.after, strict=True))
        ok, bound = measured <= golden["bound"], golden["bound"]
        detail = f"{measured:.2e} of the largest logit, at most {bound:.1e}"
        digits = float(f"{measured:.3g}") if math.isfinite(measured) else None
        checks.append(check_document(reading.name, ok, detail, digits, bound))
    return checks


def difference(found: np.ndarray, golden: GoldenRow) -> float:
    """Return how far a row of logits [V] is from a golden one, relative to its largest; infinite if not finite.

    A logit that was not among the kept ones is off by what it is above the smallest of them.
    """
    ids, wanted = golden["ids"], np.array(golden["logits"], dtype=np.float64)
    row = found.astype(np.float64)
    away = float(np.abs(row[ids] - wanted).max())
    others = np.delete(row, ids)
    above = float(others.max()) - float(wanted.min()) if len(others) else 0.0
    off = max(away, above)
    if not np.isfinite(row).all():
        return math.inf
    if off <= 0:
        return 0.0
    return off / golden["largest"] if golden["largest"] else math.inf
