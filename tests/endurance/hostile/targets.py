"""What reads a stranger's file, one row each: how such files are drawn, and the call that must bear them."""

# ruff: noqa: E501 - tables of files
from __future__ import annotations

import contextlib
import functools
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from stagegraph import Pipeline
from stagegraph.cli.streams import hanging
from stagegraph.errors import PipelineError
from tests.endurance.hostile import templates
from tests.endurance.hostile.gguf_documents import put_together, taken_apart
from tests.endurance.hostile.mutants import ODD_TEXTS, documents, pieces, texts, trees
from tests.stages.test_config_fuzz import BASES, GENERATION, SIZES
from tests.support import tokenizer_folders
from tests.support.checkpoints import write_hollow
from tests.support.local_context import run_stage
from tests.support.tokenizer_folders import SIZE

Files = Mapping[str, bytes]
PIPELINE = """\
version: 1
name: ${vars.model}-1
extends: base.yaml
vars: &vars
  model: tiny
  targets: [llvm, cuda]
  also: [1, 2]
stages:
  config-parse:
    uses: config-parse
    with: {checkpoint: "${env.HOME}/${vars.model}", context_window: 0x40}
    resources: {memory: 2 GiB, exclusive: false}
    timeout: 10m
  param-register: {uses: param-register, needs: [config-parse], foreach: {target: "${vars.targets}"}, with: {target: "${each.target}", scheme: q4f16_1}}
  graph-build: &g
    uses: graph-build
    needs: [param-register]
    foreach: {target: [llvm], function: [embed, prefill, decode]}
    with: {target: "${each.target}", function: "${each.function}"}
  again: *g
"""
BASE = "version: 1\nname: base\nvars: {scheme: q4f32_1}\nstages: {tokenizer-bundle: {uses: tokenizer-bundle, needs: [config-parse], with: {checkpoint: x}}}\n"
SETTINGS = ("vars.model=x", "vars.targets=[llvm]", "vars.model=${vars.scheme}", "vars.x: {a: *b}", "vars.model")
FAMILIES = tuple({"model_type": family, **SIZES, **base} for family, base in BASES.items())
LLAMA = FAMILIES[0]


@dataclass(frozen=True)
class Target:
    """``files`` draws the content of a folder, ``run`` reads the folder and returns its problems."""

    files: st.SearchStrategy[Files]
    run: Callable[[Path], list[str]]


def refused(call: Callable[[], Any]) -> list[str]:
    """Return the problems that ``call`` is refused with, none where it is not."""
    from stages.runtime.errors import BundleError, RequestError

    try:
        call()
    except (PipelineError, BundleError) as error:
        return [hanging(problem) for problem in error.problems]
    except RequestError as error:
        return [hanging(str(error))]
    return []


def one(name: str, data: st.SearchStrategy[bytes]) -> st.SearchStrategy[Files]:
    """Draw a folder of one file."""
    return data.map(lambda value: {name: value})


# Pipeline files and --set


def read_pipeline(folder: Path) -> list[str]:
    from stagegraph.spec.load import load

    overrides = json.loads((folder / "set.json").read_text()) if (folder / "set.json").exists() else []
    return refused(lambda: load(folder / "p.yaml", overrides, {"HOME": str(folder)}))


def _settings(words: list[str]) -> Files:
    text = PIPELINE.replace("extends: base.yaml\n", "")
    return {"p.yaml": text.encode(), "set.json": json.dumps(words).encode()}


