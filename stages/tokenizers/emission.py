"""The directory a runtime reads: one tokenizer.json, tokenizer_config.json for transformers, tokenizer_info.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.documents.files import write_json
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.templates import emitted
from stages.tokenizers.tokenizer_family import ChatFormat, ModelFacts, TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject
    from stages.tokenizers.resolution import Resolution

SCHEMA = 1
RAW = "raw"


def emit(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    family: TokenizerFamily,
    facts: ModelFacts,
    resolution: Resolution,
    fingerprint: str,
    shown: Sequence[int] = (),
) -> None:
    """Write the three files, the vocabulary by its family's name, into ``directory``; equal arguments give equal bytes.

    Special tokens are those that the checkpoint names, or that its tokenizer class gives where they are tokens. Without
    a template of its own the family's for the model's chat format is written, and the model's ids tell the roles that
    have no name. ``shown`` are the ids of special tokens that decode to their text.
    """
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    chat = _chat_format(family, facts, ids)
    templates = resolution.chat_templates
    roles = {**{role: text for role, text in resolution.assumed.items() if text in ids}, **resolution.roles}
    ends = _distinct([*facts.eos, *(ids[text] for text in (roles.get("eos"),) if text in ids)])
    eos = ends or [_end_of_text(ids, family)]
    of_model = {"bos": facts.bos, "eos": eos[0], "pad": facts.pad}
    if not templates:
        texts = {role: _text(tokenizer, index) for role, index in of_model.items()}
        roles = {**{role: text for role, text in texts.items() if text is not None}, **roles}
    config = {
        **{f"{role}_token": text for role, text in roles.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts.context_window,
    }
    if family.file == "tokenizer.json":
        # Any other class name makes transformers rebuild normalizer and pre-tokenizer from its own code.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if templates or chat:
        config["chat_template"] = emitted(templates) or (chat.template if chat else None)
    controls = resolution.config.get("chat_control_tokens")
    if isinstance(controls, list):
        config["chat_control_tokens"] = [token for token in controls if isinstance(token, str)]
    info = {
        "schema": SCHEMA,
        "family": family.name,
        "bos": ids.get(roles.get("bos", ""), facts.bos),
        "eos": eos,
        "pad": ids.get(roles.get("pad", ""), facts.pad),
        # What the checkpoint's tokenizer puts before every text that is no chat.
        "prefix": prefix_of(tokenizer),
        "stop": _distinct([*eos, *facts.stop, *(ids[text] for text in (chat.stops if chat else ()))]),
        # Rows of the embedding from here on belong to no token: a sampler must mask their logits.
        "active_vocab_size": max(ids.values()) + 1,
        "rows": facts.rows,
        "fingerprint": fingerprint,
        "normalize": family.normalize,
        "chat": _describe(chat, facts, templates),
        **({"shown": list(shown)} if shown else {}),
    }
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / family.file), pretty=False)
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "tokenizer_info.json", info)


def prefix_of(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that go before a text; what may go after it is not among them."""
    around, plain = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    at = next(i for i in range(len(around) + 1) if around[i : i + len(plain)] == plain)
    return list(around[:at])


def _end_of_text(ids: Mapping[str, int], family: TokenizerFamily) -> int:
    found = next((ids[text] for text in family.end_of_text if text in ids), None)
    if found is None:
        raise TokenizerError(
            f"T15: generation_config.json names no eos_token_id and the vocabulary has no "
            f"{' or '.join(family.end_of_text)}: nothing would ever end a text; add eos_token_id"
        )
    return found


def _chat_format(family: TokenizerFamily, facts: ModelFacts, ids: Mapping[str, int]) -> ChatFormat | None:
    if facts.chat_format in (None, RAW):
        return None
    try:
        form = family.chats[str(facts.chat_format)]
    except KeyError:
        known = ", ".join(sorted({*family.chats, RAW}))
        raise TokenizerError(
            f"generation_config.json: chat_format {facts.chat_format!r} is not one of {family.name} (known: {known})"
        ) from None
    lacking = [text for text in form.stops if text not in ids]
    if lacking:
        raise TokenizerError(
            f"T14: generation_config.json: chat_format {facts.chat_format!r} ends a turn with {' or '.join(lacking)}, "
            "which is no token of the vocabulary; remove chat_format, or take the tokenizer of this model"
        )
    return form


def _describe(chat: ChatFormat | None, facts: ModelFacts, templates: Mapping[str, str]) -> JsonObject:
    if chat:
        return {"format": facts.chat_format, "piecewise": chat.piecewise, "system": chat.system}
    return {"format": "template" if templates else RAW}


def _text(tokenizer: Tokenizer, index: int | None) -> str | None:
    return None if index is None else tokenizer.id_to_token(index)


def _distinct(ids: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(ids))
