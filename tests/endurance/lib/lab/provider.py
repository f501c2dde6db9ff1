"""What this package brings to the engine."""

from __future__ import annotations

from stagegraph.registry import Provider

PROVIDER = Provider(
    stages={
        "lab-read": "lab.stages:Read",
        "lab-cut": "lab.stages:Cut",
        "lab-big": "lab.stages:Big",
        "lab-join": "lab.stages:Join",
    }
)
