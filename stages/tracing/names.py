"""Names the parameters and constants of a traced graph as transformers' state dict does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


class Names:
    """``used`` parameters in the order of their first use, name -> shape; ``constants`` by number; ``stacks`` of a
    mixture's experts -> the state dict's name, and whether they are transposed there.

    Parameters that are one in the model have the name of the first, but in the head, where ``tie`` (the output
    projection, the embedding) says so.
    """

    def __init__(self, model: Any) -> None:
        found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        first: dict[int, str] = {}
        self.own = {name: first.setdefault(id(tensor), name) for name, tensor in found.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        self.used: dict[str, tuple[int, ...]] = {}
        self.constants: list[JsonObject] = []
        self.tie: tuple[str, str] | None = self._tie(model)
        self.in_head = False
        self.turned: set[str] = set()
        self.stacks: dict[str, tuple[str, bool]] = {}
        self.stored = [name for name in model.state_dict() if name in self.shapes]

    def _tie(self, model: Any) -> tuple[str, str] | None:
        head, table = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or table is None:
            return None
        names = {id(module): name for name, module in model.named_modules()}
        return f"{names[id(head)]}.weight", f"{names[id(table)]}.weight"

    @property
    def tied(self) -> bool:
        """Whether the output projection is the embedding."""
        return self.tie is not None and self.own[self.tie[0]] == self.own[self.tie[1]]

    def parameter(self, name: str) -> dict[str, str]:
        """Return what stands for a parameter."""
        name = self.own[name]
        if self.in_head and self.tie and name == self.own[self.tie[0]]:
            name = self.tie[0]
        self.used.setdefault(name, self.shapes[name])
        return {"parameter": name}

    def transposed(self, name: str) -> dict[str, str]:
        """Return what stands for a matrix of which the checkpoint holds the transpose."""
        self.turned.add(name)
        return {"parameter": name}

    def stacked(self, name: str, *, transposed: bool) -> dict[str, str]:
        """Return what stands for the matrices [experts, n, k] of a mixture as one [experts * n, k]; the state dict may
        hold them ``transposed``, [experts, k, n].
        """
        experts, *sizes = self.shapes[name]
        n, k = reversed(sizes) if transposed else sizes
        del self.used[name]
        self.used[f"{name}.weight"] = (experts * n, k)
        self.stacks[f"{name}.weight"] = name, transposed
        return {"parameter": f"{name}.weight"}

    def constant(self, dtype: str, shape: Sequence[int], data: str) -> dict[str, int]:
        """Return what stands for a constant; equal ones are one."""
        entry = {"dtype": dtype, "shape": [*shape], "data": data}
        if entry not in self.constants:
            self.constants.append(entry)
        return {"constant": self.constants.index(entry)}

    def unused(self) -> list[str]:
        """Return the names of the state dict that the graph does not read."""
        read = {self.own[self.stacks[name][0] if name in self.stacks else name] for name in self.used}
        return [name for name in self.stored if self.own[name] not in read]
