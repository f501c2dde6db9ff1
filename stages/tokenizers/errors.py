"""The one error of this room; in a module of its own because planning loads it and little else."""

from __future__ import annotations

MAX_SHOWN = 20


class TokenizerError(ValueError):
    """A checkpoint's tokenizer files cannot be used: the problems found, each a complete sentence."""

    def __init__(self, *problems: str) -> None:
        hidden = len(problems) - MAX_SHOWN
        self.problems = (*problems[:MAX_SHOWN], *([f"and {hidden:,} more problems"] if hidden > 0 else []))
        super().__init__("\n".join(self.problems))
