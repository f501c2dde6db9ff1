"""Decides which tokenizer family a checkpoint's files are of, by the files alone; its code is never executed."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.checkpoint import misplaced
from stages.tokenizers import roles, templates
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_json_text

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


CONFIG = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
MODEL = "config.json"  # transformers chooses a class by it
MAX_CONFIG_BYTES = 16 << 20
MAX_EVIDENCE_BYTES = 64 << 20  # what is larger is not searched: the reader refuses it
MAX_ID_DIGITS = 9
MAX_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Rule:
    """How to recognise a family: its tokenizer classes, and the patterns and usual name of its vocabulary file.

    Patterns are in the order of preference. ``evidence`` is a regular expression that the file of the usual name must
    match somewhere, where that name is not the family's alone; a family ``yields`` to those that are preferred where
    both have files, as transformers prefers them, and that come before it. ``beside`` are files that belong to the
    vocabulary.
    """

    classes: tuple[str, ...]
    patterns: tuple[str, ...]
    usual: str
    evidence: bytes = b""
    yields: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


RULES: dict[str, Rule] = {
    "tokenizer-json": Rule(
        classes=("GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer"),
        patterns=("tokenizer.json", "vocab.json"),
        usual="tokenizer.json",
        beside=("merges.txt", MODEL, SPECIALS),
    ),
    "tiktoken-qwen": Rule(
        classes=("QWenTokenizer",),
        patterns=("*.tiktoken",),
        usual="qwen.tiktoken",
        yields=("tokenizer-json",),
    ),
    "sentencepiece": Rule(
        classes=(),
        patterns=("tokenizer.model", "spiece.model"),
        usual="tokenizer.model",
        evidence=rb"\A\n",
        yields=("tokenizer-json",),
    ),
    "tiktoken-llama3": Rule(
        classes=(),
        patterns=("tokenizer.model",),
        usual="tokenizer.model",
        evidence=rb"\A[A-Za-z0-9+/]+=* [0-9]+\r?\n",
        yields=("tokenizer-json", "sentencepiece"),
        beside=("tokenizer.json",),
    ),
    "tekken": Rule(
        classes=(),
        patterns=("tekken.json",),
        usual="tekken.json",
        yields=("tokenizer-json",),
    ),
    "rwkv-world": Rule(
        classes=("RwkvTokenizer", "RWKVWorldTokenizer", "RwkvWorldTokenizer", "Rwkv5Tokenizer", "Rwkv6Tokenizer"),
        patterns=("rwkv_vocab_*.txt",),
        usual="rwkv_vocab_v20230424.txt",
        yields=("tokenizer-json",),
    ),
}
# Classes whose way with a tokenizer.model is known; what another one does beside it is in code that is not run.
KNOWN_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "CodeLlamaTokenizer", "MistralTokenizer")


@dataclass(frozen=True)
class Resolution:
    """The decision: family, vocabulary file, the checkpoint's other declarations, and a readable trace.

    ``name`` is the vocabulary's in the checkpoint, ``vocabulary`` is where to open it. ``files`` are all of the
    checkpoint's tokenizer files, ``config`` is tokenizer_config.json with the roles of an older
    special_tokens_map.json, and ``class_name`` the tokenizer class that it names, without "Fast". ``declared`` are ids
    it states, ``roles`` its bos, eos, pad, unk and others, ``assumed`` those that the class alone gives,
    ``chat_templates`` its own by name; ``warnings`` what may be otherwise than it was meant.
    """

    family: str
    name: str
    vocabulary: Path
    files: Mapping[str, Path]
    config: JsonObject
    class_name: str | None
    declared: Mapping[int, str]
    roles: Mapping[str, str]
    assumed: Mapping[str, str]
    chat_templates: Mapping[str, str]
    trace: str
    warnings: Sequence[str] = ()


def resolve(root: Path, files: Mapping[str, Path]) -> Resolution:
    """Decide from the files at the top of a checkpoint (name -> where to open it); ``root`` is only for messages.

    :class:`TokenizerError` if no family can be named or the files contradict the family.
    """
    every, files = files, {name: path for name, path in sorted(files.items()) if "/" not in name}
    if not files.keys() - {MODEL}:
        raise TokenizerError(f"{root}: no tokenizer files there; {_known(root)}")
    config, config_files = _config(files)
    chat_templates = templates.read(every, config, root / CONFIG)
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
        *([(SPECIALS, "names the roles, for there is no added_tokens_decoder")] if SPECIALS in config_files else []),
        ("family", f"{family}: {why}"),
        ("vocabulary", f"{vocabulary}: {why_file}"),
        *([("chat templates", ", ".join(chat_templates))] if chat_templates else []),
    ]
    read = {vocabulary, *config_files, templates.FILE, "added_tokens.json"}
    read |= {*RULES[family].beside} - {SPECIALS}  # which is read where config_files says so
    others = [name for other in yielding(family) for name in _named(files, RULES[other]) if name not in read]
    if others:
        preferred = f"transformers uses {vocabulary}; the two are compared"
        lines.append(("also there", f"{', '.join(dict.fromkeys(others))}: {preferred}"))
    ignored = [name for name in files if name not in {*read, *others, MODEL}]
    if ignored:
        lines.append(("not read", f"{', '.join(ignored)}: {family} is made from {vocabulary} alone"))
    return Resolution(
        family=family,
        name=vocabulary,
        vocabulary=files[vocabulary],
        files=files,
        config=config,
        class_name=_class_name(config),
        declared=_declared(files, config),
        roles=roles.named(config),
        assumed=roles.assumed(config, _class_name(config)),
        chat_templates=chat_templates,
        trace="".join(f"{label:<22}{text}\n" for label, text in lines),
        warnings=_warnings(vocabulary, family, _class_name(config)),
    )


def _warnings(vocabulary: str, family: str, named: str | None) -> list[str]:
    """Say that a class is not known: where transformers reads the files, it says itself what it makes of them."""
    if named is None or family == "tokenizer-json" or named in {*KNOWN_CLASSES, *RULES[family].classes}:
        return []
    text = f"the tokenizer class {_cut(named)} is not known here, and code of a checkpoint is not run"
    return [f"{text}: {vocabulary} is read for what it is, as {family}"]


def yielding(family: str) -> list[str]:
    """Return the families that yield to ``family`` where a checkpoint has the files of both."""
    return [name for name, rule in RULES.items() if family in rule.yields]


def second_vocabularies(resolution: Resolution) -> list[Resolution]:
    """Return the checkpoint's other vocabularies, that transformers does not take where it has the one taken."""
    return [
        replace(resolution, family=family, name=name, vocabulary=resolution.files[name])
        for family in yielding(resolution.family)
        for name in _matching(resolution.files, RULES[family])
        if name != resolution.name
    ]


