"""The JSON documents that the runtime reads and writes: the form of each, once it was checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict

JsonObject: TypeAlias = Mapping[str, Any]  # of any content: a schema, a message, what is not checked yet


class Cpu(TypedDict):
    """The processor that the host code is for, by LLVM's names."""

    mcpu: str
    features: Sequence[str]


class DeviceCode(TypedDict):
    """An entry of device code: ``kind`` elf or ptx, for architecture ``arch`` (90 is 9.0)."""

    kind: str
    arch: int


class BundledModel(TypedDict):
    """What is read here of the model in bundle.json; a ``state`` of ``rnn`` is a recurrent one's, without pages."""

    scheme: str
    compute_dtype: str
    context_window: int
    prefill_chunk: int
    max_batch: int
    vocab_size: int
    hidden_size: int
    sep_embed: bool
    state: NotRequired[str]
    page_size: NotRequired[int | None]
    verify_chunk: NotRequired[int | None]
    family: NotRequired[str]


class CheckLine(TypedDict):
    """One check of a result; ``measured`` and ``bound`` are relative differences, where the check has numbers."""

    name: str
    ok: bool
    detail: str
    measured: float | None
    bound: float | None


class GoldenRow(TypedDict):
    """The largest ``logits`` after token ``after`` of a text, with their ``ids``, and the ``largest`` magnitude."""

    after: int
    ids: list[int]
    logits: list[float]
    largest: float


class Golden(TypedDict):
    """A text of which the first ``prompt`` tokens are a prompt, and the logits that ``origin`` gives for it."""

    origin: str
    tokens: list[int]
    prompt: int
    bound: float
    rows: list[GoldenRow]


class TextIds(TypedDict):
    """A text and the ids of its tokens."""

    text: str
    ids: list[int]


class Wording(TypedDict):
    """What a tokenizer makes of texts, and of a conversation unless its ``chat`` format writes the date.

    ``proof`` is what the tokenizer was proven by where it was bundled.
    """

    family: str | None
    fingerprint: str | None
    texts: list[TextIds]
    chat: str | None
    conversation: list[int] | None
    proof: NotRequired[object]


class CertifiedBundle(TypedDict):
    """The bundle that a certificate is of, by the SHA-256 of its bundle.json."""

    name: str
    target: str
    scheme: str
    sha256: str


class CertifiedCheckpoint(TypedDict):
    """The checkpoint that a bundle was verified against: digests of its files, its licence and where it is from."""

    blake3: str
    files: Mapping[str, str]
    licence: Mapping[str, str]
    source: str


class Provenance(TypedDict):
    """What verified: a digest of its code, the versions of its tools, the builds of its libraries, and its inputs."""

    code: str
    tools: Mapping[str, str]
    libraries: Mapping[str, str]
    inputs: object


class Certificate(TypedDict):
    """certificate.json but for its seal; ``verification`` is verify.json, ``golden`` null where no library ran."""

    format: str
    verdict: str
    bundle: CertifiedBundle
    checkpoint: CertifiedCheckpoint
    made: Provenance
    verification: Mapping[str, object]
    tokenizer: Wording
    golden: Golden | None


class Device(TypedDict):
    """Where a bundle was run: the kind of device, its name if anything ran there, and a GPU's driver."""

    kind: str
    name: str
    driver: NotRequired[str]


class Result(TypedDict):
    """What one machine found: the SHA-256 of the bundle and of the certificate, and its checks; sealed."""

    format: str
    result: str
    bundle: str
    certificate: str
    device: Device
    tools: Mapping[str, str]
    checks: Sequence[CheckLine]
    unchecked: Sequence[str]
    sha256: NotRequired[str]


class KernelTime(TypedDict):
    """How often a function of a library was called, and the seconds of all calls together."""

    name: str
    calls: int
    seconds: float


class Speed(TypedDict):
    """How many ``tokens`` were read a second: the median of several times, the lowest and the highest.

    ``after`` is how many stood before them, where they were read one by one.
    """

    tokens: int
    rate: float
    lowest: float
    highest: float
    after: NotRequired[int]
