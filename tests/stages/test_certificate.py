"""The certificate that travels with a bundle: what it says, what any machine finds with it, and tampering."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file

from stages.cli import attest, verify
from stages.runtime import certificate, golden, manifest, seal, selftest, serving
from stages.runtime.errors import BundleError
from stages.verification.bom import bill
from stages.verification.certificate import licence
from stages.verification.origin import hub_origin
from stages.verify import Verify
from tests.engine.test_damage import flipped
from tests.support import bundles
from tests.support.output_schema import validate

ROOT = Path(__file__).parents[2]
COMMIT = "7ae557604adf67be50417f59c2c2f167def9a775"
READINGS = [
    "prefill, then decode",
    "every token scored",
    "prefill in chunks",
    "tokens taken back",
    "two sequences at once",
]


@pytest.fixture
def bundle(certified, tmp_path):
    return shutil.copytree(certified[0], tmp_path / "bundle")


def run(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    command = selftest.run if module is verify else lambda args, *streams: serving.guarded(attest._run, args, *streams)
    code = command(parser.parse_args([str(argument) for argument in arguments]), out, err)
    return code, out.getvalue(), err.getvalue()


def rewritten(path, change):
    """Let ``change`` alter a sealed document, and seal it again: what only the one who wrote it should."""
    document = json.loads(path.read_bytes())
    change(document)
    path.write_bytes(seal.fixed(document))


# What it says


def test_what_a_certificate_says_is_what_was_verified_byte_for_byte(certified, recorded, tmp_path):
    folder, context = certified
    path = folder / "certificate.json"
    document = json.loads(path.read_text())
    assert document["verdict"] == "verified"
    assert document["verification"] == json.loads((context.out / "verify.json").read_text())
    assert document["bundle"]["sha256"] == manifest.read(folder).sha256
    digests = bundles.source_files(recorded.checkpoint, bundles.INCLUDE).digests
    assert document["checkpoint"]["files"] == digests
    together = json.dumps(digests, sort_keys=True, separators=(",", ":")).encode()
    assert document["checkpoint"]["blake3"] == blake3(together).hexdigest(), "of the tokenizer's files too"
    assert [row["after"] for row in document["golden"]["rows"]] == [20, 21, 31, 32, *range(63, 128)]
    assert all(row["logits"] == sorted(row["logits"], reverse=True) for row in document["golden"]["rows"])
    assert "recorded by" in document["golden"]["origin"]
    assert path.stat().st_size < 200_000
    assert str(recorded.folder) not in path.read_text()
    assert "reservation" not in context.facts
    again = bundles.verify(recorded, tmp_path / "again", reference="recorded")
    for name in ("certificate.json", "bom.cdx.json"):
        assert (again.out / name).read_bytes() == (context.out / name).read_bytes()


def test_golden_logits_are_the_references(certified, recorded):
    document = json.loads((certified[0] / "certificate.json").read_text())
    wanted = load_file(recorded.checkpoint / "reference" / "reference.safetensors")["logits"]
    for row in document["golden"]["rows"]:
        of_reference = wanted[row["after"]]
        assert np.array_equal(np.float32(row["logits"]), of_reference[row["ids"]])
        assert np.array_equal(np.sort(of_reference)[::-1][: golden.TOP], np.float32(row["logits"]))
        assert np.float32(row["largest"]) == np.abs(of_reference).max()


def test_a_bill_of_materials_says_what_the_certificate_does(certified, recorded):
    """Held against CycloneDX's own schema when it was written, which is a quarter of a megabyte and not kept here."""
    found = json.loads((certified[1].out / "bom.cdx.json").read_text())
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    model, bundle = found["metadata"]["component"], manifest.read(certified[0])
    assert model["hashes"] == [{"alg": "SHA-256", "content": bundle.sha256}]
    files = {each["name"]: each["hashes"][0]["content"] for each in found["components"] if each["type"] == "file"}
    assert files == {name: entry.sha256 for name, entry in bundle.files.items()}
    assert {each["ref"] for each in found["dependencies"]} == {model["bom-ref"]}
    document = json.loads((certified[0] / "certificate.json").read_text())
    assert document["made"]["libraries"] == {"numpy": "1 ab", "torch": "2 cd"}
    assert found["metadata"]["tools"]["components"] == [
        {"type": "application", "name": "torch", "version": "2"},
        {"type": "library", "name": "numpy", "version": "1 ab"},
    ]
    (checkpoint,) = model["pedigree"]["ancestors"]
    assert checkpoint["hashes"] == [{"alg": "BLAKE3", "content": document["checkpoint"]["blake3"]}]
    document["checkpoint"] |= {"licence": {"license": "other", "license_name": "qwen"}, "source": f"ORG/NAME@{COMMIT}"}
    (told,) = bill(document, document["verification"], bundle)["metadata"]["component"]["pedigree"]["ancestors"]
    assert told["licenses"] == [{"license": {"name": "qwen"}}]
    assert (told["name"], told["version"], told["purl"]) == ("ORG/NAME", COMMIT, f"pkg:huggingface/ORG/NAME@{COMMIT}")


