"""Derives MLC-LLM's conversation template and tokenizer_info from the checkpoint's chat template and tokenizer.

MLC writes a conversation as ``system_template``, then for each message the role, ``role_content_sep``, the content and
a separator, and at the end the assistant's role and ``role_empty_sep``. The checkpoint's template is rendered with
contents that are found again in the text, and what stands between them is divided so. What comes of it must write every
probe as the checkpoint's template does, or the plain template ``LM`` is written, which adds nothing to a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypedDict

from stages.runtime import chat
from stages.runtime.errors import RequestError
from stages.runtime.render import checked, render_all

if TYPE_CHECKING:
    from stages.documents.bundle import TokenizerInfo
    from stages.documents.files import JsonObject


# A template with a clock shows this day: equal inputs must give equal bytes. Published templates name it themselves
# where there is no clock.
DAY = datetime(2024, 7, 26)  # noqa: DTZ001 - local, as a template's clock is
OTHER_DAY = datetime(2031, 1, 5)  # noqa: DTZ001
SYSTEM, USERS, ASSISTANTS = "Xsystem0X", ("Xuser1X", "Xuser2X", "Xuser3X"), ("Xassistant1X", "Xassistant2X")
_CONTENT = {"system": "{system_message}", "user": "{user_message}", "assistant": "{assistant_message}"}


class SystemPart(TypedDict, total=False):
    """How a system message is written."""

    system_template: str
    system_message: str
    add_role_after_system_message: bool


class Conversation(SystemPart, total=False):
    """MLC-LLM's conversation template (``Conversation`` of mlc_llm/protocol/conversation_protocol.py)."""

    name: str
    system_prefix_token_ids: list[int]
    roles: dict[str, str]
    role_templates: dict[str, str]
    messages: list[str]
    seps: list[str]
    role_content_sep: str
    role_empty_sep: str
    stop_str: list[str]
    stop_token_ids: list[int]
    function_string: str
    use_function_calling: bool


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_TURNS = [
    message
    for user, assistant in zip(USERS, ASSISTANTS, strict=False)
    for message in (_message("user", user), _message("assistant", assistant))
]
_LONG = [*_TURNS, _message("user", USERS[2])]
# name -> (messages, whether the assistant is to speak)
_PROBES: dict[str, tuple[list[dict[str, str]], bool]] = {
    "one": (_LONG[:1], True),
    "two": (_LONG[:3], True),
    "long": (_LONG, True),
    "ended": (_LONG[:2], False),
    "system": ([_message("system", SYSTEM), *_LONG[:1]], True),
    "system, long": ([_message("system", SYSTEM), *_LONG], True),
}


def conversation(config: JsonObject, info: TokenizerInfo, tables: JsonObject | None) -> tuple[Conversation, str]:
    """Return MLC's conversation template of a bundle's tokenizer, and in a sentence how it relates to the checkpoint's.

    ``config`` is tokenizer_config.json, ``info`` tokenizer_info.json, ``tables`` tokenizer.json if there is one.
    """
    templates = config.get("chat_template")
    if templates is None:
        return _plain(info), "the checkpoint has no chat template: texts go to the model as they are"
    try:
        template = chat.choose(templates, tools=False)
        texts = _texts(template, config, DAY)
        found, framed = _expressed(texts, config, info)
        dated = texts != _texts(template, config, OTHER_DAY)
    except RequestError as error:
        return _plain(info), f"MLC's form cannot express the chat template ({error}): texts go to the model as they are"
    ends = [token["content"] for token in (tables or {}).get("added_tokens") or () if token["id"] in info["stop"]]
    user = found["roles"]["user"].strip()
    # Where no token ends an answer, the next message of the user does.
    found["stop_str"] = [text for text in ends if text in found["seps"][1]] or ([user] if user else [])
    system = "" if framed else ", but a system message goes without what the template writes around it"
    day = f"; its date of the day stays {DAY:%d %B %Y}" if dated else ""
    return found, f"as the checkpoint's chat template writes it{system}{day}"


def written(template: Conversation, messages: Sequence[Mapping[str, str]], *, speaks: bool) -> str:
    """Return the text that MLC makes of messages, without ``system_prefix_token_ids``."""
    given = next((message["content"] for message in messages if message["role"] == "system"), None)
    system = template["system_template"].replace(_CONTENT["system"], given or template["system_message"])
    text: str = system
    separators = template["seps"] * 2
    for index, message in enumerate(turn for turn in messages if turn["role"] != "system"):
        role = message["role"]
        bare = system and not index and not template["add_role_after_system_message"]
        text += "" if bare else template["roles"][role] + template["role_content_sep"]
        text += template["role_templates"][role].replace(_CONTENT[role], message["content"])
        text += separators[role == "assistant"]
    if speaks:
        text += template["roles"]["assistant"] + template["role_empty_sep"]
    return text


def tokenizer_info(tables: JsonObject | None) -> JsonObject:
    """Return what MLC detects itself in a tokenizer.json, or where there is none."""
    decoders = _steps((tables or {}).get("decoder"), "decoders")
    methods = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
    named = [methods[step["type"]] for step in decoders if step.get("type") in methods]
    space = {"type": "Prepend", "prepend": "\u2581"}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "token_postproc_method": named[-1] if named else "byte_fallback",
        "prepend_space_in_encode": space in _steps((tables or {}).get("normalizer"), "normalizers"),
        "strip_space_in_decode": strip in decoders,
    }


