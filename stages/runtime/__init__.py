"""Load a bundle and run it; needs the standard library, numpy, tokenizers and TVM's runtime, nothing of the build.

``from stages.runtime import load`` is all that a program needs (docs/serving.md).
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return what programs use, which is imported when it is first asked for; ``__init__.pyi`` says what that is."""
    if name not in ("Model", "Reply", "Stream", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(".server.model", __name__), name)
