"""Saves pictures by matplotlib, if that is installed, in the format that the file's suffix names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FORMATS = (".png", ".svg")


class PlotError(ValueError):
    """The picture cannot be drawn; the message says what to do."""


def blank(path: Path, width: float, height: float) -> Any:
    """Return an empty figure of that size in inches, for a picture in ``path``."""
    if path.suffix not in FORMATS:
        raise PlotError(f"{path}: a picture is drawn as {' or '.join(FORMATS)}; use a .png or .svg name")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotError("matplotlib is not installed, which draws pictures: pip install 'stagegraph[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a figure into ``path``, without the time."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
