"""``pipeline compare REF... [FILE...]``: compares results of one kind, from one pipeline or several, side by side."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagegraph.api import Pipeline
from stagegraph.cli.common import DEFAULT_FILE, add_json, add_set, print_json, shown
from stagegraph.cli.layout import markdown, terminal_width
from stagegraph.cli.pager import page
from stagegraph.cli.streams import hanging
from stagegraph.errors import PlanError
from stagegraph.query.artifact import unbuilt
from stagegraph.query.compare import comparison, documents

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stagegraph.query.artifact import Artifact
    from stagegraph.stage import JsonObject

EXAMPLE = "pipeline compare 'bundle.*' bundle.llvm@~1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "references",
        nargs="+",
        metavar="REF",
        help="NODE, NODE@RUN or a digest; and the pipeline files in which to look (*.yaml; default: ./pipeline.yaml)",
    )
    add_set(parser)
    parser.add_argument("--plot", metavar="FILE", help="draw a picture of them into FILE (.png, .svg) as well")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    files = [word for word in args.references if word.endswith((".yaml", ".yml"))]
    references = [word for word in args.references if word not in files]
    if not references:
        raise PlanError("name what to compare, such as 'NODE[*]', beside the pipeline files")
    with contextlib.ExitStack() as stack:
        pipelines = [stack.enter_context(Pipeline(file, args.overrides)) for file in files or [DEFAULT_FILE]]
        found = _found(pipelines, references)
        how = comparison({label: artifact for label, (_, artifact) in found.items()})
        module = importlib.import_module(how.module)
        rows = {label: module.row(documents(pipeline, artifact, how)) for label, (pipeline, artifact) in found.items()}
    if args.plot:
        _draw(module, rows, Path(args.plot))
    if args.json:
        print_json(rows)
    else:
        page(markdown(module.page(rows), terminal_width()))
        if args.plot:
            print(f"drew {shown(Path(args.plot))}")
    return 0


def _found(pipelines: list[Pipeline], references: list[str]) -> dict[str, tuple[Pipeline, Artifact]]:
    """Return label -> the pipeline of a result and the result; each reference means something in one of the files.

    What else it means and has no result is said on stderr.
    """
    found: dict[str, tuple[Pipeline, Artifact]] = {}
    files = [pipeline.dag.pipeline.file for pipeline in pipelines]
    distinct = len({file.stem for file in files}) == len(files)
    for reference in references:
        before, missing = len(found), []
        for pipeline, path in zip(pipelines, files, strict=True):
            file = f"{path.stem if distinct else shown(path)}: " if len(files) > 1 else ""
            try:
                artifacts = pipeline.artifacts(reference)
            except PlanError as error:
                missing += [f"{file}{problem}" for problem in error.problems]
                continue
            found.update({f"{file}{artifact.label}": (pipeline, artifact) for artifact in artifacts})
            missing += [f"{file}{text}" for text in unbuilt(pipeline, reference, artifacts)]
        if len(found) == before and missing:
            raise PlanError(*missing)
        for text in missing:
            print(f"note: {hanging(text)}", file=sys.stderr)
    return found


def _draw(module: Any, rows: Mapping[str, JsonObject], path: Path) -> None:
    try:
        module.draw(rows, path)
    except (ValueError, OSError) as error:
        raise PlanError(str(error)) from None
