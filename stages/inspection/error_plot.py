"""Plots the quantization error of every parameter by layer and kind, and the distribution of errors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stages.inspection import picture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.documents.weights import ErrorLine, ErrorReport

LAYER = re.compile(r"\.(\d+)\.")


def draw(report: ErrorReport, path: Path) -> None:
    """Draw a report of quantize into ``path``, whose suffix is .png or .svg."""
    figure = picture.blank(path, 11, 4.5)
    lines = [line for line in report["tensors"] if line["rmse"] > 0]
    if not lines:
        raise picture.PlotError(f"nothing to draw: {report['scheme']} stores every parameter without error")
    by_layer, spread = figure.subplots(1, 2)
    for kind, found in sorted(_by_kind(lines).items()):
        by_layer.plot(*zip(*found, strict=True), "o", markersize=4, label=kind)
    by_layer.set(xlabel="layer (-1: none)", ylabel="relative RMSE", yscale="log", title="error by layer and kind")
    by_layer.legend(fontsize="small")
    spread.hist([line["rmse"] for line in lines], bins=30)
    spread.set(xlabel="relative RMSE", ylabel="parameters", title=f"{report['scheme']}, scales {report['scales']}")
    picture.save(figure, path)


def _by_kind(lines: Sequence[ErrorLine]) -> dict[str, list[tuple[int, float]]]:
    """Return what a parameter is called without its layer -> its (layer, error) in each."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        layer = LAYER.search(line["name"])
        kind = ".".join(line["name"].removesuffix(".weight").split(".")[-2:]) if layer else line["kind"]
        found.setdefault(kind, []).append((int(layer[1]) if layer else -1, line["rmse"]))
    return found