def test_what_nobody_else_says_is_certified_with_a_reservation(recorded, tmp_path):
    context = bundles.verify(recorded, tmp_path, reference="none")
    assert context.facts["reservation"] == "runs, not checked against a reference"
    document = json.loads((tmp_path / "certificate.json").read_text())
    assert document["golden"]["origin"] == "the bundle itself, on the machine that verified it"


@pytest.mark.parametrize("reference", ["live", "recorded"])
def test_what_cannot_run_here_is_certified_for_a_machine_that_can(recorded, tmp_path, monkeypatch, reference):
    """A library for the processor stands for one that this machine has no device for."""
    monkeypatch.setattr("stages.runtime.host.has_nvidia_driver", lambda: False)
    built = recorded.copy(tmp_path)
    built.edit(lambda document: document.update(target="cuda"))
    context = bundles.verify(built, tmp_path / "out", target="cuda", device="auto", reference=reference)
    assert context.facts["reservation"] == "NOT RUN (no NVIDIA driver is loaded)"
    path = Path(shutil.copy(tmp_path / "out" / "certificate.json", recorded.bundle.parent / f"{reference}.json"))
    sha256 = manifest.read(recorded.bundle).sha256
    rewritten(path, lambda document: document["bundle"].update(sha256=sha256))
    code, out, _ = run(verify, recorded.bundle, "--certificate", path)
    assert (code, out.count(" of the largest logit")) == (0, len(READINGS))
    assert "certified: NOT RUN" in out


def test_a_reference_that_fails_leaves_no_vectors_and_says_so(recorded, tmp_path, monkeypatch):
    (tmp_path / "transformers.py").write_text("raise SystemExit('no transformers today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("stages.runtime.host.has_nvidia_driver", lambda: False)
    built = recorded.copy(tmp_path)
    built.edit(lambda document: document.update(target="cuda"))
    bundles.verify(built, tmp_path / "out", target="cuda", device="auto", reference="live")
    document = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert document["golden"] is None
    assert any("no transformers today" in text for text in document["verification"]["unchecked"])


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"README.md": "---\nlicense: apache-2.0\ntags: [a]\n---\n# license: no\n"}, {"license": "apache-2.0"}),
        ({"README.md": "---\r\nlicense: 'mit'\r\n---\r\n", "LICENSE": ""}, {"license": "mit", "file": "LICENSE"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen\n---\n", "LICENSE.txt": "", "COPYING": ""},
            {"license": "other", "license_name": "qwen", "file": "COPYING"},
        ),
        ({"README.md": "license: mit\n"}, {}),
        ({}, {}),
    ],
)
def test_a_licence_is_what_the_folder_says(tmp_path, files, wanted):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert licence({name: tmp_path / name for name in files}) == wanted


def test_an_origin_is_what_the_folder_says(tmp_path):
    snapshot = tmp_path / "models--ORG--a-model--b" / "snapshots" / COMMIT
    downloaded = tmp_path / "here" / ".cache" / "huggingface" / "download"
    for folder in (snapshot, downloaded, tmp_path / "plain" / COMMIT):
        folder.mkdir(parents=True)
    (downloaded / "config.json.metadata").write_text(f"{COMMIT}\nan etag\n1700000000.0\n")
    assert hub_origin(snapshot) == f"ORG/a-model--b@{COMMIT}"
    (snapshot / "model.gguf").write_bytes(b"GGUF")
    assert hub_origin(snapshot / "model.gguf") == f"ORG/a-model--b@{COMMIT}"
    assert hub_origin(tmp_path / "here") == f"@{COMMIT}"
    assert hub_origin(tmp_path / "plain" / COMMIT) == ""
    resolved = Verify().resolve(Verify.Params(checkpoint=str(snapshot), target="llvm"))
    assert resolved.origin == f"ORG/a-model--b@{COMMIT}"  # by value in the key, as no path is


# Held against it


