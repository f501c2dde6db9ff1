"""Compares bundles for ``pipeline compare``: size and memory, loss by quantization, and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.inspection import picture
from stages.inspection.charts import digits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from stages.documents.files import JsonObject

    Row = JsonObject

# Key of a row -> heading, how the number is written.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "bytes": ("MB", lambda size: f"{size / 1e6:.1f}"),
    "bits_per_parameter": ("bits", lambda bits: f"{bits:.2f}"),
    "kl": ("KL", digits),
    "top1": ("top-1", lambda share: f"{share:.1%}"),
    "perplexity": ("ppl", lambda value: f"{value:.4g}"),
    "prefill": ("prefill", lambda speed: f"{speed['rate']:.3g}"),
    "decode": ("decode", lambda speed: f"{speed['rate']:.3g}"),
}
_LEAST_KL = 1e-9  # a logarithm has no zero


def row(documents: JsonObject) -> Row:
    """Return the row of a bundle: figures of itself, of verify and of bench; None for each that is missing."""
    manifest = documents["bundle/bundle.json"]
    verified, measured = documents.get("verify.json", {}), documents.get("bench.json", {})
    figures = (verified.get("quantization") or {}).get("all", {})
    return {
        "name": manifest["name"],
        "scheme": manifest["model"]["scheme"],
        "target": manifest["target"],
        "bytes": sum(entry["size"] for entry in manifest["files"].values()),
        "bits_per_parameter": documents["bundle/tensor-cache.json"]["metadata"]["BitsPerParam"],
        "verdict": verified.get("verdict"),
        "kl": figures.get("kl_mean"),
        "top1": figures.get("top1"),
        "perplexity": figures.get("perplexity"),
        "perplexity_original": figures.get("perplexity_original"),
        "probe_tokens": figures.get("tokens"),
        "prefill": measured.get("prefill"),
        "decode": measured.get("decode"),
        "machine": measured["machine"]["name"] if "machine" in measured else None,
    }


def page(rows: Mapping[str, Row]) -> str:
    """Return a table in Markdown with a legend."""
    # Schemes that the labels name need no column of their own.
    scheme_in_labels = all(found["scheme"] in label for label, found in rows.items())
    headings = ["", *([] if scheme_in_labels else ["scheme"]), *(heading for heading, _ in _COLUMNS.values()), "ok"]
    lines = [_line(headings), _line(["---"] * (len(headings) - len(_COLUMNS) - 1) + ["---:"] * len(_COLUMNS) + ["---"])]
    for label, found in rows.items():
        numbers = ["-" if found[key] is None else text(found[key]) for key, (_, text) in _COLUMNS.items()]
        name = label.replace("@", " @")  # where it may be broken
        lines.append(_line([name, *([] if scheme_in_labels else [found["scheme"]]), *numbers, _ok(found["verdict"])]))
    return "\n".join([*lines, "", *_notes(rows)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ok(verdict: str | None) -> str:
    return {"verified": "yes", "text verified": "yes", "FAILED": "NO"}.get(str(verdict), "-")


def _notes(rows: Mapping[str, Row]) -> Iterable[str]:
    """Yield what the columns say, of what machine the speeds are, and what was not run."""
    compared = [found for found in rows.values() if found["kl"] is not None]
    if compared:
        tokens = " or ".join(sorted({f"{found['probe_tokens']:,}" for found in compared}))
        originals = " or ".join(sorted({f"{found['perplexity_original']:.4g}" for found in compared}))
        yield f"KL: mean divergence from the original in nats, over {tokens} tokens"
        yield f"top-1: positions with the original's top token; ppl: perplexity (original: {originals})"
    timed = [found for found in rows.values() if found["decode"]]
    if timed:
        machines = ", ".join(sorted({found["machine"] for found in timed}))
        yield f"prefill, decode: tokens a second, repeats within {max(map(_spread, timed)):.0%}, on {machines}"
    yield "ok: what verify has said, where it ran the bundle"
    for label, found in rows.items():
        if found["verdict"] is not None and _ok(found["verdict"]) == "-":
            yield f"{label}: {found['verdict']}"


def _spread(found: Row) -> float:
    """Return how far the repeats of a speed were from their median, at most."""
    speeds = (found["prefill"], found["decode"])
    return float(max(max(each["highest"] / each["rate"], each["rate"] / each["lowest"]) - 1 for each in speeds))


def draw(rows: Mapping[str, Row], path: Path) -> None:
    """Draw bits per parameter against KL divergence into ``path``; the area of a point is the decoding speed.

    What was not measured against the original is left out; a bundle without a speed is a small cross.
    """
    figure = picture.blank(path, 8, 5)
    shown = {label: found for label, found in rows.items() if found["kl"] is not None}
    if not shown:
        raise picture.PlotError("nothing to draw: no bundle was compared with the original; run verify of them first")
    axes = figure.subplots()
    fastest = max((found["decode"]["rate"] for found in shown.values() if found["decode"]), default=1.0)
    for label, found in shown.items():
        place = found["bits_per_parameter"], max(found["kl"], _LEAST_KL)
        if speed := found["decode"]:
            area, marker, legend = 600 * speed["rate"] / fastest, "o", f"{label}: {speed['rate']:.3g} tokens/s"
        else:
            area, marker, legend = 40, "x", label
        axes.scatter(*place, s=area, marker=marker, alpha=0.7, label=legend)
        above = (0, 4 + area**0.5 / 2)
        axes.annotate(found["scheme"], place, above, textcoords="offset points", ha="center", fontsize="small")
    for handle in figure.legend(loc="outside lower center", fontsize="small").legend_handles:
        handle.set_sizes([40])
    axes.set(xlabel="bits per parameter", ylabel="KL divergence from the original, nats per token", yscale="log")
    axes.set_title("what a bundle takes and what it costs; area: decoding speed")
    axes.margins(0.2)
    axes.grid(visible=True, alpha=0.3)
    picture.save(figure, path)
