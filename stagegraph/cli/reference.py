"""Resolves an argument that is either a path or a reference to a node's result into a path."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from stagegraph.api import Pipeline
from stagegraph.cli.common import DEFAULT_FILE
from stagegraph.errors import PlanError


@contextlib.contextmanager
def folder(args: argparse.Namespace, value: str | Path) -> Iterator[Path]:
    """Yield ``value`` if that exists or can only be a path, else the folder or file that it means as a reference.

    A result that its node's directory does not show, such as that of an earlier run, is put into a directory of its
    own until the context ends.
    """
    name, value = str(value), Path(value)
    away = args.file == DEFAULT_FILE and not Path(DEFAULT_FILE).exists()
    if value.exists() or away or os.sep in name.partition(":")[0]:
        yield value
        return
    with contextlib.ExitStack() as stack:
        with Pipeline(args.file, args.overrides) as pipeline:
            try:
                artifact = pipeline.artifact(name)
            except PlanError as error:
                raise PlanError(*(f"{name}: no such file or directory, and {p}" for p in error.problems)) from None
            workspace, record = pipeline.workspace, artifact.record
            root = workspace.node_dir(pipeline.name, artifact.label)
            if not workspace.is_shown(pipeline.name, artifact.label, artifact.key, record):
                for file in artifact.files:
                    artifact.object(file)  # verifies it
                root = stack.enter_context(workspace.checkout(artifact.files))
        yield root / artifact.path


@contextlib.contextmanager
def folders(args: argparse.Namespace, values: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yield what each of ``values`` means; a pipeline file among them is the one that their nodes are of."""
    files = [str(value) for value in values if str(value).endswith((".yaml", ".yml"))]
    if files:
        args.file = files[-1]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(folder(args, value)) for value in values if str(value) not in files]
