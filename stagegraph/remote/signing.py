"""Who made a result: signatures of records by Ed25519 (RFC 8032).

A digest says that bytes are what their name says; only a signature says that they are what a key means. The private
key is a file of the user's, beside the configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from stagegraph.digest import canonical
from stagegraph.errors import PlanError
from stagegraph.store.secret_key import load_key

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from stagegraph.stage import Json

CONTEXT = b"stagegraph record\0"  # what is signed begins with it, so that a signature of anything else is none of this
NEEDS = "sharing results needs two more packages: pip install 'stagegraph[remote]'"


class SignedRecord(TypedDict):
    """A record in a remote: ``signer`` is the public key, ``signature`` that of the record; both hexadecimal."""

    record: Json
    signer: str
    signature: str


class Signer:
    """The user's own key, made when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._private = _private_key(path)
        self.public = self._private.public_key().public_bytes_raw().hex()

    def sign(self, record: Json) -> SignedRecord:
        """Return a record as it is kept in a remote."""
        return {"record": record, "signer": self.public, "signature": self._private.sign(_signed(record)).hex()}


def is_signed(document: Any, public: str) -> bool:
    """Say whether a document of :meth:`Signer.sign` is signed by the key ``public``, whatever it says itself."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        signature = bytes.fromhex(document["signature"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, _signed(document["record"]))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return False
    return True


def _signed(record: Any) -> bytes:
    return CONTEXT + canonical(record)


def _private_key(path: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise PlanError(NEEDS) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = load_key(path, Ed25519PrivateKey.generate().private_bytes_raw())
    assert seed is not None  # made just now if there was none
    return Ed25519PrivateKey.from_private_bytes(seed)