def read_json(path: Path) -> JsonObject:
    """Read a small JSON object; :class:`TokenizerError` for anything else."""
    text = read_json_text(path, MAX_CONFIG_BYTES)
    try:
        value = json.loads(text)
        # Half of a surrogate pair passes as an escape, but can be neither written nor printed.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON in UTF-8 ({error})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _config(files: Mapping[str, Path]) -> tuple[JsonObject, list[str]]:
    """Return tokenizer_config.json and what was read for it.

    Where it lists no added tokens, the roles of an older special_tokens_map.json win, as in transformers.
    """
    read = [CONFIG] if CONFIG in files else []
    config = read_json(files[CONFIG]) if read else {}
    if SPECIALS in files and "added_tokens_decoder" not in config:
        read.append(SPECIALS)
        stated = read_json(files[SPECIALS])
        named = (f"{role}_token" for role in roles.ROLES)
        config = {**config, **{name: stated[name] for name in named if name in stated}}
    return config, read


def _family(root: Path, files: Mapping[str, Path], config: JsonObject) -> tuple[str, str]:
    named = _class_name(config)
    own = next((family for family, rule in RULES.items() if named in rule.classes), None)
    if own and _named(files, RULES[own]):
        key = "tokenizer_class" if config.get("tokenizer_class") else "auto_map"
        return own, f"{key} names {_cut(named)}"
    fitting: list[str] = []
    for family, rule in RULES.items():  # those preferred first: a file is searched no more often than it must be
        if not set(rule.yields) & set(fitting) and _matching(files, rule):
            fitting.append(family)
    if own and fitting != ["tokenizer-json"]:
        return own, f"{_cut(named)} is named"  # and its files are missed there
    reason = f"{_cut(named)} does not decide" if named else "no class is named"
    if len(fitting) == 1:
        return fitting[0], f"{reason}, and only this family reads {' or '.join(RULES[fitting[0]].patterns)}"
    found = "the files fit several families" if fitting else f"no vocabulary of a known family among {', '.join(files)}"
    raise TokenizerError(f"{root}: {reason} and {found}; {_known(root)}")


