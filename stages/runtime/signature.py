"""model.sig: the signature of a bundle's whole folder by somebody's key, as OpenSSF model signing makes and checks it.

It is a Sigstore bundle (v0.3, DSSE) whose in-toto statement has the SHA-256 of every file, signed with ECDSA. The
library model-signing does both; it is needed where a signature is made or asked for, and nowhere else. What it would
pass over (another layout of the same JSON, members it does not know, spare bits of base64) is refused here, so that no
byte of the file can be another.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.certificate import ATTESTATIONS
from stages.runtime.errors import BundleError, RequestError
from stages.runtime.folder import MANIFEST

if TYPE_CHECKING:
    from stages.runtime.documents import JsonObject

FILE = "model.sig"
UNSIGNED = (ATTESTATIONS, FILE)  # what is written after a folder was signed
_PACKAGES = "pip install 'model-signing>=1.1,<2' pyopenssl"
_SIZE = 16 << 20  # bytes; a line for each file of a folder
_FORM = {  # members of the file, by where they are
    "": {"mediaType", "verificationMaterial", "dsseEnvelope"},
    "verificationMaterial": {"publicKey", "tlogEntries"},
    "verificationMaterial.publicKey": {"hint"},
    "dsseEnvelope": {"payload", "payloadType", "signatures"},
}


def sign(root: Path, key: Path, password: str | None = None) -> str | None:
    """Sign the folder ``root`` with the private key in ``key`` (PEM, ECDSA); return the SHA-256 of the public one.

    ``password`` opens a key that is encrypted.
    """
    library = _library("model_signing.signing")
    path = root / FILE
    try:
        opened_by = None if password is None else password.encode()  # bytes, whatever the library's types say
        config = library.Config().use_elliptic_key_signer(private_key=key, password=opened_by)
        hashing = _library("model_signing.hashing").Config().set_ignored_paths(paths=UNSIGNED, ignore_git_paths=False)
        path.unlink(missing_ok=True)
        config.set_hashing_config(hashing).sign(root.resolve(), path)
    except Exception as error:  # noqa: BLE001 - of several libraries
        raise RequestError(f"{key}: cannot be signed with: {_reason(error)}; it must be an EC key in PEM") from None
    return signer(root)


def signer(root: Path) -> str | None:
    """Return the SHA-256 of the public key that a folder says it is signed by, None if by none; nothing is checked."""
    path = root / FILE
    return str(_read(path)[1]["verificationMaterial"]["publicKey"]["hint"]) if path.exists() else None


def check(root: Path, sha256: str, key: Path) -> str:
    """Return the SHA-256 of the public key in ``key`` if the folder ``root`` is signed by it, else BundleError.

    Every file is read, and must be what was signed; so must ``sha256``, that of the bundle.json which was read.
    """
    path = root / FILE
    if not path.exists():
        raise BundleError(f"{path}: the bundle is not signed, and a signature is required: `pipeline sign` makes one")
    library = _library("model_signing.verifying")
    data, document = _read(path)
    printed = io.StringIO()
    with tempfile.NamedTemporaryFile(suffix=".sig") as file, contextlib.redirect_stdout(printed):
        file.write(data)
        file.flush()
        try:
            library.Config().use_elliptic_key_verifier(public_key=key).verify(root.resolve(), Path(file.name))
        except Exception as error:  # noqa: BLE001 - of several libraries
            raise BundleError(f"{path}: not a signature of this bundle by {key}: {_reason(error)}") from None
    statement = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"]))["predicate"]
    signed = {entry["name"]: entry["digest"] for entry in statement["resources"]}
    if signed.get(MANIFEST) != sha256:
        raise BundleError(f"{path}: {MANIFEST} is not the one that was signed")
    if extra := set(statement["serialization"].get("ignore_paths", ())) - set(UNSIGNED):
        raise BundleError(f"{path}: leaves out {', '.join(sorted(extra))}, so it does not sign the whole bundle")
    return str(document["verificationMaterial"]["publicKey"]["hint"])


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BundleError(f"signatures need packages that are not installed ({error}): {_PACKAGES}") from None


def _read(path: Path) -> tuple[bytes, JsonObject]:
    """Return the bytes and the content of a signature's file; :class:`BundleError` unless it is in its one form."""
    with path.open("rb") as file:
        data = file.read(_SIZE)
    try:
        document = json.loads(data)
        sound = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode() == data and _formed(document)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise BundleError(f"{path}: it is not as it was written, so damaged or changed: get the bundle again")
    return data, document


def _formed(document: JsonObject) -> bool:
    for place, names in _FORM.items():
        found: Any = document
        for name in filter(None, place.split(".")):
            found = found[name]
        if set(found) != names:
            return False
    envelope, material = document["dsseEnvelope"], document["verificationMaterial"]
    (signature,) = envelope["signatures"]
    texts = [envelope["payload"], signature["sig"]]
    return (
        {"sig"} <= set(signature) <= {"sig", "keyid"}
        and not signature.get("keyid")
        and not material["tlogEntries"]
        and isinstance(material["publicKey"]["hint"], str)
        and all(base64.b64encode(base64.b64decode(text, validate=True)).decode() == text for text in texts)
    )


def _reason(error: Exception) -> str:
    """Return what an error says on one line; that of a wrong signature says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
