"""Writes verify.json and the card of a bundle, without times and paths, so that equal results are equal bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from stages.verification.checks import EVERY_STEP, TEXT, Check

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.documents.verification import LossFigures, QuantizationLoss, Verification
    from stages.documents.weights import ErrorLine
    from stages.runtime.documents import Golden

VERIFIED, TEXT_VERIFIED = "verified", "text verified"


@dataclass
class Findings:
    """Everything found about one bundle, filled in as the checks run; ``not_run`` says why it was not run."""

    name: str
    scheme: str
    target: str
    device: str
    reference: str
    not_run: str = ""
    origin: str = ""
    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)  # what to do about failures
    loss: float | None = None
    golden: Golden | None = None
    quantization: QuantizationLoss | None = None

    @property
    def failures(self) -> list[str]:
        """Every failed check as a sentence."""
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.ok]

    @property
    def verdict(self) -> str:
        """The strongest verdict that the findings allow."""
        if self.failures:
            return "FAILED"
        if self.device == "none":
            return f"NOT RUN ({self.not_run})"
        if self.reference != "none" and any(check.name == EVERY_STEP for check in self.checks):
            return VERIFIED
        if self.reference != "none" and any(check.name.startswith(TEXT) for check in self.checks):
            return TEXT_VERIFIED
        return "runs, not checked against a reference"

    @property
    def passed(self) -> bool:
        """Whether something that is not the bundle was found to say the same."""
        return self.verdict in (VERIFIED, TEXT_VERIFIED)

    def summary(self) -> str:
        """One line."""
        measured = next((check.measured for check in self.checks if check.name == EVERY_STEP), None)
        if measured is None:
            return self.verdict
        text = f"{self.verdict}, logits within {measured:.1e} of the reference"
        if self.quantization is None:
            return f"{text}; not compared with the original model"
        figures = self.quantization["all"]
        return f"{text}; KL {figures['kl_mean']:.2g}, {figures['top1']:.0%} top-1 agreement with the original"

    def document(self) -> Verification:
        """Return verify.json; numbers are rounded to three digits, all that they mean, and null if not finite."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "bundle": self.name,
            "scheme": self.scheme,
            "target": self.target,
            "device": self.device,
            "reference": {"kind": self.reference, "origin": self.origin},
            "loss": _rounded(self.loss),
            "quantization": _written(self.quantization),
            "checks": [
                {
                    "name": check.name,
                    "ok": check.ok,
                    "detail": check.detail,
                    "measured": _rounded(check.measured),
                    "bound": check.bound,
                }
                for check in self.checks
            ],
            "unchecked": self.unchecked,
        }

    def card(self, quantization: Sequence[ErrorLine]) -> str:
        """Return the card in Markdown; ``quantization`` are the lines of quantize's report."""
        worst = max(quantization, key=lambda line: line["rmse"], default=None)
        lines = [
            f"# {self.name} ({self.scheme}, {self.target}): {self.verdict}",
            "",
            f"- device: {self.device}",
            f"- reference: {self.reference}{f', {self.origin}' if self.origin else ''}",
        ]
        if worst:
            lines.append(f"- largest quantization error: {worst['rmse']:.2e} relative RMSE, {worst['name']}")
        if self.loss is not None:
            lines.append(f"- mean loss on the prompt: {self.loss:.3f} nats per token")
        lines += _quantization_table(self.quantization)
        lines += ["", "| check | result | |", "| --- | --- | --- |"]
        lines += [
            f"| {check.name} | {'ok' if check.ok else 'FAILED'} | {_cell(check.detail)} |" for check in self.checks
        ]
        if self.unchecked:
            lines += ["", "Not checked:", "", *(f"- {text}" for text in self.unchecked)]
        return "\n".join(lines) + "\n"


def _quantization_table(found: QuantizationLoss | None) -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        f"Loss by quantization, against {found['original']}:",
        "",
        "| text | tokens | KL mean | median | 99 % | max | top-1 agreement | perplexity | original's perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, each in {"all": found["all"], **found["kinds"]}.items():
        numbers = f"{each['kl_mean']:.2g} | {each['kl_median']:.2g} | {each['kl_99']:.2g} | {each['kl_max']:.2g}"
        numbers += f" | {each['top1']:.1%} | {each['perplexity']:.4g} | {each['perplexity_original']:.4g}"
        lines.append(f"| {_cell(kind)} | {each['tokens']} | {numbers} |")
    return lines


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


def _written(found: QuantizationLoss | None) -> QuantizationLoss | None:
    if found is None:
        return None
    return {
        **found,
        "all": _finite(found["all"]),
        "kinds": {kind: _finite(each) for kind, each in found["kinds"].items()},
    }


def _finite(figures: LossFigures) -> LossFigures:
    numbers = cast("Mapping[str, float]", figures)
    return cast("LossFigures", {name: value if math.isfinite(value) else None for name, value in numbers.items()})


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