def _word(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# References to results

LAB = """\
version: 1
name: lab
stages:
  words: {uses: shell, with: {cmd: "printf words > ${out.text}", outputs: {text: deep/words.txt}}}
  cut:
    uses: shell
    foreach: {which: [a, b+c]}
    with: {cmd: "printf '${each.which}' > ${out.cut}", outputs: {cut: cut.txt}}
"""
# What a reference is put together of, each part at times an odd one, or missing.
RESULTS = ("words", "cut[a]", "cut[which=b+c]", "cut.a", "cut[b+c]", "cut", "cut*", "*", "KEY", "")
RUNS = ("", "", "", "@~0", "@~1", "@~2", "@2026-11-30")
FILES = ("", "", ":deep/words.txt", ":deep", ":text", ":cut.txt", ":cut")


@functools.cache
def _lab() -> Path:
    """A store of small results, one of an earlier run among them."""
    folder = Path(_kept().name) / "lab"
    folder.mkdir()
    for text in (LAB.replace("words >", "word >"), LAB):
        (folder / "pipeline.yaml").write_text(text)
        with Pipeline(folder / "pipeline.yaml") as pipeline:
            assert pipeline.run().ok
    return folder


@st.composite
def reference_words(draw: st.DrawFn) -> str:
    """Draw a word for results: parts that fit or do not, at times with wrong bytes."""
    word = "".join(draw(st.sampled_from(parts)) for parts in (RESULTS, RUNS, FILES))
    shape = draw(st.sampled_from(("whole", "whole", "whole", "bytes", "odd")))
    if shape == "bytes" and word:
        return _word(draw(pieces(word.encode(), most=2)))
    return draw(st.sampled_from(ODD_TEXTS)) if shape == "odd" else word


def _references(words: list[str]) -> Files:
    (key, *_) = sorted(path.name for path in (_lab() / "artifacts/.stagegraph/records").glob("*/*"))
    return {"words.json": json.dumps([word.replace("KEY", key) for word in words]).encode()}


def find_results(folder: Path) -> list[str]:
    """Ask for what a word of the command line may name: results, two that are compared, nodes of a plan."""
    a, b = json.loads((folder / "words.json").read_text())
    shutil.copytree(_lab(), folder / "lab")
    with Pipeline(folder / "lab" / "pipeline.yaml") as pipeline:
        asked: tuple[Callable[[], Any], ...] = (
            lambda: [artifact.read_text(name) for artifact in pipeline.artifacts(a) for name in artifact.files],
            lambda: pipeline.diff(a, b),
            lambda: pipeline.lineage(a),
            lambda: pipeline.explain(a),
            lambda: pipeline.plan(pipeline.select(stage=[a, b])),
        )
        return [problem for call in asked for problem in refused(call)]


# Checkpoints


@functools.cache
def _hollow(number: int) -> Path:
    return write_hollow(Path(_kept().name) / f"{number}", FAMILIES[number])


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hollow-")


def prepare() -> None:
    """Make in this process what every case has, before it is forked."""
    for number in range(len(FAMILIES)):
        _hollow(number)
    _payload()
    _gguf_document()
    _lab()
    for module in ("tokenizers", "stages.config_parse", "stages.models.matching", "stages.tokenizer_bundle"):
        importlib.import_module(module)


def _header() -> dict[str, Any]:
    data = (_hollow(0) / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    return {"__metadata__": {"format": "pt"}, **json.loads(data[8 : 8 + length])}


def parse_config(folder: Path) -> list[str]:
    from stages.config_parse import ConfigParse

    config = folder / "config.json"
    if not config.exists():
        config.write_text(json.dumps(LLAMA))
    if not list(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError):
            (folder / "model.safetensors").symlink_to(_hollow(_number(config)) / "model.safetensors")
    stage = ConfigParse()
    stage.rows(stage.Params(checkpoint=str(folder)), {})  # what planning reads
    return refused(lambda: run_stage(stage, folder / "out", {"checkpoint": str(folder)}))


def _number(config: Path) -> int:
    """Return the family whose weights fit a config: by its text, for it may be no JSON."""
    data = config.read_bytes()
    found = [i for i, family in enumerate(FAMILIES) if f'"{family["model_type"]}"'.encode() in data]
    return found[0] if found else 0


@st.composite
def headers(draw: st.DrawFn) -> Files:
    """Draw a safetensors file: a mutated table, at times a wrong length, at times a wrong payload."""
    table = draw(documents(_header()))
    length = draw(st.sampled_from((len(table),) * 8 + (0, len(table) + 1, 2**31, 2**63, 2**64 - 1)))
    payload = bytes(draw(st.sampled_from((_payload(),) * 8 + (0, _payload() - 1, _payload() + 1))))
    return {"model.safetensors": length.to_bytes(8, "little") + table + payload}


@functools.cache
def _payload() -> int:
    data = (_hollow(0) / "model.safetensors").stat().st_size
    return data - 8 - int.from_bytes((_hollow(0) / "model.safetensors").read_bytes()[:8], "little")


@functools.cache
def _sharded() -> tuple[dict[str, Any], dict[str, bytes]]:
    """An index and its two shards."""
    header = {name: entry for name, entry in _header().items() if name != "__metadata__"}
    names, files, weight_map = list(header), {}, {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file, table, end = f"model-{number:05d}-of-00002.safetensors", {}, 0
        for name in part:
            size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            table[name] = {**header[name], "data_offsets": [end, end + size]}
            end += size
            weight_map[name] = file
        data = json.dumps(table).encode()
        files[file] = len(data).to_bytes(8, "little") + data + bytes(end)
    return {"metadata": {"total_size": 1}, "weight_map": weight_map}, files


@functools.cache
def _gguf_document() -> tuple[Any, bytes]:
    return taken_apart(_gguf())


@functools.cache
def _gguf() -> bytes:
    """A small model's file, written by another process: what writes it takes more memory than a case may."""
    path = Path(_kept().name) / "model.gguf"
    write = (
        f"from pathlib import Path; from tests.support.gguf_models import write; write(Path({str(path)!r}), 'llama')"
    )
    subprocess.run([sys.executable, "-c", write], check=True, cwd=Path(__file__).parents[3])
    return path.read_bytes()


@st.composite
def gguf_files(draw: st.DrawFn) -> Files:
    """Draw a GGUF file that is wrong by its tree, at times in its bytes, or in length."""
    document, rest = _gguf_document()
    data = put_together(draw(trees(document)), rest)
    shape = draw(st.sampled_from(("tree",) * 8 + ("bytes", "short")))
    if shape == "bytes":
        head = len(data) - len(rest)
        data = draw(pieces(data[: draw(st.sampled_from((64, 1000, head)))])) + data[head:]
    return {"model.gguf": data[: -draw(st.integers(1, len(rest)))] if shape == "short" else data}


def parse_gguf(folder: Path) -> list[str]:
    from stages.config_parse import ConfigParse

    stage, path = ConfigParse(), str(folder / "model.gguf")
    return refused(
        lambda: (stage.rows(stage.Params(checkpoint=path), {}), run_stage(stage, folder / "out", {"checkpoint": path}))
    )


# Tokenizers


def bundle_tokenizer(folder: Path) -> list[str]:
    """Run tokenizer-bundle, its proof over a few of its texts: all of them take seconds and are no stranger's."""
    from stages.tokenizer_bundle import TokenizerBundle
    from stages.tokenizers.proof import equality as proof

    if not hasattr(proof, "all_texts_for"):
        proof.all_texts_for = proof.texts_for
        proof.texts_for = lambda subject: proof.all_texts_for(subject)[:60]
    family, eos = json.loads((folder / "family.json").read_text())
    (folder / "family.json").unlink()
    inputs = tokenizer_folders.write_facts(folder / "facts", family, eos)
    stage = TokenizerBundle()
    said = refused(lambda: stage.rows(stage.resolve(stage.Params(checkpoint=str(folder))), {"family": family}))
    return said or refused(lambda: run_stage(stage, folder / "out", {"checkpoint": str(folder)}, inputs))


def folders(*names: str, change: tuple[str, ...], also: Mapping[str, Any] | None = None) -> st.SearchStrategy[Files]:
    """Draw one of the tokenizer folders that build, with one of the files ``change`` mutated."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Files:
        files, family, eos = tokenizer_folders.FOLDERS[draw(st.sampled_from(names))]
        contents = {**(also or {}), **files}
        name = draw(st.sampled_from([name for name in contents if name in change]))
        value = contents[name]
        mutant = draw(pieces(value) if isinstance(value, bytes) else documents(value))
        plain = {n: v if isinstance(v, bytes) else json.dumps(v).encode() for n, v in contents.items()}
        return {**plain, name: mutant, "family.json": json.dumps([family, eos]).encode()}

    return drawn()


SETTINGS_FILES: dict[str, Any] = {
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False},
        "pad_token": None,
        "model_max_length": 1e30,
        "added_tokens_decoder": {str(SIZE): {"content": "<|endoftext|>", "special": True}},
        "additional_special_tokens": ["<|endoftext|>"],
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        "clean_up_tokenization_spaces": False,
        "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]},
    },
    "special_tokens_map.json": {"bos_token": "<|endoftext|>", "additional_special_tokens": ["<|padding|>"]},
    "added_tokens.json": {"<|extra|>": SIZE + 20},
}

# Templates


def render_template(folder: Path) -> list[str]:
    from stages.runtime.render import render_all
    from stages.tokenizers.proof.chats import conversations

    template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")
    variables = [{"messages": messages, "bos_token": "<s>"} for messages, _ in conversations(["<|x|>"])[:2]]
    found: list[str] = []

    def render() -> None:
        found.extend(str(text) for text in render_all(template, variables).texts if not isinstance(text, str))

    return refused(render) or found


# Bundles


@functools.cache
def _cache() -> tuple[dict[str, Any], bytes]:
    data = np.arange(64, dtype=np.float32).tobytes()
    record = {"name": "a", "shape": [4, 8], "dtype": "float32", "format": "raw", "nbytes": 128, "byteOffset": 0}
    other = {"name": "b", "shape": [64], "dtype": "float32", "format": "f32-to-bf16", "nbytes": 128, "byteOffset": 128}
    shard = {"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": 256, "records": [record, other]}
    return {"metadata": {"ParamSize": 2}, "records": [{**shard, "md5sum": "0"}]}, data


def read_cache(folder: Path) -> list[str]:
    from stages.runtime import tensor_cache
    from stages.runtime.folder import Folder

    return refused(lambda: [record.load().sum() for record in tensor_cache.records(Folder(folder)).values()])


MANIFEST: dict[str, Any] = {
    "schema": 1, "name": "tiny", "target": "llvm", "machine": "x86_64", "tvm": {"apache-tvm": "0.27.0.post1"},
    "cpu": {"mcpu": "x86-64", "features": ["sse2"]},
    "model": {
        "context_window": 64, "prefill_chunk": 16, "max_batch": 1, "vocab_size": 64, "hidden_size": 64, "page_size": 16,
        "state": "kv", "sep_embed": True, "scheme": "q0f32", "compute_dtype": "float32",
    },
    "device_code": [{"kind": "ptx", "arch": 90}],
    "sampling": {"temperature": 0.7, "do_sample": True},
    "files": {
        name: {"sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "size": 0}
        for name in ("model.so", "tensor-cache.json", "tokenizer_info.json", "tokenizer.json")
    },
}  # fmt: skip


def read_manifest(folder: Path) -> list[str]:
    from stages.runtime import manifest

    found: list[str] = []

    def read() -> None:
        bundle = manifest.read(folder)
        found.extend([*manifest.check(bundle), *manifest.capability_problems(bundle, 90)])

    return refused(read) or found


TARGETS: dict[str, Target] = {
    "pipeline": Target(
        st.fixed_dictionaries({"p.yaml": texts(PIPELINE), "base.yaml": texts(BASE) | st.just(BASE.encode())}),
        read_pipeline,
    ),
    "settings": Target(
        st.lists(pieces(*(s.encode() for s in SETTINGS)).map(_word) | st.sampled_from(ODD_TEXTS), min_size=1, max_size=3)
        .map(_settings),
        read_pipeline,
    ),
    "reference": Target(st.lists(reference_words(), min_size=2, max_size=2).map(_references), find_results),
    "config.json": Target(one("config.json", documents(*FAMILIES)), parse_config),
    "generation_config.json": Target(one("generation_config.json", documents(GENERATION)), parse_config),
    "safetensors": Target(st.deferred(headers), parse_config),
    "index": Target(
        st.deferred(lambda: documents(_sharded()[0]).map(lambda d: {**_sharded()[1], "model.safetensors.index.json": d})),
        parse_config,
    ),
    "gguf": Target(st.deferred(gguf_files), parse_gguf),
    "tokenizer.json": Target(
        folders("neox", "llama3 tables", "metaspace", "metaspace first", "qwen2 vocab",
                change=("tokenizer.json", "vocab.json", "merges.txt")),
        bundle_tokenizer,
    ),
    "tokenizer_config.json": Target(
        folders("neox", "llama3 model", "sentencepiece", "tekken", "rwkv world", "qwen2 vocab",
                change=tuple(SETTINGS_FILES), also=SETTINGS_FILES),
        bundle_tokenizer,
    ),
    "sentencepiece": Target(folders("sentencepiece", "sentencepiece modern", change=("tokenizer.model",)), bundle_tokenizer),
    "tiktoken": Target(folders("llama3 model", change=("tokenizer.model",)), bundle_tokenizer),
    "tekken.json": Target(folders("tekken", change=("tekken.json",)), bundle_tokenizer),
    "rwkv vocab": Target(folders("rwkv world", change=("rwkv_vocab_v20230424.txt",)), bundle_tokenizer),
    "template": Target(one("chat_template.jinja", templates.drawn()), render_template),
    "tensor-cache.json": Target(
        documents(_cache()[0]).map(lambda d: {"tensor-cache.json": d, "params_shard_0.bin": _cache()[1]}), read_cache
    ),
    "bundle.json": Target(
        documents(MANIFEST).map(lambda d: {"bundle.json": d, **dict.fromkeys(MANIFEST["files"], b"")}), read_manifest
    ),
}  # fmt: skip
