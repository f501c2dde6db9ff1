"""The backends that generate code for devices other than the processor, one per target.

A backend is a module with what :class:`Backend` says; importing it must be cheap, for the planner does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from pathlib import Path

    from stages.documents.library import DeviceContents
    from stages.targets.toolchain import Program

# Target -> its backend. Targets that run on the processor alone have none.
BACKENDS: dict[str, str] = {"cuda": "stages.targets.cuda.backend"}


class DeviceCodeError(ValueError):
    """Device code could not be made or read; the message says what failed and what to do."""


@dataclass(frozen=True)
class DeviceCompiler:
    """What makes device code: ``compile`` takes TVM's source and returns an image; ``loader`` is the name of TVM's
    function that makes a module of images of the format ``image_format``.
    """

    compile: Callable[[str], bytes]
    loader: str
    image_format: str


class Backend(Protocol):
    """The functions and constants of a backend's module.

    ``NAME`` is that of its toolkit in metadata and keys, ``PACKAGES`` the distributions that a packaged toolkit is made
    of, ``INSTALL`` the sentence for a user who has none.
    """

    NAME: str
    PACKAGES: tuple[str, ...]
    INSTALL: str

    def resolve(self, params: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the values that parameters of compile get, and what is wrong with them."""

    def toolkit(self, kind: str) -> Program | None:
        """Return the installed toolkit of a resolved ``kind``, or None."""

    def attributes(self, params: Any) -> dict[str, str]:
        """Return what TVM's target gets beside its kind and limits."""

    def prepare(self, toolkit: Program, cxx: Program, params: Any) -> DeviceCompiler:
        """Return the compiler, ready; :class:`DeviceCodeError` for what the toolkit lacks, all at once."""

    def contents(self, library: Path) -> DeviceContents:
        """Return what device code a finished library holds, for its metadata: ``device_code``, ``device_kernels``."""


def load_backend(target: str) -> Backend | None:
    """Return the backend of a target, or None."""
    reference = BACKENDS.get(target)
    return cast("Backend", importlib.import_module(reference)) if reference else None


def packages(backend: Backend, toolkit: Program | None, versions: Callable[..., dict[str, str]]) -> Mapping[str, str]:
    """Return the versions of the packages that a packaged toolkit is made of; a system's has the one version."""
    return versions(*backend.PACKAGES) if toolkit and toolkit.kind == "pypi" else {}
