"""The interfaces of this package: a tokenizer family, its independent reference, and facts about the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from stages.tokenizers.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject
    from stages.tokenizers.resolution import Resolution


@dataclass(frozen=True)
class Finding:
    """One result of a check: its id in the catalogue, its level, and a complete message."""

    check: str
    level: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


class ReferenceTokenizer(Protocol):
    """An implementation that reads the source vocabulary itself and shares no code with what we emit."""

    @property
    def prefix(self) -> list[int]:
        """Return the ids that the checkpoint's own tokenizer puts before every text, such as bos."""

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of ``text``; ``specials`` says whether special-token text becomes special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD."""

    def tokens(self) -> dict[int, bytes]:
        """Return every id with its bytes; a special token's bytes are its text in UTF-8."""


@dataclass(frozen=True)
class ChatFormat:
    """How a family writes a conversation where its checkpoints bring no template of their own.

    ``stops`` end a turn beside the end of text; ``system`` is the message used when the conversation has none.
    ``piecewise`` says that role, newline and content are encoded one by one and their ids joined.
    """

    template: str
    system: str
    stops: tuple[str, ...]
    piecewise: bool


@dataclass(frozen=True)
class TokenizerFamily:
    """One way of storing a vocabulary.

    ``convert`` turns the resolved files into a ``tokenizers.Tokenizer``, or what is used like one; ``reference`` opens
    the same files in an independent implementation. ``normalize`` is the Unicode form that a runtime gives text before
    it is split, or None. ``end_of_text`` are special tokens that end a text, the first there is; ``chats`` are chat
    formats by generation_config's name. ``file`` is the vocabulary in the bundle. ``warnings`` say where the
    emitted tokenizer deliberately does not do what the checkpoint's own would; ``shown`` are the ids of special tokens
    that are text when they are decoded; ``readings`` hold (kind, text) against another reading of the same files.
    ``by_transformers`` says that the reference is what transformers loads, and
    what is emitted is that; where it is not, ``transformers_needs`` are the modules without which transformers does not
    read such files, None if it has no reader of them.
    """

    name: str
    convert: Callable[[Resolution], Tokenizer]
    reference: Callable[[Resolution], ReferenceTokenizer]
    normalize: str | None
    end_of_text: tuple[str, ...]
    chats: Mapping[str, ChatFormat]
    file: str = "tokenizer.json"
    warnings: Callable[[Resolution], Sequence[str]] = lambda _: ()
    shown: Callable[[Resolution], Sequence[int]] = lambda _: ()
    readings: Callable[[Resolution, Sequence[tuple[str, str]]], Iterator[Finding]] = lambda *_: iter(())
    by_transformers: bool = False
    transformers_needs: Sequence[str] | None = ()


@dataclass(frozen=True)
class ModelFacts:
    """What the model's files say about its tokenizer: model.json, generation.json and the header of the embedding.

    ``rows`` is the first dimension of the tensor named ``embedding``, read from the safetensors header.
    """

    embedding: str
    rows: int
    vocab_size: int
    context_window: int
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    stop: tuple[int, ...]
    chat_format: str | None

    @classmethod
    def read(cls, model: JsonObject, generation: JsonObject, tensors: JsonObject, embedding: str) -> ModelFacts:
        """Gather the facts from config-parse's artifacts; :class:`TokenizerError` if there is no such embedding."""
        tensor = tensors.get(embedding)
        if tensor is None:
            raise TokenizerError(
                f"{embedding}: the checkpoint has no tensor of that name among its {len(tensors)}, so no id can be "
                "checked against the rows of the embedding; is a shard missing?"
            )
        return cls(
            embedding=embedding,
            rows=tensor["shape"][0],
            vocab_size=model["vocab_size"],
            context_window=model["context_window"],
            bos=generation.get("bos"),
            eos=tuple(generation.get("eos") or ()),
            pad=generation.get("pad"),
            stop=tuple(generation.get("stop") or ()),
            chat_format=generation.get("chat_format"),
        )
