"""Renders pages about a compiled library: its interface, kernels, memory and device code. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.sizes import DTYPE_BYTES
from stages.targets.table import TARGETS

if TYPE_CHECKING:
    from stages.codegen.library import Built
    from stages.documents.graph import Graph
    from stages.documents.library import Metadata

# What TVM's paged KV cache takes on its device for page tables, whatever its sizes, and once more on the host:
# committed lazily on a processor, which writes to next to nothing of it, fully on a GPU.
CACHE_TABLES = 128 * 2**20
# Columns of the table of device code, all but architecture and name: see stages.targets.cuda.cubin.Kernel.
FIGURES = ("registers", "shared", "stack", "spill_stores", "spill_loads", "matrix", "constant", "code")
STEPS_KEPT = 16  # of each sequence, in the state of a recurrent model: what the runtime's sessions ask for


def views(metadata: Metadata, graphs: Sequence[Graph], built: Sequence[Built]) -> dict[str, str]:
    """Return the pages of a library by name; ``graphs`` are the documents of the graphs it was made of."""
    return {
        "functions": _functions(graphs),
        "kernels": _kernels(built),
        **({"device": device(metadata["device_kernels"])} if metadata["device_kernels"] else {}),
        "memory": memory(metadata),
    }


def summary(metadata: Metadata, size: int) -> str:
    """Return the library of ``size`` bytes in a few words."""
    code = [f"{entry['kind']} {entry['arch']}" for entry in metadata["device_code"]]
    spilling = {name for found in metadata["device_kernels"].values() for name in found if _spilled(found[name])}
    flag = [f"{len(spilling)} spill"] if spilling else []
    return ", ".join([f"{size / 1e6:.2f} MB", f"{len(metadata['kernels'])} kernels", *flag, *code])


def device(kernels: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Render the kernels of each architecture (metadata's ``device_kernels``): those that spill most come first."""
    rows = [(name, arch, figures) for arch, found in kernels.items() for name, figures in found.items()]
    worst = {name: max(_spilled(found.get(name, {})) for found in kernels.values()) for name, _, _ in rows}
    lines = [
        " | ".join([f"| {name}", arch, *(f"{figures.get(field, 0):,}" for field in FIGURES), _flag(figures)])
        for name, arch, figures in sorted(rows, key=lambda row: (-worst[row[0]], row[0]))
    ]
    head = "| kernel | architecture | " + " | ".join(FIGURES).replace("_", " ") + " | |"
    return "\n".join([head, "|---|---|" + "---:|" * len(FIGURES) + "---|", *lines]) + "\n"


def _spilled(figures: Mapping[str, int]) -> int:
    return figures.get("spill_stores", 0) + figures.get("spill_loads", 0)


def _flag(figures: Mapping[str, int]) -> str:
    return "SPILLS |" if _spilled(figures) else "|"


def _kernels(built: Sequence[Built]) -> str:
    """List what took longest to compile first, now or when it was compiled."""
    rows = [
        f"| {kernel.name} | {kernel.seconds:.2f}{' (reused)' if kernel.reused else ''} | {kernel.code.size:,} "
        f"| {', '.join(kernel.callers)} |"
        for kernel in sorted(built, key=lambda kernel: (-kernel.seconds, kernel.name))
    ]
    return (
        "\n".join(["| kernel | seconds to compile | bytes of code | called by |", "|---|---:|---:|---|", *rows]) + "\n"
    )


def _functions(graphs: Sequence[Graph]) -> str:
    signatures = {name: signature for graph in graphs for name, signature in graph["functions"].items()}
    rows = [
        f"| {name} | {', '.join(f'{arg}: {ty}' for arg, ty in signature['inputs'])} | {signature['output']} |"
        for name, signature in sorted(signatures.items())
    ]
    return "\n".join(["| function | arguments | result |", "|---|---|---|", *rows]) + "\n"


def memory(metadata: Metadata) -> str:
    """Render the memory that the library needs on its device."""
    model, plan = metadata["model"], metadata["memory"]
    weights = sum(math.prod(param["shape"]) * DTYPE_BYTES[param["dtype"]] for param in metadata["params"])
    token, tokens = model["cache_bytes_per_token"], model["context_window"]
    tables = CACHE_TABLES if token and TARGETS[metadata["target"]["target"]].commits_memory else 0
    # Embeddings are there while the function that reads them runs.
    embeddings, others = plan.get("embed", 0), [size for name, size in plan.items() if name != "embed"]
    sequence = token * tokens + STEPS_KEPT * model["state_bytes"]
    fixed = weights + model["cache_workspace_bytes"] + tables + embeddings + max(others, default=0)
    rows = [
        ("weights", weights),
        ("KV cache, one token", token),
        (f"KV cache, one sequence of {tokens} tokens", token * tokens),
        (f"KV cache, workspace for chunks of {model['prefill_chunk']} tokens", model["cache_workspace_bytes"]),
        ("KV cache, tables of the runtime", tables),
        ("attention, each thread of the processor, at most, beside all below", model["attention_thread_bytes"]),
        (f"recurrent state, one sequence, {STEPS_KEPT} steps of it", STEPS_KEPT * model["state_bytes"]),
        *((f"results of {name}, at most", size) for name, size in sorted(plan.items())),
        ("in all for one sequence", fixed + sequence),
        (f"in all for {model['max_batch']} sequences", fixed + sequence * model["max_batch"]),
    ]
    lines = [f"| {what} | {size:,} |" for what, size in rows if size]
    return "\n".join(["| memory | bytes |", "|---|---:|", *lines]) + "\n"
