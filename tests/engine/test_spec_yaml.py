"""What a file's text means: core-schema scalars, places, aliases, and text that is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from stagegraph.spec.item import Item, Problems
from stagegraph.spec.model import Place
from stagegraph.spec.reader import SIZE_LIMIT, core_scalar, parse


def read(text: str) -> tuple[Item | None, list[str]]:
    problems = Problems()
    item = parse(text, lambda line, column: Place("f.yaml", line, column), Path("/base"), problems)
    return item, list(problems.error().problems)


def plain(item: Item) -> object:
    if isinstance(item.value, dict):
        return {key: plain(part) for key, part in item.value.items()}
    return [plain(part) for part in item.value] if isinstance(item.value, list) else item.value


def value(text: str) -> object:
    item, problems = read(text)
    assert item is not None
    assert problems == []
    return plain(item)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, None) for text in ("", "~", "null", "Null", "NULL")),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, text) for text in ("no", "on", "yes", "off", "y", "N", "nUll", "tRUE", "None")),
        *((text, text) for text in ("1_000", "12:30", "2020-01-01", "0b11", "0x", "0o8", "-0x1F", "+", ".", "e5")),
        ("0", 0),
        ("010", 10),
        ("-7", -7),
        ("+12", 12),
        ("0o10", 8),
        ("0x1F", 31),
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("6.02e+23", 6.02e23),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5", -1.5),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("+.INF", math.inf),
        ("9" * 5000, math.inf),  # Python would refuse to make an integer of it
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, expected: object) -> None:
    assert core_scalar(text) == expected
    assert type(core_scalar(text)) is type(expected)
    assert value(f"a: {text}") == {"a": expected}


def test_nan() -> None:
    assert all(isinstance(found := core_scalar(text), float) and math.isnan(found) for text in (".nan", ".NaN", ".NAN"))


def test_quoted_and_block_scalars_are_text() -> None:
    assert value("a: '010'\nb: \"no\"\nc: |\n  1\nd: !!str 010") == {"a": "010", "b": "no", "c": "1\n", "d": "010"}


def test_places_count_lines_and_characters_from_one() -> None:
    item, _ = read("键: {b: 1}\nc:\n- 值\n- {d: x}\n")
    assert item is not None
    assert isinstance(item.value, dict)
    inner, items = item.value["键"].value, item.value["c"].value
    assert isinstance(inner, dict)
    assert isinstance(items, list)
    assert (str(inner["b"].key), str(inner["b"].place)) == ("f.yaml:1:5", "f.yaml:1:8")
    assert [str(part.place) for part in items] == ["f.yaml:3:3", "f.yaml:4:3"]


def test_aliases_and_merge_keys() -> None:
    text = """
base: &base {a: 1, b: 2}
more: &more {b: 3, c: 4}
list: &list [x]
again: *list
one: {<<: *base, b: 5}
two: {b: 6, <<: [*more, *base]}
quoted: {"<<": 7}
"""
    assert value(text) == {
        "base": {"a": 1, "b": 2},
        "more": {"b": 3, "c": 4},
        "list": ["x"],
        "again": ["x"],
        "one": {"a": 1, "b": 5},
        "two": {"a": 1, "b": 6, "c": 4},
        "quoted": {"<<": 7},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3:1: duplicate key 'a'; it is already written at f.yaml:1:1"),
        ("a: !path x", "f.yaml:1:4: tag '!path' is not allowed; expected a plain value without a tag"),
        (
            "a: !!python/name:os.system",
            (
                "f.yaml:1:4: tag 'tag:yaml.org,2002:python/name:os.system' is not allowed; "
                "expected a plain value without a tag"
            ),
        ),
        ("a: {<<: 3}", "f.yaml:1:9: <<: found the number 3; expected a mapping or a list of mappings to merge"),
        ("1: a", "f.yaml:1:1: a key is the number 1; expected text, in quotes where it would not be read as such"),
        ("true: a", "f.yaml:1:1: a key is true; expected text, in quotes where it would not be read as such"),
        ("? [x]\n: a", "f.yaml:1:3: a key is a list; expected text, in quotes where it would not be read as such"),
        ("a: b\n\x07", "f.yaml:2:1: character U+0007 is not allowed in YAML; expected printable text"),
        ("a: &x [*x]", "f.yaml:1:8: cannot be read as YAML: an alias stands inside the value it names"),
        ("[" * 65, "f.yaml:1:65: cannot be read as YAML: values are nested deeper than 64 levels"),
    ],
)
def test_refused(text: str, problem: str) -> None:
    assert read(text)[1] == [problem]


@pytest.mark.skipif(not hasattr(yaml, "CSafeLoader"), reason="the words are libyaml's")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: b: c",
            (
                "f.yaml:1:5: cannot be read as YAML: mapping values are not allowed in this context; "
                "a text that has ': ' in it needs quotes, or the line above lacks its ':'"
            ),
        ),
        (
            "\ta: 1",
            (
                "f.yaml:1:1: cannot be read as YAML: while scanning for the next token (f.yaml:1:1), "
                "found character that cannot start any token; YAML is indented with spaces, and this is a tab"
            ),
        ),
        ("a: *x", "f.yaml:1:4: cannot be read as YAML: found undefined alias"),
        (
            "a: [1\nb: 2",
            (
                "f.yaml:2:2: cannot be read as YAML: while parsing a flow sequence (f.yaml:1:4), "
                "did not find expected ',' or ']'"
            ),
        ),
        (
            "a: 1\n---\nb: 2",
            (
                "f.yaml:2:1: cannot be read as YAML: expected a single document in the stream (f.yaml:1:1), "
                "but found another document"
            ),
        ),
    ],
)
def test_syntax_errors_are_one_line_with_their_place(text: str, problem: str) -> None:
    assert read(text) == (None, [problem])


def test_alias_bombs_are_refused_before_they_are_followed() -> None:
    levels = "\n".join(f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 9)}]" for i in range(30))
    item, problems = read(f"l0: &l0 [x]\n{levels}")
    assert item is None
    assert problems == [f"f.yaml:7:20: cannot be read as YAML: its aliases stand for more than {SIZE_LIMIT:,} values"]


def test_nesting_below_the_limit_is_read() -> None:
    assert value("[" * 60 + "]" * 60) is not None


def test_of_hundreds_of_problems_of_a_kind_twenty_are_said() -> None:
    problems = Problems()
    for line in range(1, 301):
        problems.add(Place("f.yaml", line, 1), f"unknown key 'k{line}'")
    problems.add(Place("f.yaml", 400, 1), "another kind")
    said = problems.error().problems
    assert len(said) == 22
    assert said[20] == "f.yaml:21:1: and 280 more of this kind from here on"
    assert said[21] == "f.yaml:400:1: another kind"
