"""Computes how later columns of a matrix compensate for the rounding errors of earlier ones (``scales: gptq``).

Of what a matrix reads, rows x, the mean of x' x says what errors cost together: e (x' x) e'. Where the error of one
column is given, the best the later ones can do about it comes from the Cholesky factor of the inverse of that (GPTQ).
Columns that carry most are taken first, while most of the others can still make up for them.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stages.quantization.feedback import INDEX, Feedback, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

THREADS = 4  # that factors are computed by, whatever the machine has: how LAPACK adds up depends on their number
DAMPING = 0.01  # of the mean of the diagonal, added to it: a column that carries nothing has an inverse too


class Curvatures:
    """Computes error feedback from the inputs of matrices and writes it to ``folder``, one matrix at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str | None] = {}
        self._last: Any = None
        self._written = ""

    def add(self, name: str, read: Any, rows: Any) -> None:
        """Add the inputs ``rows`` [n, k] of the matrix ``name``; what several matrices ``read`` is processed once.

        A matrix that is used twice has no feedback, as its first inputs are no longer in memory.
        """
        if name in self._files:
            self._files[name] = None
            return
        if read is not self._last:
            self._last, self._written = read, f"{len(self._files):05}.npz"
            save(self._folder / self._written, feedback_of(rows))
        self._files[name] = self._written

    def finish(self) -> None:
        """Write the index: tensor -> file."""
        self._last = None
        known = {name: file for name, file in sorted(self._files.items()) if file}
        (self._folder / INDEX).write_text(json.dumps(known, indent=1), "utf-8")


def feedback_of(rows: Any) -> Feedback:
    """Return the feedback that inputs ``rows``, a float tensor [n, k], ask for, in memory for two of float64 [k, k].

    How two columns go together counts n / (n + k) of what the rows say: the fewer they are, the more of it is chance.
    """
    import torch

    rows = rows.float()
    n, k = rows.shape
    second = rows.T @ rows
    carried = second.diagonal().double() / n
    order = torch.argsort(carried, descending=True, stable=True)
    made = second[order][:, order].double().div_(n + k)
    del second
    made.diagonal().copy_(carried[order]).add_(DAMPING * float(carried.mean()) or 1.0)
    with _threads(THREADS):
        made = torch.linalg.cholesky(made)
        made = torch.cholesky_inverse(made)
        made = torch.linalg.cholesky(made, upper=True)
    # An error e in column i, in units of the factor's diagonal, takes e times its row from the columns behind.
    units = made.diagonal().clone()
    shares = made.div_(units[:, None]).triu_(1).neg_()
    return Feedback(order.numpy(), shares.float().numpy(), units.pow(-2).float().numpy())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
