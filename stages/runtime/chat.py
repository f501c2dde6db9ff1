"""Conversations to ids: a template is rendered as transformers does it, and what people wrote stays text.

Control tokens come from the template's own text only. What a message spells of them is put between two marks before
the template sees it, as in transformers 5 (``apply_chat_template(..., sanitize_control_tokens=True)``), and becomes
the ids of ordinary text; so the ids are transformers' own. Beyond that, parts of messages that only together, or with
the template's text, spell a control token are found by a third mark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import RequestError
from stages.runtime.render import checked, render, render_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from stages.runtime.documents import JsonObject

OPEN, CLOSE = "\U000f0000", "\U000f0001"  # around a control token that a message spells
_JOINTS = range(0x100000, 0x10FFFE)  # private use: one that no text has marks where a message could begin or end one
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message, the usual one first


@dataclass(frozen=True)
class Vocabulary:
    """What a conversation needs of a tokenizer.

    ``encode`` gives the ids of a text whose special tokens are meant, ``encode_plain`` those of a text in which
    nothing is a token of its own. ``added`` are the added tokens: text -> (id, special). ``roles`` are the special
    tokens that a template knows by name (``bos_token`` ...), ``controls`` the added tokens that
    tokenizer_config.json declares to be control tokens, or None.
    """

    encode: Callable[[str], list[int]]
    encode_plain: Callable[[str], list[int]]
    added: Mapping[str, tuple[int, bool]]
    roles: Mapping[str, str]
    controls: Sequence[str] | None


def turns(messages: str | Sequence[JsonObject], system: str | None = None) -> list[JsonObject]:
    """Return messages as transformers hands them to a template: without None, after ``system`` if that is given.

    A string is one message of the user.
    """
    given: list[JsonObject] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    if system:
        given = [{"role": "system", "content": system}, *given]
    if not given:
        raise RequestError("the conversation is empty: give at least one message")
    plain: list[JsonObject] = []
    for message in given:
        fields = {key: value for key, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        plain.append(fields)
    return plain


def choose(templates: Any, *, tools: bool, name: str | None = None) -> str:
    """Return one template of what tokenizer_config.json holds, by transformers' rules.

    ``templates`` is a template, or a list of ``{"name", "template"}``: of these the one of that ``name``, or
    ``tool_use`` for a conversation with tools, or ``default``. :class:`RequestError` where there is none.
    """
    if isinstance(templates, str) and name in (None, "default"):
        return templates
    named = {entry["name"]: entry["template"] for entry in templates} if isinstance(templates, list) else {}
    wanted = (name,) if name else (*(("tool_use",) if tools else ()), "default")
    for candidate in wanted:
        if candidate in named:
            return str(named[candidate])
    known = ", ".join(sorted(named)) or ("default" if isinstance(templates, str) else "none")
    raise RequestError(f"the checkpoint has no chat template named {wanted[-1]}; it has: {known}")


def marked(template: str, given: JsonObject, vocabulary: Vocabulary) -> str:
    """Return the rendered conversation with :data:`OPEN` and :data:`CLOSE` around what was given and spells a control.

    ``given`` is all that the template sees beside the roles, which it wins over. :class:`RequestError` where the
    template fails, or refuses the conversation.
    """
    tokens = _controls(template, list(strings(given)), vocabulary)
    spelt = alternatives(tokens)
    outer = over_strings(
        given, lambda text: spelt.sub(f"{OPEN}\\g<0>{CLOSE}", text.replace(OPEN, "").replace(CLOSE, ""))
    )
    everything = "".join([template, *strings(outer)])
    joint = next(chr(i) for i in _JOINTS if chr(i) not in everything)
    inner = over_strings(outer, _jointer(tokens, joint))
    if inner == outer:
        return render(template, {**vocabulary.roles, **outer})
    text, jointed = render_all(template, [{**vocabulary.roles, **values} for values in (outer, inner)]).texts
    if isinstance(jointed, str) and jointed.replace(joint, "") == checked(text):
        return _mark_forged(jointed, spelt, joint)
    return checked(text)  # the template looks at the characters themselves; what is whole is marked all the same


def encoded(text: str, vocabulary: Vocabulary) -> list[int]:
    """Return the ids of a marked text: what is between marks is encoded as text, and parts what is around it."""
    pieces = re.split(f"{OPEN}({alternatives(vocabulary.added).pattern}){CLOSE}|[{OPEN}{CLOSE}]", text)
    newline = vocabulary.encode("\n")
    ids = vocabulary.encode(pieces[0])
    for index, piece in enumerate(pieces[1:], 1):
        if not piece:
            continue
        if index % 2:
            ids += _as_text(piece, vocabulary, newline)
        else:
            ids += _continued(vocabulary.encode, piece, newline)
    return ids


def alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern of any of ``tokens``, the longest first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def over_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return ``value`` with every string in it changed, except the keys of dictionaries."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: over_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [over_strings(item, change) for item in value]
    return value


def strings(value: Any) -> Iterable[str]:
    """Yield every string in ``value``, except the keys of dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def _controls(template: str, texts: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """Return the control tokens: the special ones, and added ones that are declared, or else that the template has."""
    special = [token for token, (_, is_special) in vocabulary.added.items() if is_special]
    others = [token for token, (_, is_special) in vocabulary.added.items() if not is_special]
    if vocabulary.controls is not None:
        return special + [token for token in others if token in vocabulary.controls]
    others = [token for token in others if not token.isspace() and any(token in text for text in texts)]
    if not others:
        return special
    literals = render_all(template, []).literals
    return special + [token for token in others if token in literals]


def _jointer(tokens: Sequence[str], joint: str) -> Callable[[str], str]:
    """Return what puts ``joint`` where a token could begin, or go on, with a message: not in one that is whole."""
    starts = "".join({token[0] for token in tokens if not token[0].isspace()})
    going_on = tuple({token[i:] for token in tokens for i in range(1, len(token)) if not token[i].isspace()})
    start, whole = re.compile(f"[{re.escape(starts)}]" if starts else "(?!)"), re.compile(f"({OPEN}[^{CLOSE}]*{CLOSE})")

    def put(text: str) -> str:
        parts = whole.split(text)
        parts[::2] = [start.sub(f"\\g<0>{joint}", part) for part in parts[::2]]
        return (joint if text.startswith(going_on) else "") + "".join(parts)

    return put


def _mark_forged(jointed: str, spelt: re.Pattern[str], joint: str) -> str:
    """Return the text without joints, with marks around the control tokens that had one inside."""
    parts = jointed.split(joint)
    joints, at = set(), 0
    for part in parts[:-1]:
        at += len(part)
        joints.add(at)

    def mark(found: re.Match[str]) -> str:
        forged = any(i in joints for i in range(found.start() + 1, found.end()))
        return f"{OPEN}{found[0]}{CLOSE}" if forged else found[0]

    return spelt.sub(mark, "".join(parts))


def _as_text(token: str, vocabulary: Vocabulary, newline: list[int]) -> list[int]:
    """Return ids of a control token's spelling that are not the token, even where its characters merge to it."""
    ids = _continued(vocabulary.encode_plain, token, newline)
    if vocabulary.added[token][0] not in ids:
        return ids
    return [i for part in (token[:1], token[1:]) for i in _continued(vocabulary.encode_plain, part, newline)]


def _continued(encode: Callable[[str], list[int]], text: str, newline: list[int]) -> list[int]:
    """Return the ids of a text that others go before: after a newline no vocabulary puts a space of its own."""
    ids = encode(f"\n{text}")
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)
