"""Every bit of what results are read from under ``artifacts/``, flipped one by one: found, or without effect.

Here only the one who reads a file is asked, so that every bit can be; what a run then makes of a damaged file is for
:mod:`tests.endurance.test_bits`. The key of secrets is not here: of another key there are other digests, so that what
has a secret is made again. Neither are logs, which are for people, nor what is shown, which is restored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagegraph.store.documents import Documents
from stagegraph.store.index import Index
from stagegraph.store.journal import Journal
from stagegraph.store.objects import Store
from tests.endurance.test_bits import bench, flip, kinds  # noqa: F401 - bench is a fixture

Asked = Callable[[], bool]  # whether what is read is sound, or refused
WHOLE = 1 << 12  # bytes of a file of which every bit is flipped
BYTES = 1 << 18  # bytes of a larger file of which a bit of each byte is flipped; of one above it, a bit of each chunk
CHUNK = 1 << 10  # bytes that BLAKE3 digests together, at the leaves of its tree


def document(path: Path) -> Asked:
    """Ask for a record or a part."""
    store = path.parents[2]
    name = {"records": "rec:", "parts": "part:"}[path.parents[1].name] + path.name
    sound = Documents(store).get(name)
    assert sound is not None
    return lambda: Documents(store).get(name) in (None, sound)


def stored(path: Path) -> Asked:
    """Ask for an object."""
    store = Store(path.parents[2], Index(path.parents[2] / "index"))
    assert store.check(path.name) is None
    index, aside = Index(path.parents[2] / "no index"), path.with_name("aside")

    def found() -> bool:
        reader = Store(path.parents[2], index)
        wrong = reader.check(path.name)
        for moved in reader.quarantine.iterdir():
            moved.rename(aside)
            aside.rename(path)
        return wrong == "damaged"

    return found


def journal(path: Path) -> Asked:
    """Ask for past runs."""
    sound = [json.dumps(entry) for entry in Journal(path).entries()]
    assert sound
    return lambda: all(json.dumps(entry) in sound for entry in Journal(path).entries())


def database(path: Path) -> Asked:
    """Ask for every document of the index, which is another one each time."""
    copy = path.parents[1] / "copy" / "index"

    def documents(directory: Path) -> dict[str, object]:
        index = Index(directory)
        try:
            return {name: index.get(name) for name in index.names("")}
        finally:
            index.close()

    def copied() -> dict[str, object]:
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.mkdir(parents=True)
        shutil.copyfile(path, copy / "cache.db")
        return documents(copy)

    documents(path.parent)  # takes in what is not in this file yet
    sound = copied()
    assert sound
    assert None not in sound.values()
    return lambda: all(found in (None, sound.get(name)) for name, found in copied().items())


ASK: dict[str, Callable[[Path], Asked]] = {
    "record": document, "part": document, "object": stored, "journal": journal, "index": database,
}  # fmt: skip


def flips(path: Path, asked: Asked, bits: Iterator[int]) -> tuple[int, list[int]]:
    """Flip bits one at a time; return how many, and which of them changed what is read."""
    path.chmod(0o644)
    count, wrong = 0, []
    for bit in bits:
        flip(bit)(path)
        count += 1
        if not asked():
            wrong.append(bit)
        flip(bit)(path)
    return count, wrong


def test_a_bit_of_many_bytes_of_a_file_of_each_kind(bench) -> None:  # noqa: F811
    found = kinds(bench)
    for kind, ask in ASK.items():
        path = min((path for path in found[kind] if path.stat().st_size > 1), key=lambda path: path.stat().st_size)
        size = path.stat().st_size
        count, wrong = flips(path, ask(path), (at * 8 + at % 8 for at in range(0, size, max(1, size // 200))))
        assert count >= min(size, 200)
        assert not wrong, f"{path}: bits {wrong[:20]}"


@pytest.mark.endurance
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", ASK)
def test_every_bit_of_small_files_and_a_bit_of_every_byte_or_chunk_of_others(bench, kind: str) -> None:  # noqa: F811
    files = kinds(bench)[kind] if kind != "index" else [bench.store / "index" / "cache.db"]
    count, whole, wrong = 0, 0, {}
    for path in files:
        size = path.stat().st_size
        step = 1 if size <= BYTES else CHUNK
        every = range(size * 8) if size <= WHOLE else [at * 8 + at // step % 8 for at in range(0, size, step)]
        if every:
            flipped, unseen = flips(path, ASK[kind](path), iter(every))
            count, whole = count + flipped, whole + (size <= WHOLE)
            wrong |= {str(path): unseen[:20]} if unseen else {}
    print(
        f"\n{kind}: {len(files)} files, {whole} of them whole, {count:,} bits, {len(wrong)} with one that is not seen"
    )
    assert not wrong