def test_a_bundle_passes_its_certificate_where_only_the_runtime_is(bundle, tmp_path):
    sources = shutil.ignore_patterns("__pycache__")  # which come and go beside other tests
    shutil.copytree(ROOT / "stages" / "runtime", tmp_path / "stages" / "runtime", ignore=sources)
    absent = "torch", "transformers", "stagegraph", "jinja2", "blake3", "stages.verification"
    code = (
        f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}));"
        "sys.argv = ['runtime', 'selftest', 'bundle', '--json', '--output', 'result.json'];"
        "runpy.run_module('stages.runtime', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    validate(result, "verify")
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert (result["result"], result["device"]["kind"]) == ("pass", "cpu")
    assert [check["name"] for check in result["checks"]] == ["bundle.json", "files", "tokenizer", "chat", *READINGS]
    assert all(check["measured"] < 2e-5 for check in result["checks"][4:])  # the bound is 1e-3


def test_a_logit_that_is_off_fails_with_its_number(bundle, certified):
    def moved(document):
        row = next(row for row in document["golden"]["rows"] if row["after"] == 31)  # read in a batch alone
        row["logits"][3] += 3e-3 * row["largest"]

    rewritten(bundle / "certificate.json", moved)
    code, out, err = run(verify, bundle)
    assert (code, err) == (1, "")
    assert [line.split()[-1] for line in out.splitlines() if "FAIL" in line and "two sequences" in line] == ["1.0e-03"]
    assert out.count("FAIL") == 2
    assert "FAIL on " in out.splitlines()[-1]
    assert run(verify, bundle, "--certificate", certified[0] / "certificate.json")[0] == 0


@pytest.mark.parametrize(("kept", "word"), [("texts", 'for "Hello, world!'), ("conversation", "for a conversation")])
def test_a_tokenizer_that_gives_other_ids_fails(bundle, kept, word):
    def changed(document):
        tokenizer = document["tokenizer"]
        (tokenizer["texts"][0]["ids"] if kept == "texts" else tokenizer["conversation"])[-1] += 1

    rewritten(bundle / "certificate.json", changed)
    code, out, _ = run(verify, bundle)
    assert (code, out.count("FAIL"), f"other ids than were certified {word}" in out) == (1, 2, True)


def test_a_token_that_should_not_be_among_the_first_fails():
    row = {"ids": [4, 2], "logits": [3.0, 2.0], "largest": 4.0}
    found = np.float32([0, 1, 2, -4, 3])
    assert golden.difference(found, row) == 0
    assert golden.difference(found + np.float32([0, 1.5, 0, 0, 0]), row) == pytest.approx(0.5 / 4)
    assert golden.difference(found + np.float32([0, 0, -1, 0, 0]), row) == pytest.approx(1 / 4)
    assert golden.difference(found * np.float32([1, 1, 1, np.nan, 1]), row) == np.inf
    assert golden.difference(np.zeros(5), {"ids": [0], "logits": [0.0], "largest": 0.0}) == 0


def test_without_a_certificate_or_vectors_there_is_no_result(bundle):
    rewritten(bundle / "certificate.json", lambda document: document.update(golden=None))
    code, out, err = run(verify, bundle)
    assert (code, out, "holds no golden vectors" in err) == (2, "", True)
    (bundle / "certificate.json").unlink()
    code, out, err = run(verify, bundle)
    assert (code, out, "`pipeline export` of a verified bundle writes it" in err) == (2, "", True)


def test_a_machine_that_does_not_fit_gives_no_result(bundle, monkeypatch):
    monkeypatch.setattr(manifest, "machine_problems", lambda _: ["the processor lacks avx9"])
    assert run(verify, bundle) == (2, "", "error: the processor lacks avx9\n")


# Tampering


def test_any_bit_of_any_file_may_flip_and_is_found(bundle, monkeypatch):
    monkeypatch.setattr(golden, "check", lambda *_: pytest.fail("what is not the bundle was loaded"))
    for path in sorted(bundle.iterdir()):
        content, rng = path.read_bytes(), Random(path.name)  # noqa: S311
        size = 8 * len(content)
        for bit in [0, size - 1, *(rng.randrange(size) for _ in range(20))]:
            path.write_bytes(flipped(content, bit))
            code, out, err = run(verify, bundle)
            assert (code, "FAIL" in out) == (1, True) or (code, err[:7]) == (2, "error: "), (path.name, bit, out)
        path.write_bytes(content)
    monkeypatch.undo()
    assert run(verify, bundle)[0] == 0


