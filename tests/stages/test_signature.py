"""model.sig: a bundle signed by a key, what the loader asks for, and tampering with any byte."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
from random import Random

import pytest

from stages.cli import sign
from stages.runtime import certificate, command, manifest, selftest, serving, signature
from stages.runtime.errors import BundleError
from tests.engine.test_damage import flipped

FLIPS = 25  # of the signature, whose bytes the library does not all read


@pytest.fixture(scope="session")
def keys(tmp_path_factory):
    """A key pair and one of somebody else: private and public key of each."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    from cryptography.hazmat.primitives import serialization as form

    pytest.importorskip("model_signing")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


@pytest.fixture(scope="session")
def signed(certified, keys, tmp_path_factory):
    folder = shutil.copytree(certified[0], tmp_path_factory.mktemp("signed") / "bundle")
    code, out, err = run(sign, folder, "--key", keys / "ours.pem")
    assert (code, err) == (0, "")
    assert "(verified): model.sig, key SHA-256 " in out
    return folder


@pytest.fixture
def bundle(signed, tmp_path):
    return shutil.copytree(signed, tmp_path / "another name")


def run(module, *arguments):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    code = serving.guarded(module._run, parser.parse_args([str(each) for each in arguments]), out, err)
    return code, out.getvalue(), err.getvalue()


def test_what_is_signed_loads_where_a_signature_is_required(bundle, keys):
    read = manifest.read(bundle, require_signature=keys / "ours.pub")
    assert read == manifest.read(bundle)
    assert signature.check(bundle, read.sha256, keys / "ours.pub") == signature.signer(bundle)
    (bundle / certificate.ATTESTATIONS).mkdir()
    (bundle / certificate.ATTESTATIONS / "card.md").write_text("what came later")
    manifest.read(bundle, require_signature=keys / "ours.pub")


