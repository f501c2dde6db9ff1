"""Runs all checks of a bundle: first those that need no device, then those against the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.checkpoint.tensors import Weights
from stages.quantization.schemes import SCHEMES
from stages.runtime import backend, host, manifest
from stages.runtime.errors import BundleError
from stages.verification import checks, endings, running, weights
from stages.verification.checks import Check
from stages.verification.portions import portions
from stages.verification.report import Findings

if TYPE_CHECKING:
    from stages.verification.apart import Progress
    from stages.verification.case import Case


def verify(case: Case, progress: Progress) -> Findings:
    """Run the checks of ``case``; failed checks are among the findings; a bundle that cannot be checked at all raises.

    ``progress`` is told how many of how many things of a kind are done, kind after kind. Raises BundleError,
    RecordingError, LiveError or ConfigError, each with ``problems``.
    """
    model = case.manifest.model
    if case.manifest.target != case.target:
        raise BundleError(f"{case.bundle}: built for {case.manifest.target}, and the target of verify is {case.target}")
    findings = Findings(case.manifest.name, model["scheme"], case.target, case.manifest.device, case.reference)
    findings.not_run = _not_run(case)
    problems = manifest.check(case.manifest, run=not findings.not_run)
    if problems:
        raise BundleError(*problems)
    findings.not_run = findings.not_run or _unusable(case)
    findings.checks.append(Check("files", ok=True, detail=f"{len(case.manifest.files)} files match bundle.json"))
    problems = weights.misplaced(case.registry, case.records) + weights.mismatched(case.registry, case.tensors)
    if problems:
        raise BundleError(*problems)
    if case.reference == "live":
        _ = case.probes  # a corpus that cannot be read is said before the weights are compared and a model is loaded
    _check_weights(case, findings, progress)
    _check_tokenizer(case, findings)
    if findings.not_run:
        if case.device != "none":
            running.expect(case, findings, progress)
        findings.device = findings.reference = "none"
        findings.unchecked.append(f"the library was not run: {findings.not_run}")
        return findings
    running.check(case, findings, progress)
    return findings


def _not_run(case: Case) -> str:
    """Return why nothing is run, as far as that is known before TVM is imported; empty if it will be."""
    if case.device == "none":
        return "device is none"
    if case.device == "auto" and case.manifest.device == "cuda" and not host.has_nvidia_driver():
        return "no NVIDIA driver is loaded"
    return ""


def _unusable(case: Case) -> str:
    """Return why there is no device for the bundle, where it is to be run only if there is one."""
    if case.device != "auto" or case.manifest.device != "cuda":
        return ""
    try:
        found = backend.device("cuda")
        return "; ".join(manifest.capability_problems(case.manifest, backend.capability(found)))
    except BundleError as error:
        return "; ".join(error.problems)


def _check_weights(case: Case, findings: Findings, progress: Progress) -> None:
    scheme = SCHEMES[case.registry["scheme"]]
    compared = sum(len(entry["sources"]) for entry in case.registry["logical"])
    apart = portions(case, case.batch)
    found = case.spread(apart) if case.spread and len(apart) > 1 else None
    if found is not None:
        differing = [text for texts in found for text in texts]
    else:
        differing = weights.differences(
            case.registry,
            case.records,
            Weights(case.files, case.tensors),
            case.scales,
            progress=lambda done: progress(done, compared, "tensors compared"),
        )
    if differing:
        findings.checks += [Check("weights", ok=False, detail=text) for text in differing]
        return
    how = f"within half a step of {scheme.name}" if scheme.rows else f"bit for bit as {scheme.storage_dtype}"
    if case.scales != "max":
        how = f"within the error bound of {scheme.name} with scales: {case.scales}"
    findings.checks.append(Check("weights", ok=True, detail=f"{compared} tensors of the checkpoint, {how}"))


def _check_tokenizer(case: Case, findings: Findings) -> None:
    findings.checks.append(checks.round_trip(case.tokenizer, case.texts))
    if case.reader is None:
        findings.unchecked.append("the tokenizer: its source vocabulary is of no family known here")
        return
    wrong = [text for text in case.texts if case.tokenizer.prompt(text) != case.prompt(text)]
    detail = f"ids differ from those of the checkpoint's vocabulary for {wrong[0][:40]!r}" if wrong else "ids equal"
    findings.checks.append(Check("tokenizer against the source vocabulary", ok=not wrong, detail=detail))
    findings.checks += endings.check(case)
