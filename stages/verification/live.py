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
from stages.verification import weights
from stages.verification.reference import Continuation, Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence


class LiveError(RuntimeError):
    """The reference could not be computed; ``problems`` says why."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Request:
    """What to compute.

    ``bundle``, ``params`` and ``config`` are where the weights and their description are. ``prompt`` is continued
    greedily by ``steps`` ids; each of ``prompts`` (text -> ids) by up to ``length`` ids, until one of ``stop``. Ids
    from ``active_vocab_size`` on are never picked.
    """

    bundle: Path
    params: Path
    config: Path
    prompt: Sequence[int]
    steps: int
    prompts: Mapping[str, Sequence[int]]
    length: int
    active_vocab_size: int
    stop: Collection[int]


def reference(request: Request, prompt: str, decode: Callable[[Sequence[int]], str]) -> Reference:
    """Compute ``request`` in a process of its own; ``decode`` makes text of ids. :class:`LiveError` if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "result.npz"
        asked.write_text(json.dumps(asdict(request), default=str), "utf-8")
        # An empty entry would be the working directory, which -P keeps out: nothing that lies there may be imported.
        inherited = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join([str(Path(__file__).parents[2]), *inherited])
        done = subprocess.run(
            [sys.executable, "-P", "-m", "stages.verification.live", asked, answered],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            last = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise LiveError(
                f"the live reference ended with {how}: {last}; set reference to recorded or none to go without it"
            )
        with np.load(answered) as result:
            tokens, logits = result["tokens"].tolist(), result["logits"]
            continued = [result[f"continuation_{i}"].tolist() for i in range(len(request.prompts))]
            origin = f"{result['origin']} in float32 on the bundle's own weights"
    continuations = [
        Continuation(text, prompt_ids, ids, decode(ids))
        for (text, prompt_ids), ids in zip(request.prompts.items(), continued, strict=True)
    ]
    return Reference(origin, prompt, len(request.prompt), tokens, logits, continuations)


def compute(request: Request) -> dict[str, Any]:
    """Return ``origin``, ``tokens`` [n], ``logits`` float32 [n, V] and ``continuation_0`` ... of ``request``."""
    import torch
    import transformers

    model = _model(request)
    tokens = [*request.prompt, *_greedy(model, request.prompt, request.steps, request.active_vocab_size, ())]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
    origin = f"transformers {transformers.__version__} and torch {torch.__version__}"
    result: dict[str, Any] = {"origin": origin, "tokens": np.array(tokens, np.int64), "logits": logits}
    for i, prompt in enumerate(request.prompts.values()):
        ids = _greedy(model, prompt, request.length, request.active_vocab_size, request.stop)
        result[f"continuation_{i}"] = np.array(ids, np.int64)
    return result


def _model(request: Request) -> Any:
    import torch
    import transformers

    registry = json.loads(Path(request.params).read_text("utf-8"))
    described = json.loads(Path(request.config).read_text("utf-8"))
    records = tensor_cache.records(Path(request.bundle))
    tensors: dict[str, np.ndarray] = {}
    for tensor in weights.held(registry, records, SCHEMES[registry["scheme"]]):
        tensors[tensor.name] = tensor.values()
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


def _greedy(model: Any, prompt: Sequence[int], length: int, active: int, stop: Collection[int]) -> list[int]:
    import torch

    ids: list[int] = []
    cache, feed = None, list(prompt)
    argument = "state" if model.config.model_type == "rwkv" else "past_key_values"
    with torch.inference_mode():
        while len(ids) < length:
            output = model(torch.tensor([feed]), use_cache=True, **{argument: cache})
            token = int(output.logits[0, -1, :active].argmax())
            if token in stop:
                break
            ids.append(token)
            cache, feed = output[argument], [token]
    return ids


def main(request_path: str, result_path: str) -> None:
    """Compute the request in the one file into the other."""
    request = Request(**json.loads(Path(request_path).read_text("utf-8")))
    np.savez(result_path, **compute(request))


if __name__ == "__main__":
    main(*sys.argv[1:])
