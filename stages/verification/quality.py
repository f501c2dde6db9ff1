"""Compares a bundle with the original model: the loss by quantization, and whether activations fit its dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.quantization.schemes import SCHEMES
from stages.verification import gates, loss, refusal

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from stages.runtime.session import Session
    from stages.verification.apart import Progress
    from stages.verification.case import Case
    from stages.verification.report import Findings


def check(
    case: Case, session: Session, original: Mapping[str, np.ndarray] | None, findings: Findings, progress: Progress
) -> None:
    """Compare the bundle with the original model: the loss by quantization, and whether it is within limits."""
    if original is None:
        why = "the original model needs reference: live (the extra 'verify')"
        if case.reference == "live":
            why = f"a context of {session.context_window} tokens is too short"
        findings.unchecked.append(f"loss by quantization: {why}")
        return
    check_range(case, original, findings)
    places = loss.measure(session, case.probes, original)
    figures = places.figures()
    findings.quantization = loss.report(places, case.probes, str(original["original_origin"]))
    limits = gates.limits(SCHEMES[case.registry["scheme"]], case.coarsest, case.limits)
    checked = gates.check(figures, limits)
    findings.checks += checked
    activations = any(check.name.startswith("int8 activations") and not check.ok for check in findings.checks)
    if activations or not all(check.ok for check in checked):
        findings.advice += refusal.ask(case, progress, activations=activations)
    if case.probes.longest < session.context_window:
        findings.unchecked.append(
            f"positions beyond {case.probes.longest:,} of {session.context_window:,} tokens of context: raise "
            "probe_tokens, and give a corpus that is long enough"
        )


def check_range(case: Case, original: Mapping[str, np.ndarray] | None, findings: Findings) -> None:
    """Refuse a dtype that cannot represent the original model's activations."""
    dtype = str(case.manifest.model["compute_dtype"])
    if original is not None:
        found = original["original_modules"].tolist(), original["original_largest"].tolist()
        findings.checks.append(gates.ranges(*found, dtype))
