"""``pipeline sign BUNDLE --key KEY.pem``: sign a bundle's folder, certificate included, with a key of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import certificate, manifest, serving, signature
from stages.runtime.errors import BundleError

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline sign dist/tiny-qwen --key key.pem"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    serving.bundle_argument(parser)
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key: ECDSA, PEM, no password")


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 if it is signed, 2 if it is damaged or the key cannot be used."""
    return serving.guarded(_run, args)


def _run(args: argparse.Namespace, out: TextIO, _err: TextIO) -> int:
    bundle = manifest.read(args.bundle)
    if problems := manifest.check(bundle, run=False):
        raise BundleError(*problems)
    sealed = certificate.of(bundle.root)
    if sealed.document["bundle"]["sha256"] != bundle.sha256:
        raise BundleError(f"{bundle.root / certificate.FILE}: it is the certificate of another bundle")
    signed = signature.sign(bundle.root, args.key)
    out.write(f"signed {bundle.root} ({sealed.document['verdict']}): {signature.FILE}, key SHA-256 {signed}\n")
    return 0
