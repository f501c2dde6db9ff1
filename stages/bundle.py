"""bundle: library, weights, tokenizer and configuration in the one directory that is deployed."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagegraph.stage import Context, In, JsonObject, Out, Stage, StageError, param

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.documents.bundle import BundleParts


class Bundle(Stage):
    """Assemble a bundle, whose every byte is determined by its inputs, and which lists its own requirements."""

    id = "bundle"

    @dataclass(frozen=True)
    class Params:
        """Parameters of bundle."""

        target: str = param("what the bundle is built for", choices="stages.targets.table:TARGETS")
        name: str = param("name of the bundle, or a checkpoint's path, whose folder names it", default="model")

    inputs = {
        "library": In("compile", "library", "the compiled library"),
        "metadata": In("compile", "metadata", "what the library was built for and with"),
        "weights": In("quantize", "weights", "the weights in TVM's tensor-cache format"),
        "tokenizer": In("tokenizer-bundle", "tokenizer", "the tokenizer's files"),
        "config": In("config-parse", "config", "the model's config"),
        "generation": In("config-parse", "generation", "stop ids and sampling defaults"),
    }
    outputs = {"bundle": Out("bundle", "the deployable directory; docs/deploy.md says how to run it")}

    def resolve(self, params: Params) -> Params:
        """Reduce a path to the name that its folder, or its repository in a hub cache, has."""
        return dataclasses.replace(params, name=_name(params.name))

    def rows(self, params: Params, facts: JsonObject) -> dict[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the target: the card says what it needs where the bundle runs."""
        return {"stages.targets.table:TARGETS": params.target}

    def run(self, ctx: Context) -> None:
        """Copy the files, write the configuration files and the card, digest everything into bundle.json."""
        from stages.documents.files import write_json
        from stages.packing import assemble, documents, mlc
        from stages.targets.table import TARGETS

        names = {"tokenizer_info": "tokenizer_info", "tokenizer_config": "tokenizer_config", "tables": "tokenizer"}
        paths = {key: ctx.input("tokenizer") / f"{name}.json" for key, name in names.items()}
        texts = {key: json.loads(path.read_text("utf-8")) for key, path in paths.items() if path.exists()}
        found: BundleParts = {
            "metadata": json.loads(ctx.input("metadata").read_bytes()),
            "config": json.loads(ctx.input("config").read_bytes()),
            "generation": json.loads(ctx.input("generation").read_bytes()),
            "tokenizer_info": texts["tokenizer_info"],
            "tensors": json.loads((ctx.input("weights") / "tensor-cache.json").read_bytes()),
        }
        problems = documents.disagreements(ctx.params.target, found)
        try:
            machine = assemble.machine(ctx.input("library"))
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise StageError(*problems)

        root = ctx.out / "bundle"
        root.mkdir()
        sources = _sources(ctx)
        total = sum(path.stat().st_size for path in sources.values())
        done = 0
        for name, path in sources.items():
            assemble.copy(path, root / name)
            done += path.stat().st_size
            ctx.progress(done, total, "B")
        conversation, origin = mlc.conversation(texts["tokenizer_config"], texts["tokenizer_info"], texts.get("tables"))
        files = sorted(path.name for path in ctx.input("tokenizer").iterdir())
        chat = documents.chat_config(found, texts.get("tables", {}), files, conversation)
        write_json(root / "mlc-chat-config.json", chat)
        card = documents.card(ctx.params.name, ctx.params.target, TARGETS[ctx.params.target].needs, found)
        (root / "README.md").write_text(card, "utf-8")
        name, target = ctx.params.name, ctx.params.target
        manifest = documents.manifest(name, target, machine, found, assemble.files(root))
        write_json(root / "bundle.json", manifest)
        ctx.view("card", card)
        ctx.view("mlc", f"mlc-chat-config.json: conv_template is {origin}\n")
        ctx.summary(f"{len(manifest['files'])} files, {total / 1e6:.1f} MB")


def _name(text: str) -> str:
    """Return ``Qwen3-0.6B`` of that name, of ``/models/Qwen3-0.6B``, its snapshot in a hub cache and its URL."""
    from pathlib import Path

    if "/" not in text and text not in {".", ".."}:
        return text
    if "://" in text:  # without what pins it
        text = text.partition("#")[0].partition("@")[0]
    path = Path.cwd() / text
    if path.parent.name == "snapshots":
        path = path.parent.parent
    return path.name.rpartition("--")[2] or "model"


def _sources(ctx: Context) -> dict[str, Path]:
    """Return what is copied: name in the bundle -> where it is."""
    weights, tokenizer = ctx.input("weights"), ctx.input("tokenizer")
    found: dict[str, Path] = {"model.so": ctx.input("library")}
    for directory in (weights, tokenizer):
        found |= {path.name: path for path in sorted(directory.iterdir())}
    return found
