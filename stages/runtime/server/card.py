"""Reports what the certificate beside a bundle proves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.runtime import certificate
from stages.runtime.errors import BundleError

if TYPE_CHECKING:
    from stages.runtime.manifest import Manifest
    from stages.runtime.server.documents import Proofs


def proofs(bundle: Manifest) -> Proofs:
    """Return the verdict of a bundle's certificate, and each check of it with what was found.

    A certificate that is damaged, or that certifies another bundle, is none: the verdict says why.
    """
    if not (bundle.root / certificate.FILE).exists():
        return {"verdict": "no certificate", "checks": []}
    try:
        certified = certificate.of(bundle.root).document
    except BundleError:
        return {"verdict": "its certificate is damaged", "checks": []}
    if certified["bundle"]["sha256"] != bundle.sha256:
        return {"verdict": "the certificate beside it is of another bundle", "checks": []}
    checks: Any = certified["verification"].get("checks", [])
    return {
        "verdict": certified["verdict"],
        "checks": [{"name": check["name"], "ok": check["ok"], "detail": check["detail"]} for check in checks],
    }
