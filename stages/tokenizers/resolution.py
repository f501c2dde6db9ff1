"""Which tokenizer family a checkpoint's files are, decided from the files alone: its code is named, never executed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stages.tokenizers.errors import TokenizerError

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MAX_CONFIG_BYTES = 16 << 20
MAX_ID_DIGITS = 9
MAX_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Rule:
    """How to recognise a family: its tokenizer classes, and the pattern and usual name of its vocabulary file."""

    classes: tuple[str, ...]
    pattern: str
    usual: str


RULES: dict[str, Rule] = {
    "tiktoken-qwen": Rule(classes=("QWenTokenizer",), pattern="*.tiktoken", usual="qwen.tiktoken"),
}


@dataclass(frozen=True)
class Resolution:
    """The decision: family, vocabulary file, what the checkpoint says beside it, and a trace a person can follow."""

    family: str
    vocabulary: Path
    declared: Mapping[int, str]
    chat_template: str | None
    trace: str


def resolve(root: Path, files: Mapping[str, Path]) -> Resolution:
    """Decide from the files at the top of a checkpoint (name -> where to open it); ``root`` is only for messages.

    :class:`TokenizerError` if no family can be named or the files contradict the family.
    """
    files = {name: path for name, path in sorted(files.items()) if "/" not in name}
    if not files:
        raise TokenizerError(f"{root}: no tokenizer files there; {_known()}")
    config = read_json(files[CONFIG]) if CONFIG in files else {}
    family, why = _family(root, files, config)
    vocabulary, why_file = _vocabulary(root, files, family)
    if config.get("extra_vocab_file"):
        raise TokenizerError(
            f"{files[CONFIG]}: extra_vocab_file is set ({_shown(config['extra_vocab_file'])}); vocabularies in two "
            "files are not supported: merge the ranks into one"
        )
    lines = [
        ("files seen", ", ".join(f"{name} ({path.stat().st_size:,} bytes)" for name, path in files.items())),
        (CONFIG, _describe(config) if CONFIG in files else "absent"),
        ("family", f"{family}: {why}"),
        ("vocabulary", f"{vocabulary}: {why_file}"),
    ]
    ignored = [name for name in files if name not in {vocabulary, CONFIG, TEMPLATE, "added_tokens.json"}]
    if ignored:
        lines.append(("not read", f"{', '.join(ignored)}: {family} is made from {vocabulary} alone"))
    return Resolution(
        family=family,
        vocabulary=files[vocabulary],
        declared=_declared(files, config),
        chat_template=_chat_template(files, config),
        trace="".join(f"{label:<22}{text}\n" for label, text in lines),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON object; :class:`TokenizerError` for anything else."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise TokenizerError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, which no tokenizer configuration is")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
        # Half of a surrogate pair passes as an escape, but can be neither written nor printed.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _family(root: Path, files: Mapping[str, Path], config: Mapping[str, Any]) -> tuple[str, str]:
    remote = _remote_class(config)
    for key, value in (
        ("tokenizer_class", config.get("tokenizer_class")),
        ("auto_map", remote and remote.rpartition(".")[2]),
    ):
        if value is None:
            continue
        named = str(value)[:MAX_SHOWN]
        plain = named.removesuffix("Fast")
        for family, rule in RULES.items():
            if plain in rule.classes:
                return family, f"{key} names {named}"
        raise TokenizerError(
            f"{root}/{CONFIG}: {key} names {named}, which is of no tokenizer family known here; {_known()}"
        )
    fitting = [family for family, rule in RULES.items() if _matching(files, rule.pattern)]
    if len(fitting) == 1:
        return fitting[0], f"no class is named, and only this family reads {RULES[fitting[0]].pattern}"
    found = "the files fit several families" if fitting else f"no vocabulary of a known family among {', '.join(files)}"
    raise TokenizerError(f"{root}: no tokenizer_class is named and {found}; {_known()}")


def _vocabulary(root: Path, files: Mapping[str, Path], family: str) -> tuple[str, str]:
    rule = RULES[family]
    found = _matching(files, rule.pattern)
    if rule.usual in found:
        return rule.usual, "the usual name" + (
            f", preferred to {', '.join(n for n in found if n != rule.usual)}" if found[1:] else ""
        )
    if len(found) == 1:
        return found[0], f"the only {rule.pattern}"
    what = (
        f"there are {len(found)} ({', '.join(found)}) and none is {rule.usual}"
        if found
        else f"it is not among {', '.join(files)}"
    )
    raise TokenizerError(f"{root}: {family} needs its vocabulary, {rule.pattern}; {what}")


def _matching(files: Mapping[str, Path], pattern: str) -> list[str]:
    return [name for name in files if fnmatchcase(name, pattern)]


def _remote_class(config: Mapping[str, Any]) -> str | None:
    """Return ``module.Class`` of auto_map's tokenizer; the list of older files is the tokenizer's own [slow, fast]."""
    auto_map = config.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if isinstance(entry, list):
        entry = next((item for item in entry if item), None)
    return entry if isinstance(entry, str) else None


def _describe(config: Mapping[str, Any]) -> str:
    remote = _remote_class(config)
    code = f"auto_map names {remote}: present and not executed" if remote else "no auto_map"
    return f"tokenizer_class {config.get('tokenizer_class')}; {code}"


def _declared(files: Mapping[str, Path], config: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens whose ids the checkpoint states beside its vocabulary: id -> text."""
    stated: dict[int, str] = {}
    if "added_tokens.json" in files:
        for text, index in read_json(files["added_tokens.json"]).items():
            if type(index) is not int or not 0 <= index < 10**MAX_ID_DIGITS:
                raise TokenizerError(
                    f"{files['added_tokens.json']}: {_shown(text)} has {_shown(index)}, which is no id"
                )
            stated[index] = text
    decoder = config.get("added_tokens_decoder")
    for index, entry in (decoder if isinstance(decoder, dict) else {}).items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not (index.isdecimal() and len(index) <= MAX_ID_DIGITS and isinstance(content, str)):
            raise TokenizerError(
                f"{files[CONFIG]}: added_tokens_decoder[{_shown(index)}] is not an id with a token's content"
            )
        stated[int(index)] = content
    return stated


def _chat_template(files: Mapping[str, Path], config: Mapping[str, Any]) -> str | None:
    """Return the checkpoint's own template; a file of its own wins over the key, as in transformers."""
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{files[TEMPLATE]}: not UTF-8 ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next(
            (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
        )
    return template if isinstance(template, str) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _known() -> str:
    rules = (f"{name} ({' or '.join(rule.classes)}, vocabulary {rule.pattern})" for name, rule in RULES.items())
    return f"known families: {', '.join(rules)}"
