"""The command that holds a bundle against its certificate on the machine at hand, and says pass or fail.

For ``python -m stages.runtime selftest`` and for the verb ``verify``; needs no torch and no transformers.
"""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from stages.runtime import certificate, golden, seal, serving, signature
from stages.runtime.certificate import FAIL, PASS, check_document
from stages.runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from stages.runtime.certificate import Sealed
    from stages.runtime.documents import Certificate, CheckLine, Device, Result
    from stages.runtime.manifest import Manifest

_TOOLS = ("apache-tvm", "apache-tvm-ffi", "numpy", "tokenizers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to ``parser``."""
    serving.bundle_argument(parser)
    add = parser.add_argument
    add("--certificate", type=Path, metavar="FILE", help=f"the certificate (default: BUNDLE/{certificate.FILE})")
    serving.signature_argument(parser)
    add("--output", type=Path, metavar="FILE", help="write the result to FILE, for `pipeline attest`")
    add("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace, *streams: TextIO) -> int:
    """Run the command: the result goes to stdout, errors to stderr, or to the two ``streams``.

    Returns 0 for a pass, 1 for a fail, and 2 where there is no result: what cannot be read, or not be run here.
    """
    return serving.guarded(_run, args, *streams)


def _run(args: argparse.Namespace, out: TextIO, err: TextIO) -> int:
    from stages.runtime import attestations, manifest

    bundle = manifest.read(args.bundle, require_signature=args.require_signature)
    sealed = certificate.of(bundle.root, args.certificate)
    others = attestations.found(bundle, sealed)
    result = test(bundle, sealed, lambda text: err.write(f"{text}\n") if err.isatty() else None)
    if args.output is not None:
        try:
            args.output.write_bytes(seal.fixed(result))
        except OSError as error:
            raise RequestError(f"{args.output}: {error.strerror}") from None
    signed = _signed(signature.signer(bundle.root), args.require_signature)
    out.write(
        serving.json_text(result) + "\n" if args.json else _page(bundle, sealed.document, result, [signed], others)
    )
    out.flush()
    return 0 if result["result"] == PASS else 1


def test(bundle: Manifest, sealed: Sealed[Certificate], progress: Callable[[str], object]) -> Result:
    """Return the result of holding ``bundle`` against its certificate; :class:`BundleError` where it cannot run here.

    Nothing is loaded of a bundle whose files are not those that were certified.
    """
    from stages.runtime import backend, manifest, wording

    certified = sealed.document
    checks = [_same_bundle(bundle, sealed), _files(bundle)]
    device: Device
    device, unchecked = {"kind": bundle.device, "name": ""}, ["what it computes"]
    if all(check["ok"] for check in checks):
        problems = manifest.machine_problems(bundle)
        if problems:
            raise BundleError(*problems)
        if certified["golden"] is None:
            raise BundleError(
                "the certificate holds no golden vectors: none were made where it was verified, so that the files are "
                "all that can be checked against it"
            )
        of_tokenizer, unchecked = wording.check(certified["tokenizer"], bundle.folder)
        checks += of_tokenizer
        checks += golden.check(certified["golden"], bundle, progress)
        device = backend.device_name(bundle.device)
    result: Result = {
        "format": f"stagegraph-result-{certificate.RESULT_FORMAT}",
        "result": PASS if all(check["ok"] for check in checks) else FAIL,
        "bundle": bundle.sha256,
        "certificate": sealed.sha256,
        "device": device,
        "tools": _tools(),
        "checks": checks,
        "unchecked": unchecked,
    }
    return {**result, "sha256": seal.seal(result)}


def _same_bundle(bundle: Manifest, sealed: Sealed[Certificate]) -> CheckLine:
    same = sealed.document["bundle"]["sha256"] == bundle.sha256
    problem = "its SHA-256 is not the one that the certificate names: another bundle, or changed"
    return check_document("bundle.json", same, "the one that was certified" if same else problem)


def _files(bundle: Manifest) -> CheckLine:
    from stages.runtime import manifest

    problems = manifest.check(bundle, run=False)
    return check_document("files", not problems, "; ".join(problems) or f"{len(bundle.files)} files match bundle.json")


def _tools() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _TOOLS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _signed(signer: str | None, key: Path | None) -> str:
    """Return a line that says by which key a bundle is signed, and whether that was checked."""
    if signer is None:
        return "  not signed"
    checked = f"checked with {key}" if key else "not checked: name the public key with --require-signature"
    return f"  signed by the key of SHA-256 {signer}, {checked}"


def _page(
    bundle: Manifest, certified: Certificate, result: Result, first: list[str], others: list[Sealed[Result]]
) -> str:
    device = result["device"]
    lines = [f"{bundle.name} ({certified['bundle']['target']}), certified: {certified['verdict']}", *first]
    width = max(len(check["name"]) for check in result["checks"])
    lines += [
        f"  {check['name']:<{width}}  {'ok' if check['ok'] else FAIL}  {check['detail']}" for check in result["checks"]
    ]
    lines += [f"  not checked: {text}" for text in result["unchecked"]]
    where = f"on {device['name']}" if device["name"] else "without being run"
    lines.append(f"{result['result']} {where} ({device['kind']})")
    attested = (other.document for other in others)
    lines += [f"attested: {other['result']} on {other['device']['name']}" for other in attested]
    return "".join(f"{serving.one_line(line)}\n" for line in lines)
