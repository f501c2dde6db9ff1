"""Runs a computation on the original model and sample text in a process of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from stages.problems import ProblemsError
from stages.runtime.errors import BundleError
from stages.runtime.folder import Folder
from stages.runtime.tokenizer import BundleTokenizer
from stages.verification import apart, original, probes
from stages.verification.checkpoint_files import checkpoint_files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from stages.documents.files import JsonObject
    from stages.verification.apart import Progress

DEFAULT = Path(__file__).with_name("samples.jsonl")  # of the kinds that verify's probes are of, and none of their texts
WINDOW = 512  # tokens of a piece: longer ones teach no more, and attention takes the square of it


class AskingError(ProblemsError):
    """The original model could not be run; ``problems`` says why, and what to do instead."""


@dataclass(frozen=True)
class Original:
    """A checkpoint's folder and ``files``, where config-parse's ``config`` and the bundle's ``tokenizer`` are, the
    ``corpus`` of which ``tokens`` are read, and a folder where files may be made.
    """

    root: Path
    files: Mapping[str, Path]
    config: Path
    tokenizer: Path
    corpus: Path
    tokens: int
    scratch: Path

    def ask(
        self,
        module: str,
        request: Callable[[original.OriginalRequest], JsonObject],
        progress: Progress,
        instead: str,
    ) -> dict[str, np.ndarray]:
        """Run ``module`` in a process of its own and return its arrays; :class:`AskingError` if it fails.

        ``request`` makes the module's request of the original's own; ``instead`` is what a user can do without it.
        """
        try:
            for name in ("torch", "transformers"):
                version(name)
        except PackageNotFoundError as error:
            raise AskingError(
                f"this runs the original model, which takes {error.name}: install the extra verify "
                f"(pip install 'stagegraph[verify]'), or {instead}"
            ) from None
        try:
            root, files = checkpoint_files(self.root, self.files, self.scratch)
            request_original = original.OriginalRequest(root, files, self.config, self.pieces().pieces, 0, self.scratch)
            return apart.call(module, request(request_original), progress, instead)
        except (ProblemsError, BundleError) as error:
            raise AskingError(*error.problems) from None

    def pieces(self) -> probes.Probes:
        """Return the sample text as ids."""
        folder = Folder(self.tokenizer)
        tokenizer = BundleTokenizer(folder)
        return probes.of(
            self.corpus,
            self.tokens,
            window=min(WINDOW, json.loads(self.config.read_bytes())["context_window"]),
            prefix=tokenizer.prefix,
            encode=tokenizer.encode,
            chat=lambda messages: probes.conversation(messages, tokenizer, folder, tokenizer.encode),
        )
