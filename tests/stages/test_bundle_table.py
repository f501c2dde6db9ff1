"""Bundles side by side: what `pipeline compare` says of each, and its picture."""

from __future__ import annotations

import pytest

from stagegraph.cli import layout
from stages.inspection import bundles, picture
from tests.support.output_schema import validate

SPEED = {"tokens": 128, "rate": 300.0, "lowest": 290.0, "highest": 330.0}


def documents(scheme: str, bits: float, kl: float | None, rate: float | None, verdict: str = "verified"):
    files = {"a": {"sha256": "", "size": 1_500_000}, "b": {"sha256": "", "size": 500_000}}
    found = {
        "bundle/bundle.json": {"name": "tiny", "target": "llvm", "model": {"scheme": scheme}, "files": files},
        "bundle/tensor-cache.json": {"metadata": {"BitsPerParam": bits}},
    }
    if kl is not None:
        figures = {"kl_mean": kl, "top1": 0.931, "perplexity": 12.345, "perplexity_original": 12.1, "tokens": 2040}
        found["verify.json"] = {"verdict": verdict, "quantization": {"all": figures}}
    if rate is not None:
        decode = {"after": 128, "tokens": 32, "rate": rate, "lowest": rate / 1.04, "highest": rate}
        found["bench.json"] = {"prefill": SPEED, "decode": decode, "machine": {"name": "a processor"}}
    return found


@pytest.fixture
def rows():
    return {
        "bundle[llvm,q4f16_1]": bundles.row(documents("q4f16_1", 4.504, 0.234, 51.4, "FAILED")),
        "bundle[llvm,q8f16_1]": bundles.row(documents("q8f16_1", 8.504, 0.0034, 36.2)),
        "bundle[llvm,q0f16]": bundles.row(documents("q0f16", 16.0, None, None)),
    }


def test_numbers_are_numbers_and_what_is_not_known_is_null(rows):
    validate(rows, "compare")
    first, _, last = rows.values()
    assert (first["bytes"], first["bits_per_parameter"], first["kl"], first["top1"]) == (2_000_000, 4.504, 0.234, 0.931)
    assert first["decode"]["rate"] == 51.4
    assert [last[key] for key in ("verdict", "kl", "top1", "perplexity", "prefill", "decode", "machine")] == [None] * 7


def test_the_table_says_what_its_numbers_are(rows):
    page = bundles.page(rows)
    assert "| bundle[llvm,q4f16_1] | 2.0 | 4.50 | 0.23 | 93.1% | 12.35 | 300 | 51.4 | NO |" in page
    assert "| bundle[llvm,q0f16] | 2.0 | 16.00 | - | - | - | - | - | - |" in page
    assert "over 2,040 tokens" in page
    assert "(original: 12.1)" in page
    assert "repeats within 10%, on a processor" in page
    assert all(len(line) <= 80 for line in layout.markdown(page, 80).splitlines())
    assert layout.markdown(page, 80).splitlines()[1].startswith("bundle[llvm,q4f16_1]  "), "a line for each"


def test_the_scheme_is_told_where_the_label_does_not(rows):
    page = bundles.page({"bundle[llvm]@1a2b3c4d": rows["bundle[llvm,q4f16_1]"]})
    assert "| bundle[llvm] @1a2b3c4d | q4f16_1 | 2.0 |" in page


def test_a_bundle_that_could_not_be_run_has_no_speed():
    found = documents("q4f16_1", 4.5, None, None)
    found["bench.json"] = {"not_run": "no NVIDIA driver is loaded"}
    found["verify.json"] = {"verdict": "NOT RUN (no NVIDIA driver is loaded)", "quantization": None}
    row = bundles.row(found)
    assert (row["decode"], row["machine"], row["kl"]) == (None, None, None)
    page = bundles.page({"bundle[cuda]": row})
    assert "| - | - |\n" in page
    assert "bundle[cuda]: NOT RUN (no NVIDIA driver is loaded)" in page


@pytest.mark.parametrize("suffix", picture.FORMATS)
def test_what_was_compared_is_drawn(rows, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"schemes{suffix}"
    bundles.draw(rows, file)
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in data
    if suffix == ".svg":
        again = tmp_path / "again.svg"
        bundles.draw(rows, again)
        assert b"51.4 tokens/s" in data
        assert b"q0f16" not in data, "there is no divergence to draw it at"
    with pytest.raises(picture.PlotError, match="no bundle was compared with the original"):
        bundles.draw({"a": bundles.row(documents("q0f16", 16.0, None, None))}, file)
