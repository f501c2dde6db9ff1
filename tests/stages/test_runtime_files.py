"""The loader reads what bundle.json lists and nothing else, as it was listed; whatever else is there costs one message.

Every case goes through the command, as a user would see it: exit code 2 and lines that begin with ``error:``.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stages.documents.files import write_json
from stages.packing import assemble
from stages.runtime import manifest, tensor_cache
from stages.runtime.errors import BundleError
from stages.runtime.folder import Folder
from stages.runtime.session import Session
from tests.engine.test_damage import flipped
from tests.stages.test_generate import run
from tests.support.bundles import Built

ODD = [None, True, "", "x\n\x1b[31m", -1, 10**400, 1.5, 1e308, [], [[]], {}, {"": None}, ["a"] * 3]


@pytest.fixture
def built(recorded: Built, tmp_path: Path) -> Built:
    return recorded.copy(tmp_path)


def said(built: Built) -> tuple[int, str]:
    """What the command says, two tokens long, and its exit code."""
    code, out, err = run(built.bundle, "--prompt", "every", "--max-tokens", 2)
    assert (code == 0) == bool(out), err
    return code, out or err


def refusal(built: Built) -> str:
    code, text = said(built)
    assert code == 2
    assert all(line.startswith("error: ") and line.isprintable() for line in text.splitlines()), text
    assert 0 < len(text.splitlines()) <= 20
    return text


# Only what is listed


def test_a_file_that_is_not_listed_replaces_nothing(recorded, built):
    (built.bundle / "rwkv_vocab.txt").write_text("1 YQ==\n")
    (built.bundle / "params_shard_99.bin").write_bytes(b"stray")
    assert said(built) == said(recorded)


def test_a_shard_that_only_tensor_cache_names_is_refused(built):
    shutil.copy(built.bundle / "params_shard_0.bin", built.bundle / "stray.bin")
    path = built.bundle / "tensor-cache.json"
    path.write_text(path.read_text().replace("params_shard_0.bin", "stray.bin"))
    built.sign()
    text = refusal(built)
    assert "stray.bin' is not among the files of the bundle" in text
    with pytest.raises(BundleError, match="does not list it"):
        manifest.read(built.bundle).folder.read("stray.bin")


def test_a_file_is_held_against_the_list_when_it_is_read_not_before(built):
    bundle = manifest.read(built.bundle)
    assert manifest.check(bundle) == []
    for name in ("model.so", "params_shard_0.bin"):  # in the order of loading: one that is loaded must not change
        path = built.bundle / name
        content = path.read_bytes()
        path.write_bytes(flipped(content, 8 * len(content) - 1))
        with pytest.raises(BundleError, match=f"{name}: its SHA-256 is not the one"):
            Session(bundle)
        path.write_bytes(content)


# What bundle.json says of the library


@pytest.mark.parametrize(
    ("key", "value"),
    [("family", "llama"), ("vocab_size", 500), ("scheme", "q4f32_1"), ("kv_dtype", "float16"), ("page_size", 32),
     ("context_window", 4096), ("prefill_chunk", 513), ("max_batch", 99), ("layout", "nk"), ("sep_embed", False),
     ("num_layers", 3), ("state", "rnn")],
)  # fmt: skip
def test_a_model_that_is_not_the_librarys_is_refused(built, key, value):
    before = manifest.read(built.bundle).model[key]
    built.edit(lambda document: document["model"].update({key: value}))
    text = refusal(built)
    assert f"{key} is {value!r} and the library was built for {before!r}" in text


def test_a_context_may_be_shorter_than_the_library_was_built_for(recorded, built):
    built.edit(lambda document: document["model"].update(context_window=64, prefill_chunk=32, max_batch=1))
    assert said(built) == said(recorded)


# Damage


@pytest.mark.parametrize("name", ["bundle.json", "tensor-cache.json", "tokenizer_info.json", "model.so", "README.md"])
def test_any_bit_may_flip(recorded, built, name):
    """Found before anything is loaded; in the name of bundle.json's seal it changes nothing that is read."""
    sound, rng, path = manifest.read(built.bundle), Random(name), built.bundle / name  # noqa: S311
    content = path.read_bytes()
    size = 8 * len(content)
    for bit in [0, size - 1, *rng.sample(range(size), 30)]:
        path.write_bytes(flipped(content, bit))
        try:
            found = manifest.read(built.bundle)
        except BundleError as error:
            assert name == "bundle.json", error.problems  # noqa: PT017
            continue
        assert found == sound, (name, bit)
        assert len(manifest.check(found, run=False)) == (name != "bundle.json"), (name, bit)