def test_a_key_with_a_password_is_opened_by_a_file_or_at_a_terminal(bundle, keys, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key((keys / "ours.pem").read_bytes(), None)
    locked, words = tmp_path / "locked.pem", tmp_path / "words"
    hidden = form.BestAvailableEncryption("gr\u00fcn und blau".encode())
    locked.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, hidden))
    words.write_text("gr\u00fcn und blau\nwhat is below does not count\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    code, _, err = run(sign, bundle, "--key", locked)
    assert (code, "the key has a password; give --password-file FILE" in err) == (2, True)
    code, out, err = run(sign, bundle, "--key", locked, "--password-file", words)
    assert (code, err) == (0, ""), out
    manifest.read(bundle, require_signature=keys / "ours.pub")
    words.write_text("green")
    code, _, err = run(sign, bundle, "--key", locked, "--password-file", words)
    assert (code, "cannot be signed with" in err, "green" in err) == (2, True, False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr(sign, "getpass", lambda prompt: "gr\u00fcn und blau" if str(locked) in prompt else "")
    assert run(sign, bundle, "--key", locked)[0] == 0
    assert run(sign, bundle, "--key", keys / "ours.pem", "--password-file", words)[0] == 0


def test_others_check_it_with_the_librarys_own_command(signed, keys):
    command_ = [sys.executable, "-m", "model_signing", "verify", "key", str(signed), "--signature"]
    done = [*command_, str(signed / signature.FILE), "--public_key", str(keys / "ours.pub")]
    subprocess.run(done, check=True, capture_output=True)


def test_verify_says_by_whom_it_is_signed(bundle, certified, keys):
    by = f"  signed by the key of SHA-256 {signature.signer(bundle)}, "
    code, out, _ = run(selftest, bundle)
    assert (code, out.splitlines()[1].startswith(f"{by}not checked")) == (0, True)
    code, out, _ = run(selftest, bundle, "--require-signature", keys / "ours.pub")
    assert (code, out.splitlines()[1].startswith(f"{by}checked with ")) == (0, True)
    assert "\n  not signed\n" in run(selftest, certified[0])[1]


def test_a_bundle_of_nobody_or_of_another_is_refused(bundle, certified, keys):
    for folder, key, message in (
        (bundle, "theirs", "not a signature of this bundle by"),
        (certified[0], "ours", "the bundle is not signed, and a signature is required"),
    ):
        with pytest.raises(BundleError, match=message):
            manifest.read(folder, require_signature=keys / f"{key}.pub")
    code, _, err = run(command, bundle, "--prompt", "It was", "--require-signature", keys / "theirs.pub")
    assert (code, "not a signature of this bundle by" in err) == (2, True)
    code, _, err = run(selftest, bundle, "--require-signature", keys / "none.pub")
    assert (code, "No such file" in err) == (2, True)


def test_any_byte_of_the_folder_counts(bundle, keys):
    random = Random(5)  # noqa: S311 - the same bytes on every run
    for path in [path for path in sorted(bundle.iterdir()) if path.is_file()]:
        data = path.read_bytes()
        some = (
            random.sample(range(len(data)), min(FLIPS, len(data))) if path.name == signature.FILE else [len(data) // 2]
        )
        for at in [0, *some, len(data) - 1]:
            path.write_bytes(flipped(data, at))
            with pytest.raises(BundleError):
                manifest.read(bundle, require_signature=keys / "ours.pub")
        path.write_bytes(data[:-1])
        with pytest.raises(BundleError):
            manifest.read(bundle, require_signature=keys / "ours.pub")
        path.write_bytes(data)
    (bundle / "more.txt").write_text("")
    with pytest.raises(BundleError, match=r"Extra files.*more\.txt"):
        manifest.read(bundle, require_signature=keys / "ours.pub")


def test_what_the_library_would_pass_over_is_refused(bundle, keys):
    path = bundle / signature.FILE
    text = path.read_text()
    hint = json.loads(text)["verificationMaterial"]["publicKey"]["hint"]
    sig = json.loads(text)["dsseEnvelope"]["signatures"][0]["sig"]
    changes = [
        (text + "\n", "another layout"),
        (text.replace(f'"hint":"{hint}"', f'"hinu":"{hint}"'), "another member"),
        (text.replace('"tlogEntries":[]', '"tlogEntries":[],"more":1'), "one more member"),
        (text.replace('"sig":"', '"sig":" '), "a space in base64"),
        (text.replace(sig, sig[:-4] + "A" + sig[-3:]), "another signature"),
    ]
    for changed, why in changes:
        assert changed != text, why
        path.write_text(changed)
        with pytest.raises(BundleError, match=r"damaged or changed|not a signature of this bundle"):
            manifest.read(bundle, require_signature=keys / "ours.pub")


def test_the_signer_cannot_leave_files_out(bundle, keys, monkeypatch):
    monkeypatch.setattr(signature, "UNSIGNED", (*signature.UNSIGNED, "README.md"))
    signature.sign(bundle, keys / "ours.pem")
    monkeypatch.undo()
    with pytest.raises(BundleError, match=r"leaves out README\.md"):
        manifest.read(bundle, require_signature=keys / "ours.pub")


def test_what_is_damaged_is_not_signed(bundle, certified, keys, tmp_path):
    (bundle / "README.md").write_text("another")
    assert run(sign, bundle, "--key", keys / "ours.pem")[0] == 2
    folder = shutil.copytree(certified[0], tmp_path / "bundle")
    code, _, err = run(sign, folder, "--key", keys / "ours.pub")
    assert (code, "cannot be signed with" in err, (folder / signature.FILE).exists()) == (2, True, False)
    (folder / certificate.FILE).unlink()
    assert "has no certificate" in run(sign, folder, "--key", keys / "ours.pem")[2]


def test_without_the_library_it_is_said_what_to_install(bundle, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    with pytest.raises(BundleError, match=r"pip install 'model-signing"):
        manifest.read(bundle, require_signature=keys / "ours.pub")
    manifest.read(bundle)
