"""The one error of this room; in a module of its own because planning loads it and little else."""

from __future__ import annotations

from stages.problems import ProblemsError, capped


class TokenizerError(ProblemsError):
    """A checkpoint's tokenizer files cannot be used."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*capped(problems, "problems"))
