"""The pictures of a report: SVG that says what the documents say."""

from __future__ import annotations

from xml.etree import ElementTree

from stages.inspection import charts

TENSORS = [
    {"name": "a.weight", "scheme": "4 bits/32 float32", "bytes": 3_000_000, "quantize": {}, "rmse": 0.1},
    {"name": "b<.weight", "scheme": "8 bits/32 float16", "bytes": 900_000, "quantize": {"bits": 8}, "rmse": 0.005},
    {"name": "norm", "scheme": "float32", "bytes": 100_000, "quantize": None, "rmse": 0.0},
]


def figures(page: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(f"<div>{page}</div>"))  # noqa: S314 - ours


def test_stored_bytes_and_errors() -> None:
    for tensor in TENSORS:
        tensor["quantize"] = tensor["quantize"] if tensor["quantize"] is None else {"bits": 4}
    page = charts.stored({"tensors": TENSORS})
    shares, errors = figures(page)
    assert "3.00 MB, 75.0%" in ElementTree.tostring(shares, encoding="unicode")
    dots = [dot for dot in errors.iter("circle") if dot.find("title") is not None]
    assert [dot.find("title").text for dot in dots] == [  # type: ignore[union-attr]
        "a.weight: 0.1, 4 bits/32 float32", "b<.weight: 0.005, 8 bits/32 float16",
    ]  # fmt: skip
    assert float(dots[0].attrib["cy"]) < float(dots[1].attrib["cy"])  # the axis begins at zero, upwards


def test_floats_have_no_errors_to_show() -> None:
    assert len(figures(charts.stored({"tensors": [TENSORS[2]]}))) == 1
    assert len(figures(charts.stored({"tensors": []}))) == 1


def test_divergence() -> None:
    one = {"kl_mean": 0.15, "top1": 0.787, "tokens": 2044}
    (picture,) = figures(charts.divergence({"quantization": {"all": one, "kinds": {"code": {**one, "kl_mean": 0.3}}}}))
    said = ElementTree.tostring(picture, encoding="unicode")
    assert "0.15; 78.7%" in said
    assert "all, 2,044 tokens" in said
    widths = [float(bar.attrib["width"]) for bar in picture.iter("rect")]
    assert widths[1] == 2 * widths[0]
    assert charts.divergence({"quantization": None}) == charts.divergence({}) == ""
    infinite = {"quantization": {"all": {**one, "kl_mean": None}, "kinds": {}}}  # null: not finite
    assert charts.divergence(infinite) == ""
