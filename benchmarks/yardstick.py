"""How fast the processors are while something is measured: the CPU seconds of ``import yaml, diskcache``.

Bounds in CPU seconds are those of a machine where these imports take ``IMPORTS`` seconds. Elsewhere, and where
neighbours slow the processors down, a bound is taken times as long as the imports take; the figure is judged by that,
and both are told.
"""

from __future__ import annotations

import subprocess
import sys

IMPORTS = 0.036  # CPU seconds on the machine that bounds are of
CODE = """
import resource, yaml, diskcache
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""
HEAD = f"CPU bounds are of a machine where the imports take {IMPORTS} s, and are judged times what they take here"


def import_seconds(times: int = 3) -> float:
    """Return the least CPU seconds that the imports take now."""
    return min(float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(times))


def judge(seconds: float, bound: float, imports: float, unit: str = "s") -> tuple[str, bool]:
    """Say how a figure stands to its bound, and whether it is met where the imports take ``imports`` seconds.

    ``seconds`` and ``bound`` are CPU time in the same unit.
    """
    here = bound * imports / IMPORTS
    met = seconds <= here
    beyond = "" if seconds <= bound else ", beyond that"
    return f"{bound:.4g} {unit}{beyond}; here {here:.4g} {unit}", met
