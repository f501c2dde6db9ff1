"""The inputs of a verification: a bundle, its artifacts and its checkpoint, each read once, on demand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from stages.checkpoint.generation import CONFIG
from stages.checkpoint.gguf.folder import file_of
from stages.checkpoint.headers import read_headers
from stages.runtime import manifest, tensor_cache
from stages.runtime.tokenizer import BundleTokenizer
from stages.verification import original, probes
from stages.verification.checks import CACHE, PROBES
from stages.verification.prompts import PARAGRAPH, PROMPTS
from stages.verification.reference import recorded_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy as np

    from stages.documents.files import JsonObject
    from stages.documents.model import CheckpointTensor
    from stages.documents.params import Register
    from stages.memo import Memo
    from stages.tokenizers.resolution import Resolution
    from stages.tokenizers.tokenizer_family import ReferenceTokenizer as SourceReader


class Portion(NamedTuple):
    """Parameters that are compared together: their names in messages, what whoever compares them is given
    (:mod:`stages.verification.portions`), and the files of the checkpoint and of the bundle that are read for it.
    """

    name: str
    what: JsonObject
    checkpoint: Sequence[str]
    bundle: Sequence[str]


@dataclass(frozen=True)
class Case:
    """What is verified: a bundle, the artifacts that describe it, and the files and digests of its checkpoint.

    ``files`` may have more than ``digests``: those ``made`` of a GGUF file, which may also have the name of another
    file of the checkpoint.
    """

    bundle: Path
    params: Path
    config: Path
    root: Path
    files: Mapping[str, Path]
    digests: Mapping[str, str]
    target: str
    reference: str
    device: str
    scales: str = "max"  # how quantize chose them
    proof: JsonObject | None = None  # what tokenizer-bundle has found, where verify reads that
    corpus: Path = probes.DEFAULT
    probe_tokens: int = 2048
    limits: Mapping[str, float] = field(default_factory=dict)  # the user's own of gates.LossLimits
    scratch: Path = Path()  # where files may be made that are removed again
    batch: int = 1 << 30  # bytes of the checkpoint in a portion of the weights
    # Has the portions compared by other machines, and returns what they found; None where there are none.
    spread: Callable[[Sequence[Portion]], list[list[str]] | None] | None = None
    memo: Memo | None = None  # where the original's answers are kept; without one they are computed anew
    made: Collection[str] = ()

    @cached_property
    def registry(self) -> Register:
        """params.json."""
        document: Register = json.loads(self.params.read_text("utf-8"))
        return document

    @cached_property
    def manifest(self) -> manifest.Manifest:
        """The bundle's own description."""
        return manifest.read(self.bundle)

    @property
    def arithmetic(self) -> str:
        """The type that the library rounds activations to: int8, or the dtype it computes in."""
        model = self.manifest.model
        return "int8" if model.get("activations") == "int8" else str(model["compute_dtype"])

    @property
    def in_bytes(self) -> tuple[str, ...]:
        """What the library rounds to eight bits as it computes, in words."""
        model = self.manifest.model
        kinds = {"activations": model.get("activations"), CACHE: model.get("kv_dtype")}
        return tuple(what for what, dtype in kinds.items() if dtype == "int8")

    @property
    def coarsest(self) -> str:
        """What bounds follow from: int8 if anything is rounded to that, or the dtype the library computes in."""
        return "int8" if self.in_bytes else self.arithmetic

    @cached_property
    def prompts(self) -> tuple[str, tuple[str, ...]]:
        """The text to read and the texts to continue: those that the checkpoint brings, else ours."""
        return recorded_prompts(self.files) or (PARAGRAPH, PROMPTS)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text whose ids are compared."""
        prompt, continued = self.prompts
        return tuple(dict.fromkeys((*PROBES, PARAGRAPH, prompt, *continued)))

    @cached_property
    def tokenizer(self) -> BundleTokenizer:
        """The bundle's tokenizer."""
        return BundleTokenizer(self.manifest.folder)

    @cached_property
    def resolution(self) -> Resolution | None:
        """What the checkpoint's own files say of its tokenizer, None where it is of no family known here."""
        from stages.tokenizers.errors import TokenizerError
        from stages.tokenizers.resolution import resolve

        # What a GGUF file says of its tokenizer is all there is: no class that its model's type would have counts.
        files = {name: path for name, path in self.files.items() if name != CONFIG or not file_of(self.files)}
        try:
            return resolve(self.root, files)
        except TokenizerError:
            return None

    @cached_property
    def reader(self) -> SourceReader | None:
        """An independent reader of the checkpoint's own vocabulary, None where it is of no family known here."""
        from stages.tokenizers import load_tokenizer_family

        if self.resolution is None:
            return None
        return load_tokenizer_family(self.resolution.family).reference(self.resolution)

    @cached_property
    def prefix(self) -> list[int]:
        """The ids before every text, such as bos, by the checkpoint's own files if they can be read."""
        return self.reader.prefix if self.reader else self.tokenizer.prefix

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, by the checkpoint's own vocabulary likewise."""
        return self.reader.encode(text, specials=False) if self.reader else self.tokenizer.encode(text)

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a text to continue: those of ``text`` after the prefix."""
        return [*self.prefix, *self.encode(text)]

    def chat(self, messages: Sequence[JsonObject]) -> Sequence[int]:
        """Return the ids of a conversation."""
        return probes.conversation(messages, self.tokenizer, self.manifest.folder, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens, by the checkpoint's own vocabulary likewise."""
        if self.reader is None:
            return self.tokenizer.decode(ids)
        table = self.reader.tokens()
        return self.reader.decode([token for token in ids if token in table and not _is_special(self.reader, token)])

    @cached_property
    def probes(self) -> probes.Probes:
        """The probes: the texts on which the bundle and the original model are compared."""
        window = int(self.manifest.model["context_window"])
        return probes.of(
            self.corpus,
            self.probe_tokens,
            window=window,
            prefix=self.prefix,
            encode=self.encode,
            chat=self.chat,
        )

    @cached_property
    def original(self) -> original.OriginalRequest:
        """The request to the original model."""
        weights = {name: path for name, path in self.files.items() if "/" not in name}
        probes = self.probes
        return original.OriginalRequest(self.root, weights, self.config, probes.pieces, probes.skipped, self.scratch)

    @cached_property
    def digests_read(self) -> dict[str, str]:
        """The digest of each of the ``files`` as it is read."""
        return {
            name: blake3(path.read_bytes()).hexdigest() if name in self.made else self.digests[name]
            for name, path in self.files.items()
        }

    def known_original(self) -> Mapping[str, np.ndarray] | None:
        """Return the memoised results of the original model on these probes, for any scheme and target."""
        if self.memo is None or not self.probes.count:
            return None
        return original.known(self.memo, original.document(self.original, self.digests_read))

    def keep_original(self, found: Mapping[str, np.ndarray]) -> None:
        """Memoise the results of the original model, for other schemes and targets."""
        if self.memo is not None:
            document = original.document(self.original, self.digests_read)
            original.keep(self.memo, document, found, self.scratch)

    @cached_property
    def records(self) -> dict[str, tensor_cache.Record]:
        """Where the bundle's weights are."""
        return tensor_cache.records(self.manifest.folder)

    @cached_property
    def tensors(self) -> dict[str, CheckpointTensor]:
        """The checkpoint's tensors by its headers: dtype, shape, file."""
        return read_headers({name: path for name, path in self.files.items() if "/" not in name}).table()


def _is_special(reader: SourceReader, token: int) -> bool:
    text = reader.decode([token])
    return reader.encode(text, specials=True) == [token] != reader.encode(text, specials=False)
