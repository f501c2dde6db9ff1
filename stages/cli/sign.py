"""``pipeline sign BUNDLE --key KEY.pem``: sign a bundle's folder, certificate included, with a key of one's own."""

from __future__ import annotations

import sys
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import certificate, manifest, serving, signature
from stages.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline sign dist/tiny-qwen --key key.pem"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    serving.bundle_argument(parser)
    parser.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key: ECDSA, PEM")
    parser.add_argument("--password-file", type=Path, metavar="FILE", help="file whose first line opens the key")


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
    signed = signature.sign(bundle.root, args.key, _password(args.key, args.password_file))
    out.write(f"signed {bundle.root} ({sealed.document['verdict']}): {signature.FILE}, key SHA-256 {signed}\n")
    return 0


def _password(key: Path, file: Path | None) -> str | None:
    """Return what opens the private key ``key``: the first line of ``file``, or what is typed at a terminal.

    None for a key without a password. Neither an argument nor the environment holds it: other processes read both.
    """
    try:
        locked = b"ENCRYPTED" in key.read_bytes()
        if file:
            return file.read_text(encoding="utf-8").partition("\n")[0].removesuffix("\r") if locked else None
    except (OSError, UnicodeDecodeError) as error:
        named = getattr(error, "filename", None) or file
        raise RequestError(
            f"{named}: {getattr(error, 'strerror', None) or error}; name a file that can be read"
        ) from None
    if locked and not sys.stdin.isatty():
        raise RequestError(f"{key}: the key has a password; give --password-file FILE, or sign at a terminal")
    return getpass(f"Password of {key}: ") if locked else None
