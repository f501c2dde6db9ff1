"""Protocol for memoisation and progress: what a room needs of the stage that runs it, whose context offers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.documents.files import JsonObject


# A new part to keep: its document, its file, the digest of the bytes of the file, and small facts.
NewPart: TypeAlias = "tuple[JsonObject, Path, str, JsonObject]"


class Part(Protocol):
    """A finished part: its file, and small facts kept with it."""

    @property
    def path(self) -> Path:
        """The file; read-only."""

    @property
    def facts(self) -> JsonObject:
        """The facts."""


class Memo(Protocol):
    """A stage's context, as far as it is used here."""

    def recall(self, kind: str, document: JsonObject) -> Part | None:
        """Return the part kept for ``document``, or None."""

    def remember(self, kind: str, document: JsonObject, file: Path, *, digest: str | None = None, **facts: Any) -> Part:
        """Keep ``file`` as the part for ``document``; ``digest`` is that of its bytes, where it was taken."""

    def remember_all(self, kind: str, parts: Sequence[NewPart]) -> None:
        """Keep several parts in a fraction of the time; unsaved ones are lost if the process is killed."""

    def progress(self, done: int, total: int, unit: str = "", note: str = "") -> None:
        """Report progress."""

    def warn(self, message: str) -> None:
        """Record a finding that fails nothing."""
