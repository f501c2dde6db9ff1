"""Model families by the ``model_type`` of their config.json; each is one module, loaded when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Any

    from stages.documents.model import ModelDocument
    from stages.models.family import Family

# model_type -> where its Family is; strings, so that naming a family imports none
FAMILIES: dict[str, str] = {
    "gpt_neox": "stages.models.gpt_neox:FAMILY",
    "llama": "stages.models.llama:FAMILY",
    "mistral": "stages.models.mistral:FAMILY",
    "qwen": "stages.models.qwen:FAMILY",
    "qwen2": "stages.models.qwen2:FAMILY",
    "qwen3": "stages.models.qwen3:FAMILY",
    "rwkv": "stages.models.rwkv:FAMILY",
    "traced": "stages.models.traced:FAMILY",
}
TRACED = "traced"  # the row of every model_type that has none of its own


def native(model_type: object) -> bool:
    """Say whether there is a family for ``model_type``."""
    return isinstance(model_type, str) and model_type in FAMILIES and model_type != TRACED


def load_family(name: str) -> Family:
    """Return the family of ``model_type`` ``name``; :class:`KeyError` if it is not in :data:`FAMILIES`."""
    module, _, attribute = FAMILIES[name].partition(":")
    family: Family = getattr(importlib.import_module(module), attribute)
    return family


def described(model: ModelDocument) -> tuple[Family, Any]:
    """Return the family and the config of what config-parse wrote as model.json."""
    family = load_family(model["family"])
    config = family.config(**model["config"])
    return family.of(family, config), config
