"""The chat templates of a checkpoint, by the rules of transformers 5: which file or key has them, and their names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_text

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
DEFAULT = "default"
MAX_TEMPLATES = 64


def read(files: Mapping[str, Path], config: JsonObject, where: Path) -> dict[str, str]:
    """Return name -> template; {} if there is none.

    ``files`` are the checkpoint's by their name in it. Templates in files of their own win over the key
    ``chat_template`` of tokenizer_config.json (``config``, at ``where``), which is one template or a list of
    ``{"name", "template"}``. :class:`TokenizerError` for anything else there.
    """
    stated = {DEFAULT: read_text(files[FILE])} if FILE in files else {}
    for name in sorted(files):
        if name.startswith(f"{FOLDER}/"):
            stated[PurePosixPath(name).name.removesuffix(".jinja")] = read_text(files[name])
    return stated or _stated(config.get("chat_template"), where)


def _stated(value: Any, where: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value if isinstance(value, list) else [value]
    found: dict[str, str] = {}
    for index, entry in enumerate(entries):
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str) or len(entries) > MAX_TEMPLATES:
            raise TokenizerError(
                f"{where}: chat_template is neither a template nor a list of at most {MAX_TEMPLATES} with 'name' and "
                f"'template' as text: entry {index} is {repr(entry)[:80]}"
            )
        found[name] = template
    return found


def emitted(templates: Mapping[str, str]) -> str | list[dict[str, str]] | None:
    """Return ``templates`` as tokenizer_config.json holds them: the one there is, a list of several, or None."""
    if set(templates) == {DEFAULT}:
        return templates[DEFAULT]
    return [{"name": name, "template": templates[name]} for name in sorted(templates)] or None