def _vocabulary(root: Path, files: Mapping[str, Path], family: str) -> tuple[str, str]:
    rule = RULES[family]
    found = _named(files, rule)
    if rule.usual in found:
        return rule.usual, "the usual name" + (
            f", preferred to {', '.join(n for n in found if n != rule.usual)}" if found[1:] else ""
        )
    if len(found) == 1:
        return found[0], f"the only {' or '.join(rule.patterns)}"
    what = (
        f"there are {len(found)} ({', '.join(found)}) and none is {rule.usual}"
        if found
        else f"it is not among {', '.join(files)}"
    )
    raise TokenizerError(f"{root}: {family} needs its vocabulary, {' or '.join(rule.patterns)}; {what}")


def _named(files: Mapping[str, Path], rule: Rule) -> list[str]:
    return [name for pattern in rule.patterns for name in files if fnmatchcase(name, pattern)]


def _matching(files: Mapping[str, Path], rule: Rule) -> list[str]:
    return [name for name in _named(files, rule) if name != rule.usual or _shows(files[name], rule.evidence)]


def _shows(path: Path, evidence: bytes) -> bool:
    """Say whether a file shows the evidence; a pointer shows any, so that the reader says what it is."""
    size = path.stat().st_size
    if not evidence or not size or size > MAX_EVIDENCE_BYTES:
        return not evidence or size > 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return bool(misplaced.pointer(content[: misplaced.HEAD])) or re.search(evidence, content) is not None


def _cut(text: Any) -> str:
    return str(text)[:MAX_SHOWN]


def _class_name(config: JsonObject) -> str | None:
    named = config.get("tokenizer_class") or (_remote_class(config) or "").rpartition(".")[2]
    return str(named).removesuffix("Fast") if named else None


def _remote_class(config: JsonObject) -> str | None:
    """Return ``module.Class`` of auto_map's tokenizer; the list of older files is the tokenizer's own [slow, fast]."""
    auto_map = config.get("auto_map")
    entry = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    if isinstance(entry, list):
        entry = next((item for item in entry if item), None)
    return entry if isinstance(entry, str) else None


def _describe(config: JsonObject) -> str:
    remote = _remote_class(config)
    code = f"auto_map names {remote}: present and not executed" if remote else "no auto_map"
    return f"tokenizer_class {config.get('tokenizer_class')}; {code}"


def _declared(files: Mapping[str, Path], config: JsonObject) -> dict[int, str]:
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


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _known(root: Path) -> str:
    """Say what the user may have meant: what is in the place of a file, or which families there are."""
    if instead := misplaced.broken_links(root, {each for rule in RULES.values() for each in (*rule.patterns, CONFIG)}):
        return instead
    rules = (
        f"{name} ({''.join(f'{known}, vocabulary ' for known in rule.classes[:1])}{' or '.join(rule.patterns)})"
        for name, rule in RULES.items()
    )
    return f"known families: {', '.join(rules)}"