def _steps(part: Any, inside: str) -> list[JsonObject]:
    if not isinstance(part, dict):
        return []
    return list(part.get(inside) or ()) if part.get("type") == "Sequence" else [part]


def _texts(template: str, config: JsonObject, day: datetime) -> dict[str, str]:
    """Return the text of every probe that the template takes; one without a system message it must take."""
    roles = {key: text for key, text in config.items() if key.endswith("_token") and isinstance(text, str)}
    given = [
        {**roles, "tools": None, "documents": None, "messages": messages, "add_generation_prompt": speaks}
        for messages, speaks in _PROBES.values()
    ]
    texts = dict(zip(_PROBES, render_all(template, given, now=day).texts, strict=True))
    return {name: checked(text) for name, text in texts.items() if isinstance(text, str) or not _with_system(name)}


def _with_system(probe: str) -> bool:
    return _PROBES[probe][0][0]["role"] == "system"


def _expressed(texts: Mapping[str, str], config: JsonObject, info: TokenizerInfo) -> tuple[Conversation, bool]:
    """Return the first division that writes the probes, and whether those with a system message are among them."""
    bos, index = config.get("bos_token"), info["bos"]
    for prefix in (bos, "") if bos and index is not None else ("",):
        # A bos that every turn begins with is part of the roles.
        if prefix and not all(text.startswith(prefix) and text.count(prefix) == 1 for text in texts.values()):
            continue
        bare = {name: text.removeprefix(prefix) for name, text in texts.items()}
        for framed in (True, False):
            parts = _divided(bare, framed=framed)
            template: Conversation = {**_plain(info), **(parts or {})}
            template["system_prefix_token_ids"] = [index] if prefix and index is not None else []
            probes = {name: _PROBES[name] for name in bare if framed or not _with_system(name)}
            if parts and all(
                written(template, messages, speaks=speaks) == bare[name] for name, (messages, speaks) in probes.items()
            ):
                return template, framed
    raise RequestError("what it writes around a message depends on more than the role")


def _divided(texts: Mapping[str, str], *, framed: bool) -> Conversation | None:
    """Divide what stands around the contents of the probes; None where it does not fall into MLC's parts."""
    between = _around(texts["long"], [message["content"] for message in _LONG])
    ended = _around(texts["ended"], [message["content"] for message in _LONG[:2]])
    if between is None or ended is None:
        return None
    first, to_assistant, to_user, *_, last = between
    shared = _beginning(to_assistant, last)
    content_sep, empty_sep = to_assistant[len(shared) :], last[len(shared) :]
    end = ended[-1]
    user = to_user.removeprefix(end).removesuffix(content_sep)
    if to_user != end + user + content_sep:
        return None
    own_end = _beginning(shared, end)  # what ends an answer ends the user's message too, as far as it is there
    system = _system(texts, first, user + content_sep) if framed else _unframed(first, user + content_sep)
    if system is None:
        return None
    found: Conversation = {
        "name": "checkpoint",
        "roles": {"user": user, "assistant": shared[len(own_end) :]},
        "seps": [own_end, end],
        "role_content_sep": content_sep,
        "role_empty_sep": empty_sep,
    }
    return {**found, **system}


def _system(texts: Mapping[str, str], first: str, start: str) -> SystemPart | None:
    """Return how a system message is written; ``first`` is what a conversation without one begins with.

    ``start`` begins a message of the user. Where there is no default message, MLC would write the frame around none.
    """
    framed = _around(texts.get("system", ""), [SYSTEM, USERS[0]])
    if framed is None:
        return None
    before, after, _ = framed
    own_turn = after.endswith(start) and first.endswith(start)
    tail, head = (after.removesuffix(start), first.removesuffix(start)) if own_turn else (after, first)
    message = head.removeprefix(before).removesuffix(tail)
    if head != before + message + tail:
        return None
    frame: SystemPart = {
        "system_template": f"{before}{_CONTENT['system']}{tail}",
        "system_message": message,
        "add_role_after_system_message": own_turn,
    }
    return frame


def _unframed(first: str, start: str) -> SystemPart | None:
    if not first.endswith(start):
        return None
    return {"system_template": first.removesuffix(start) + _CONTENT["system"], "system_message": ""}


def _around(text: str, contents: Sequence[str]) -> list[str] | None:
    """Return the text before, between and after contents that each stand in it once, in their order."""
    pieces = []
    for content in contents:
        if text.count(content) != 1:
            return None
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


def _beginning(one: str, other: str) -> str:
    """Return what two texts begin with alike."""
    return one[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))]


def _plain(info: TokenizerInfo) -> Conversation:
    return {
        "name": "LM",
        "system_template": _CONTENT["system"],
        "system_message": "",
        "system_prefix_token_ids": list(info["prefix"]),
        "add_role_after_system_message": True,
        "roles": {"user": "", "assistant": ""},
        "role_templates": {"user": _CONTENT["user"], "assistant": _CONTENT["assistant"], "tool": "{tool_message}"},
        "messages": [],
        "seps": [""],
        "role_content_sep": "",
        "role_empty_sep": "",
        "stop_str": [],
        "stop_token_ids": list(info["stop"]),
        "function_string": "",
        "use_function_calling": False,
    }
