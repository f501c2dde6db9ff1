"""Writes the bill of materials of a bundle (CycloneDX 1.6, ML-BOM) from its certificate alone.

The format: https://cyclonedx.org/docs/1.6/json/. Licences have the names that the checkpoint's card uses, which are
no SPDX identifiers. There is neither a time nor a serial number, so that equal bundles have equal bills.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.documents.verification import Verification
    from stages.runtime.documents import Certificate, CertifiedCheckpoint, JsonObject, Provenance
    from stages.runtime.manifest import Manifest


def bill(certified: Certificate, verified: Verification, bundle: Manifest) -> JsonObject:
    """Return the bill of materials of a bundle with this certificate; ``verified`` is the verify.json in it."""
    checkpoint = certified["checkpoint"]
    licences = [{"license": {"name": name}} for name in (_licence(checkpoint["licence"]),) if name]
    model = {
        "type": "machine-learning-model",
        "bom-ref": "bundle",
        "name": bundle.name,
        "version": bundle.sha256,
        "hashes": [{"alg": "SHA-256", "content": bundle.sha256}],
        "licenses": licences,
        "pedigree": {"ancestors": [_checkpoint(checkpoint, bundle.name, licences)]},
        "modelCard": {
            "modelParameters": {"architectureFamily": str(bundle.model.get("family", ""))},
            "quantitativeAnalysis": {"performanceMetrics": _metrics(verified)},
        },
        "properties": [
            {"name": "stagegraph:verdict", "value": certified["verdict"]},
            {"name": "stagegraph:scheme", "value": certified["bundle"]["scheme"]},
            {"name": "stagegraph:target", "value": certified["bundle"]["target"]},
        ],
    }
    files: list[JsonObject] = [
        {
            "type": "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": file.sha256}],
        }
        for name, file in sorted(bundle.files.items())
    ]
    needed = [_package(name, version) for name, version in sorted(bundle.tvm.items())]
    components: list[JsonObject] = [*files, *needed]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model, "tools": {"components": _tools(certified["made"])}},
        "components": components,
        "dependencies": [{"ref": "bundle", "dependsOn": [str(each["bom-ref"]) for each in components]}],
    }


def _licence(licence: Mapping[str, str]) -> str:
    """Return the name of a licence: of one that the hub does not list, the name that the card gives it."""
    return licence.get("license_name") or licence.get("license") or ""


def _checkpoint(checkpoint: CertifiedCheckpoint, name: str, licences: Sequence[JsonObject]) -> JsonObject:
    repository, _, commit = checkpoint["source"].partition("@")
    found: dict[str, object] = {
        "type": "machine-learning-model",
        "name": repository or name,
        "hashes": [{"alg": "BLAKE3", "content": checkpoint["blake3"]}],
        "licenses": licences,
    }
    if commit:
        found["version"] = commit
    if repository and commit:
        found["purl"] = f"pkg:huggingface/{repository}@{commit}"
    return found


def _metrics(verified: Verification) -> list[dict[str, str]]:
    return [
        {"type": check["name"], "value": f"{check['measured']:g}"}
        for check in verified["checks"]
        if check["measured"] is not None
    ]


def _tools(made: Provenance) -> list[dict[str, str]]:
    """Return what verified: the tools it named, and all other libraries that counted in its key."""
    libraries = {name: build for name, build in made["libraries"].items() if name not in made["tools"]}
    found = [("application", made["tools"]), ("library", libraries)]
    return [{"type": kind, "name": name, "version": each[name]} for kind, each in found for name in sorted(each)]


def _package(name: str, version: str) -> dict[str, str]:
    purl = f"pkg:pypi/{name}@{version}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
