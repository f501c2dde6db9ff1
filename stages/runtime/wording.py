"""Records the ids of sample texts and a conversation, and checks that a bundle's tokenizer still gives them."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from stages.runtime.certificate import check_document
from stages.runtime.errors import RequestError
from stages.runtime.render import CLOCK
from stages.runtime.tokenizer import CONFIG, INFO, BundleTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.runtime.documents import CheckLine, Wording
    from stages.runtime.folder import Folder

CONVERSATION = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Japan, 日本? Say <|im_end|> to end."},
)


def wording(texts: Mapping[str, Sequence[int]], tokenizer: BundleTokenizer, folder: Folder) -> Wording:
    """Return what a certificate keeps of a tokenizer; ``texts`` are texts to continue with their ids."""
    info = folder.json(INFO)
    form = (info.get("chat") or {}).get("format")
    return {
        "family": info.get("family"),
        "fingerprint": info.get("fingerprint"),
        "texts": [{"text": text, "ids": [int(token) for token in ids]} for text, ids in texts.items()],
        "chat": form,
        "conversation": _conversation(tokenizer, folder),
    }


def writes_date(folder: Folder) -> bool:
    """Say whether a chat template of the bundle asks for the date, so that a conversation has other ids tomorrow."""
    return CONFIG in folder and CLOCK in folder.read(CONFIG).decode("utf-8", "replace")


def _conversation(tokenizer: BundleTokenizer, folder: Folder) -> list[int] | None:
    """Return the ids of :data:`CONVERSATION`; None without a chat format, or with one that asks for the date."""
    if writes_date(folder):
        return None
    try:
        return tokenizer.chat(CONVERSATION)
    except RequestError:  # there is no chat format, or it refuses such a conversation
        return None


def check(certified: Wording, folder: Folder) -> tuple[list[CheckLine], list[str]]:
    """Return the checks of a bundle's tokenizer against what was kept, and what cannot be checked here.

    Raises :class:`~stages.runtime.errors.BundleError` where it cannot be loaded.
    """
    tokenizer = BundleTokenizer(folder)
    wrong = [entry["text"] for entry in certified["texts"] if tokenizer.prompt(entry["text"]) != entry["ids"]]
    detail = (
        f"other ids than were certified for {wrong[0][:40]!r}" if wrong else f"ids of {len(certified['texts'])} texts"
    )
    checks = [check_document("tokenizer", not wrong, detail)]
    if certified["conversation"] is None:
        return checks, ["chat: the certificate holds no conversation (no chat format, or one that writes the date)"]
    if certified["chat"] == "template" and importlib.util.find_spec("jinja2") is None:
        return checks, ["chat: jinja2 is not installed, which renders the chat template"]
    try:
        same = tokenizer.chat(CONVERSATION) == certified["conversation"]
        detail = "ids of a conversation" if same else "other ids than were certified for a conversation"
    except RequestError as error:
        same, detail = False, f"{error}"
    return [*checks, check_document("chat", same, detail)], []
