"""The reference computed now: transformers in float32 on the weights that the bundle holds.

torch never shares a process with the runtime that is being checked: :func:`reference` runs this module as
``python -m stages.verification.live REQUEST.json RESULT.npz``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.models import load_family
from stages.quantization.schemes import SCHEMES
from stages.runtime import tensor_cache
from stages.runtime.folder import Folder
from stages.verification import rounding, weights
from stages.verification.checks import difference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class LiveError(RuntimeError):
    """The reference could not be computed; ``problems`` says why."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Request:
    """What to compute.

    ``bundle``, ``params`` and ``config`` are where the weights and their description are. The logits after each of
    ``tokens`` are wanted, and how far the roundings of ``arithmetic`` move them (see
    :mod:`stages.verification.rounding`). Each of ``continued`` is a prompt and a continuation, as ids: wanted is the id
    that the reference picks greedily in place of each of the continuation's, among those below ``active_vocab_size``.
    """

    bundle: Path
    params: Path
    config: Path
    tokens: Sequence[int]
    arithmetic: str
    continued: Sequence[tuple[Sequence[int], Sequence[int]]]
    active_vocab_size: int


@dataclass(frozen=True)
class Answer:
    """What the reference gives for a :class:`Request`.

    ``logits`` float32 [n, V], of which row i follows ``tokens[: i + 1]``; ``spread``: how far rounding moved them, as
    :func:`~stages.verification.checks.difference`; ``picks``: for each continuation as many ids as it has.
    """

    origin: str
    logits: np.ndarray
    spread: float
    picks: Sequence[Sequence[int]]


def answer(request: Request, progress: Callable[[int, int, str], None]) -> Answer:
    """Compute ``request`` in a process of its own; :class:`LiveError` if that fails."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "errors").open("w+", errors="replace") as errors:
        asked, answered = Path(folder) / "request.json", Path(folder) / "result.npz"
        asked.write_text(json.dumps(asdict(request), default=str), "utf-8")
        # An empty entry would be the working directory, which -P keeps out: nothing that lies there may be imported.
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join([str(Path(__file__).parents[2]), *inherited])
        with subprocess.Popen(
            [sys.executable, "-P", "-m", "stages.verification.live", asked, answered],
            # Threads that wait for one another sleep: on a busy machine spinning takes the time of those waited for.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                _pass_on(line, progress)
        if process.returncode:
            code = process.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            errors.seek(0)
            last = "\n".join(errors.read().strip().splitlines()[-3:])
            raise LiveError(
                f"the live reference ended with {how}: {last}; set reference to recorded or none to go without it"
            )
        with np.load(answered) as result:
            picks = [result[f"picks_{i}"].tolist() for i in range(len(request.continued))]
            origin = f"{result['origin']} in float32 on the bundle's own weights"
            return Answer(origin, result["logits"], float(result["spread"]), picks)


_PROGRESS = "progress"  # how a line of the other process begins that says how far it is


def _pass_on(line: str, progress: Callable[[int, int, str], None]) -> None:
    word, *rest = line.rstrip("\n").split(" ", 3)
    if word == _PROGRESS and len(rest) == 3:
        progress(int(rest[0]), int(rest[1]), rest[2])


def _say(done: int, total: int, unit: str) -> None:
    sys.stdout.write(f"{_PROGRESS} {done} {total} {unit}\n")
    sys.stdout.flush()


def compute(request: Request, progress: Callable[[int, int, str], None] = lambda *_: None) -> dict[str, Any]:
    """Return the fields of :class:`Answer` for ``request``, each of ``picks`` as ``picks_0`` and so on."""
    import torch
    import transformers

    model = load(request, progress)
    passes = 2 + len(request.continued)

    def forward(ids: Sequence[int], number: int) -> np.ndarray:
        with torch.inference_mode():
            logits: np.ndarray = model(torch.tensor([[*ids]]), use_cache=False).logits[0].float().numpy()
        progress(number, passes, "passes of the reference")
        return logits

    logits = forward(request.tokens, 1)
    with rounding.rounded(model, request.arithmetic):
        spread = difference(forward(request.tokens, 2), logits)
    origin = f"transformers {transformers.__version__} and torch {torch.__version__}"
    result: dict[str, Any] = {"origin": origin, "logits": logits, "spread": spread}
    for i, (prompt, ids) in enumerate(request.continued):
        rows = forward([*prompt, *ids[:-1]], 3 + i)[len(prompt) - 1 :, : request.active_vocab_size]
        result[f"picks_{i}"] = rows.argmax(-1)
    return result


def load(request: Request, progress: Callable[[int, int, str], None] = lambda *_: None) -> Any:
    """Return transformers' model in float32 with the weights that the bundle holds, dequantized."""
    import torch
    import transformers

    registry = json.loads(Path(request.params).read_text("utf-8"))
    described = json.loads(Path(request.config).read_text("utf-8"))
    records = tensor_cache.records(Folder(Path(request.bundle)))  # verify has checked them
    tensors: dict[str, np.ndarray] = {}
    total = sum(len(entry["sources"]) for entry in registry["logical"])
    for done, tensor in enumerate(weights.held(registry, records, SCHEMES[registry["scheme"]]), start=1):
        tensors[tensor.name] = tensor.values()
        progress(done, total, "tensors of the reference")
    family = load_family(described["family"])
    name, keywords, state = family.to_reference(family.config(**described["config"]), tensors)
    cls = getattr(transformers, name)
    with _parameters_without_memory():
        model = cls(cls.config_class(**keywords, attn_implementation="eager")).eval()
    # assign: the arrays become the parameters, so that the weights are in memory once.
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True, assign=True)
    model.tie_weights()
    return model


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Let modules be made with parameters on the meta device; buffers, which no checkpoint holds, stay real."""
    import torch

    module_class: Any = torch.nn.Module
    register = module_class.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.to("meta")))

    module_class.register_parameter = on_meta
    try:
        yield
    finally:
        module_class.register_parameter = register


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = Request(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request, _say))


if __name__ == "__main__":
    main(*sys.argv[1:])