def test_every_byte_of_a_certificate_counts(bundle):
    """White space and the spelling of a number too: what a reader of JSON would not see."""
    path = bundle / "certificate.json"
    content = path.read_bytes()
    rng = Random(7)  # noqa: S311
    for _ in range(300):
        path.write_bytes(flipped(content, rng.randrange(8 * len(content))))
        with pytest.raises(BundleError):
            certificate.read(path)
    for other in (content + b"\n", content.replace(b'": ', b'":  ', 1), json.dumps(json.loads(content)).encode()):
        path.write_bytes(other)
        with pytest.raises(BundleError, match="not as it was written"):
            certificate.read(path)


def test_a_certificate_of_another_bundle_fails(bundle, quantized, tmp_path):
    bundles.verify(quantized, tmp_path / "other", reference="none")
    shutil.copy(tmp_path / "other" / "certificate.json", bundle)
    code, out, _ = run(verify, bundle)
    assert (code, "another bundle, or changed" in out) == (1, True)
    assert "prefill" not in out


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("bundle"),
        lambda document: document.update(format="stagegraph-certificate-2"),
        lambda document: document.update(golden=[]),
        lambda document: document["tokenizer"].update(conversation="1"),
        lambda document: document["tokenizer"].pop("texts"),
        lambda document: document["golden"].update(tokens=["1"]),
        lambda document: document["golden"].update(prompt=0),
        lambda document: document["golden"].update(bound="1"),
        lambda document: document["golden"]["rows"][0].update(after=999),
        lambda document: document["golden"]["rows"][0].update(logits=[10**400] * 16),
        lambda document: document["golden"]["rows"][0].update(ids=[1]),
        lambda document: document["golden"]["rows"][0].update(ids=[512] * 16),
        lambda document: document["golden"]["rows"][0].update(ids=[-1] * 16),
        lambda document: document["golden"]["rows"].pop(0),
        lambda document: document["golden"].update(tokens=[512] * 128),
        lambda document: document["golden"].update(tokens=[1] * 5000, prompt=4000),
    ],
)
def test_a_strange_certificate_is_a_message(bundle, change):
    rewritten(bundle / "certificate.json", change)
    code, out, err = run(verify, bundle)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


# What other machines say


@pytest.fixture(scope="session")
def result(certified, tmp_path_factory):
    path = tmp_path_factory.mktemp("result") / "result.json"
    assert run(verify, certified[0], "--output", path)[0] == 0
    return path


def elsewhere(path, **device):
    """Write the result as one of another device."""
    rewritten(path, lambda document: document["device"].update(device))
    return path


def test_a_result_of_another_machine_is_kept_and_shown(bundle, result, tmp_path):
    path = elsewhere(Path(shutil.copy(result, tmp_path)), name="another | processor")
    code, card, err = run(attest, bundle, path)
    assert (code, err) == (0, "")
    assert card == (bundle / "attestations" / "card.md").read_text()
    assert "# tiny (q0f32, llvm): verified" in card
    row = card.splitlines()[-1].split(" | ")
    assert (row[0], row[1], row[3]) == ("| another / processor", "pass", "1.0e-03 |")
    assert run(attest, bundle, path)[1] == card  # the same once more is no other
    assert len(run(attest, bundle, result)[1].splitlines()) == len(card.splitlines()) + 1
    assert "attested: pass on another | processor" in run(verify, bundle)[1]


def test_a_result_of_another_bundle_or_certificate_or_device_is_refused(bundle, result, tmp_path):
    for change, word in (
        (lambda document: document.update(bundle="0" * 64), "of another bundle"),
        (lambda document: document.update(certificate="0" * 64), "of another certificate"),
        (lambda document: document["device"].update(kind="cuda"), "run on cuda, and the bundle is for cpu"),
        (lambda document: document.update(result="FAIL"), "its result is not that of its checks"),
        (lambda document: document["checks"].clear(), "its result is not that of its checks"),
    ):
        path = Path(shutil.copy(result, tmp_path))
        rewritten(path, change)
        code, out, err = run(attest, bundle, path)
        assert (code, out, word in err) == (2, "", True), err
    content, rng = result.read_bytes(), Random(1)  # noqa: S311
    for _ in range(100):
        path.write_bytes(flipped(content, rng.randrange(8 * len(content))))
        assert run(attest, bundle, path)[0] == 2
    assert not (bundle / "attestations").exists()


def test_what_is_kept_and_damaged_later_is_named(bundle, result):
    run(attest, bundle, result)
    (kept,) = (bundle / certificate.ATTESTATIONS).glob("*.json")
    kept.write_bytes(flipped(kept.read_bytes(), 999))
    code, out, err = run(verify, bundle)
    assert (code, out, kept.name in err) == (2, "", True)
