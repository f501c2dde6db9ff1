"""The one error of this room; in a module of its own because planning loads it and little else."""

from __future__ import annotations


class TokenizerError(ValueError):
    """A checkpoint's tokenizer files cannot be used: every problem found, each a complete sentence."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
