"""The error of a checkpoint that cannot be built."""

from __future__ import annotations

from stages.problems import ProblemsError


class ConfigError(ProblemsError):
    """A checkpoint's config.json, headers or settings that cannot be built."""
