"""Runs a model of transformers on weights that each module gets only while it computes, so that little memory is used.

Only a few of the largest matrices are in memory at a time. All tokens go through a module before the next one is looked
at, so that each is read once.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ROWS = 128  # whose logits are in memory at a time


def owns(module: Any) -> bool:
    """Say whether a module has parameters of its own, beside those of modules within it."""
    return next(module.parameters(recurse=False), None) is not None


def owners(model: Any) -> dict[str, Any]:
    """Return the modules that have parameters of their own, by name."""
    return {name: module for name, module in model.named_modules() if owns(module)}


@contextmanager
def lent(
    model: Any,
    values: Callable[[str, Any], Any],
    release: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Iterator[set[str]]:
    """Let each module have ``values`` of its parameters, by name, while it computes; ``release`` is called after it.

    Yields the names of the modules that have computed so far: a model may use the parameters of others by itself.
    """
    found, used = owners(model), set[str]()

    def before(place: str) -> Callable[[Any, Any], None]:
        def lend(module: Any, _inputs: Any) -> None:
            module.stored = [parameter.data for parameter in module.parameters(recurse=False)]
            for name, parameter in module.named_parameters(recurse=False):
                parameter.data = values(f"{place}.{name}" if place else name, parameter)

        return lend

    def after(place: str) -> Callable[[Any, Any, Any], None]:
        def take_back(module: Any, _inputs: Any, _outputs: Any) -> None:
            for parameter, stored in zip(module.parameters(recurse=False), module.stored, strict=True):
                parameter.data = stored
            del module.stored
            release()
            if place not in used:
                used.add(place)
                progress(len(used), len(found))

        return take_back

    hooks = [module.register_forward_pre_hook(before(name)) for name, module in found.items()]
    hooks += [module.register_forward_hook(after(name)) for name, module in found.items()]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, pieces: Sequence[Sequence[int]], places: Sequence[range]) -> Iterator[tuple[int, range, Any]]:
    """Yield (piece, some of its places, logits float32 [n, V] after them) for ``places`` of each of ``pieces``, ids.

    The body reads all pieces at once; what makes logits of its result, the head and whatever the model does with its
    output, is transformers' own forward with the body's result put in.
    """
    import torch

    longest = max(map(len, pieces))
    padded = torch.tensor([[*piece, *[0] * (longest - len(piece))] for piece in pieces])  # where no token looks
    prefix = model.base_model_prefix
    body = getattr(model, prefix)
    outputs = body(padded, use_cache=False)
    states = outputs.last_hidden_state.float()

    class Given(torch.nn.Module):
        """Stands where the body was and returns what it was given."""

        states: Any

        def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
            return type(outputs)(**{**outputs, "last_hidden_state": self.states})

    given = Given()
    setattr(model, prefix, given)
    try:
        for number, wanted in enumerate(places):
            for start in range(wanted.start, wanted.stop, ROWS):
                some = range(start, min(start + ROWS, wanted.stop))
                given.states = states[number : number + 1, some.start : some.stop]
                found = model(padded[number : number + 1, some.start : some.stop], use_cache=False)
                yield number, some, found.logits[0].float()
    finally:
        setattr(model, prefix, body)
