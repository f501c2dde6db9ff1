"""What verify says: verify.json and the card, without times and paths, so that equal results are equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.verification.checks import EVERY_STEP, TEXT, Check

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
    golden: dict[str, Any] | None = None  # of stages.runtime.golden
    quantization: Mapping[str, Any] | None = None  # see loss.report

    @property
    def failures(self) -> list[str]:
        """Every failed check as a sentence."""
        return [f"{check.name}: {check.detail}" for check in self.checks if not check.ok]

    @property
    def verdict(self) -> str:
        """The most that may be said of the bundle."""
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
        return f"{text}; KL {figures['kl_mean']:.2g}, {figures['top1']:.0%} first choices as the original"

    def document(self) -> dict[str, Any]:
        """Return verify.json; numbers are rounded to three digits, all that they mean."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "bundle": self.name,
            "scheme": self.scheme,
            "target": self.target,
            "device": self.device,
            "reference": {"kind": self.reference, "origin": self.origin},
            "loss": _rounded(self.loss),
            "quantization": self.quantization,
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

    def card(self, quantization: Sequence[Mapping[str, Any]]) -> str:
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
            lines.append(f"- mean loss on the prompt: {self.loss:.3f} nats a token")
        lines += _quantization_table(self.quantization)
        lines += ["", "| check | result | |", "| --- | --- | --- |"]
        lines += [
            f"| {check.name} | {'ok' if check.ok else 'FAILED'} | {_cell(check.detail)} |" for check in self.checks
        ]
        if self.unchecked:
            lines += ["", "Not checked:", "", *(f"- {text}" for text in self.unchecked)]
        return "\n".join(lines) + "\n"


def _quantization_table(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        f"What quantization has cost, against {found['original']}:",
        "",
        "| text | tokens | KL mean | median | 99 % | max | first choice equal | perplexity | original's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, each in {"all": found["all"], **found["kinds"]}.items():
        divergence = " | ".join(f"{each[f'kl_{name}']:.2g}" for name in ("mean", "median", "99", "max"))
        numbers = f"{divergence} | {each['top1']:.1%} | {each['perplexity']:.4g} | {each['perplexity_original']:.4g}"
        lines.append(f"| {_cell(kind)} | {each['tokens']} | {numbers} |")
    return lines


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
