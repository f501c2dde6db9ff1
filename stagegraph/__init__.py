"""The engine: runs a YAML-defined DAG of content-hashed stages, knowing nothing of what the stages do.

``from stagegraph import Pipeline`` is the Python API (:mod:`stagegraph.api`), imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stagegraph.api import Pipeline as Pipeline
    from stagegraph.execution.reporter import Reporter as Reporter

__all__ = ["Pipeline", "Reporter"]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from stagegraph.api import Pipeline

        return Pipeline
    if name == "Reporter":
        from stagegraph.execution.reporter import Reporter

        return Reporter
    raise AttributeError(f"module 'stagegraph' has no attribute '{name}'")