def test_what_is_short_or_gone_or_not_to_be_read_or_no_file_is_named(built):
    for path in [path for path in built.bundle.iterdir() if path.name != "bundle.json"]:
        content = path.read_bytes()
        for damage, word in damages(path):
            path.unlink()
            damage()
            text = refusal(built)
            assert f"{path.name}: " in text, (word, text)
            assert word in text, (path.name, text)
            (path.rmdir if path.is_dir() else lambda path=path: path.unlink(missing_ok=True))()
            path.write_bytes(content)
    assert said(built)[0] == 0


def damages(path: Path) -> Iterator[tuple[Callable[[], Any], str]]:
    content = path.read_bytes()
    yield lambda: None, "missing"
    yield lambda: path.write_bytes(content[:-1]), "bytes, not the"
    yield lambda: path.write_bytes(b""), "bytes, not the"
    yield lambda: os.mkfifo(path), "no regular file"
    yield path.mkdir, "no regular file"
    yield lambda: path.symlink_to("/dev/zero"), "leaves the bundle"
    yield lambda: path.symlink_to("../params.json"), "leaves the bundle"
    yield lambda: path.symlink_to(path.name), "copy the bundle again"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_bundle_json_that_is_no_file(built, make):
    path = built.bundle / "bundle.json"
    path.unlink()
    make(path)
    assert "no bundle.json there" in refusal(built)


# Strange documents


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a document, of lists the first two."""
    yield at
    items = (
        document.items()
        if isinstance(document, dict)
        else enumerate(document[:2])
        if isinstance(document, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*at, key))


def replaced(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    document = copy.copy(document)
    document[at[0]] = replaced(document[at[0]], at[1:], value)
    return document


def test_any_value_of_bundle_json_may_be_of_any_kind(built):
    """With its seal removed, so that the values themselves are looked at."""
    for name in ("model.so", "params_shard_0.bin"):
        (built.bundle / name).write_bytes(b"x")  # nothing is loaded, and less is digested
    built.sign()
    path = built.bundle / "bundle.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    library, cases = json.loads((built.folder / "compile" / "metadata.json").read_text()), 0
    for at in places(document):
        for odd in ODD:
            path.write_text(json.dumps(replaced(document, at, odd)))
            cases += 1
            try:
                found = manifest.read(built.bundle)
                manifest.check(found)
                manifest.disagreements(found, library)
            except BundleError as error:
                assert all(len(problem) < 1000 for problem in error.problems)  # noqa: PT017
    assert cases > 500


def test_any_value_of_tensor_cache_json_may_be_of_any_kind(recorded, built):
    path, sound = built.bundle / "tensor-cache.json", tensor_cache.records(Folder(recorded.bundle))
    document = json.loads(path.read_text())
    for at in places(document):
        for odd in ODD:
            path.write_text(json.dumps(replaced(document, at, odd)))
            try:
                found = tensor_cache.records(Folder(built.bundle))
            except BundleError as error:
                assert all(len(problem) < 1000 for problem in error.problems)  # noqa: PT017
            else:  # a name, or what nobody reads
                assert {str(record.shape) for record in found.values()} <= {str(r.shape) for r in sound.values()}, at


@pytest.mark.parametrize("name", ["bundle.json", "tensor-cache.json", "tokenizer_info.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' * 50_000, b'{"a": NaN}', b'{"a": 1, "a": 2}', b"9" * 5000,
     b'{"a": "\\ud800"}', b"null", b"{", b'"records"', b'{"records": [[]]}', b'{"records": {}}'],
)  # fmt: skip
def test_a_document_that_is_none(built, name, content):
    (built.bundle / name).write_bytes(content)
    if name != "bundle.json":
        document = json.loads((built.bundle / "bundle.json").read_text())
        document["files"] = assemble.files(built.bundle)
        del document["sha256"], document["files"]["bundle.json"]
        write_json(built.bundle / "bundle.json", document)
    text = refusal(built)
    assert name in text or "tokenizer cannot be read" in text


def test_a_bundle_json_that_was_changed_says_how_to_keep_the_change(built):
    path = built.bundle / "bundle.json"
    document = json.loads(path.read_text())
    document["sampling"]["top_p"] = 0.1
    path.write_text(json.dumps(document))
    assert "remove 'sha256', which seals the rest" in refusal(built)
    del document["sha256"]
    path.write_text(json.dumps(document))
    assert said(built)[0] == 0


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_a_shard_whose_name_no_file_can_have_is_refused_in_a_folder_without_a_list(tmp_path: Path, name: str) -> None:
    entry = {"name": "a", "shape": [4], "dtype": "uint8", "format": "raw", "nbytes": 4, "byteOffset": 0}
    document = {"records": [{"dataPath": name, "format": "raw-shard", "nbytes": 4, "records": [entry]}]}
    (tmp_path / tensor_cache.FILE).write_text(json.dumps(document))
    with pytest.raises(BundleError, match="not among the files"):
        tensor_cache.records(Folder(tmp_path))
