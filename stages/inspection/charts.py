"""Draws self-contained SVG charts for ``pipeline report``: bits and errors of tensors, divergence by text."""

from __future__ import annotations

import html
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.documents.verification import Verification
    from stages.documents.weights import ErrorLine, ErrorReport

WIDTH, ROW, LETTER, VALUE = 720, 20, 7.2, 140  # pixels: of all, of a bar's row, of a letter, right of the bars
HEIGHT, MARGIN = 200, 56  # pixels: of the plot of errors, and around it
COLOURS = ("#3f6fb5", "#c2703d", "#4f9a6b", "#8a63a8", "#a8894d", "#5b8a93")
LETTERS = 44  # of a label, at most

Bar = tuple[str, float, str]  # label, value, what is written after it


def digits(value: float) -> str:
    """Return a number with two digits, zeros too, so that those below one another are as exact: ``0.020``."""
    return f"{value:#.2g}".removesuffix(".")


def stored(document: ErrorReport) -> str:
    """Return how the bytes of a quantize report share out over forms of storage, and the error of every tensor."""
    sizes: Counter[str] = Counter()
    for tensor in document["tensors"]:
        sizes[tensor["scheme"]] += tensor["bytes"]
    total = sum(sizes.values()) or 1
    bars = [
        (form, float(size), f"{size / 1e6:,.2f} MB, {size / total:.1%}")
        for form, size in sorted(sizes.items(), key=lambda each: -each[1])
    ]
    return _bars("how the weights are stored", bars) + _errors(document["tensors"])


def divergence(document: Verification) -> str:
    """Return the KL divergence from the original by kind of text; empty where none was measured."""
    found = document.get("quantization")  # results of earlier versions have none
    kinds = {"all": found["all"], **found["kinds"]} if found else {}
    bars = [
        (f"{kind}, {each['tokens']:,} tokens", kl, f"{digits(kl)}; {each['top1']:.1%}")
        for kind, each in kinds.items()
        if (kl := each["kl_mean"]) is not None
    ]
    title = "mean KL divergence from the original, in nats; top-1 agreement"
    return _bars(title, bars) if bars else ""


def _bars(title: str, bars: Sequence[Bar]) -> str:
    most = max((value for _, value, _ in bars), default=0) or 1
    left = 14 + LETTER * min(LETTERS, max((len(label) for label, _, _ in bars), default=0))
    room = WIDTH - left - VALUE
    lines = [_open(title, ROW * len(bars) + 4)]
    for i, (label, value, text) in enumerate(bars):
        width, top = room * value / most, ROW * i + 2
        lines.append(_text(left - 8, top + 14, label[:LETTERS], anchor="end"))
        lines.append(f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 5}" fill="{COLOURS[0]}"/>')
        lines.append(_text(left + width + 6, top + 14, text))
    return "".join([*lines, "</svg></figure>"])


def _errors(tensors: Sequence[ErrorLine]) -> str:
    """Return a dot for each quantized tensor, in the order of the model; the axis begins at zero."""
    shown = [tensor for tensor in tensors if tensor["quantize"]]
    if not shown:
        return ""
    forms = list(dict.fromkeys(tensor["scheme"] for tensor in shown))
    most = max(tensor["rmse"] for tensor in shown) or 1.0
    right, bottom = WIDTH - 10, HEIGHT - 24
    lines = [
        _open("relative error (RMS) of each quantized tensor, in the order of the model", HEIGHT + ROW * len(forms))
    ]
    for part in (0.0, 0.5, 1.0):
        y = bottom - part * (bottom - 10)
        lines.append(f'<path d="M{MARGIN} {y:.1f}H{right}" stroke="currentColor" opacity=".2"/>')
        lines.append(_text(MARGIN - 6, y + 4, f"{part * most:.3g}", anchor="end"))
    for i, tensor in enumerate(shown):
        x = MARGIN + (right - MARGIN) * (i + 0.5) / len(shown)
        y = bottom - tensor["rmse"] / most * (bottom - 10)
        tip = html.escape(f"{tensor['name']}: {tensor['rmse']:.3g}, {tensor['scheme']}")
        colour = COLOURS[forms.index(tensor["scheme"]) % len(COLOURS)]
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{tip}</title></circle>')
    for i, form in enumerate(forms):
        y = HEIGHT + ROW * i
        lines.append(f'<circle cx="{MARGIN}" cy="{y}" r="4" fill="{COLOURS[i % len(COLOURS)]}"/>')
        lines.append(_text(MARGIN + 10, y + 4, form))
    return "".join([*lines, "</svg></figure>"])


def _open(title: str, height: float) -> str:
    text = html.escape(title)
    return (
        f'<figure><figcaption>{text}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'font-size="12"><title>{text}</title>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{html.escape(text)}</text>'
