"""The pages: every one is in the site, every link leads somewhere, every command is one that its parser takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from stagegraph.cli.verbs import build_parser, verb_names
from stagegraph.errors import PipelineError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
BLOCK = re.compile(r"```(?:sh|console|bash)\n(.*?)```", re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def in_nav(part: object) -> Iterator[str]:
    if isinstance(part, dict):
        for value in part.values():
            yield from in_nav(value)
    elif isinstance(part, list):
        for value in part:
            yield from in_nav(value)
    else:
        yield str(part)


def test_every_page_is_in_the_site() -> None:
    nav = list(in_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def commands(page: Path) -> list[list[str]]:
    """The command lines of `pipeline` in the blocks of a page, without comments and what the shell does with them."""
    found = []
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            for at, word in enumerate(words):
                if word == "pipeline" and (at == 0 or words[at - 1] in {"&&", "|", ";", "sudo"}):
                    rest = words[at + 1 :]
                    ends = [i for i, w in enumerate(rest) if w in {"&&", "|", ";", ">", "||", "2>"} or w.endswith(";")]
                    found.append(rest[: ends[0]] if ends else rest)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_there_is(page: Path) -> None:
    wrong = []
    for words in filter(None, commands(page)):
        if words[0] in {"--version", "help"} or words[0].isupper():
            continue
        try:
            _, unknown = build_parser(words[0]).parse_known_intermixed_args(words[1:])
            wrong += [f"{' '.join(words)}: {word}" for word in unknown]
        except PipelineError as error:
            wrong.append(f"{' '.join(words)}: {error}")
        except SystemExit:  # --help
            pass
    assert not wrong


def test_the_commands_are_found() -> None:
    assert len(commands(DOCS / "everyday.md")) > 30
    assert ["run", "--set", "scheme=q8f16_1", "--tag", "eight-bits"] in commands(DOCS / "tutorial.md")


def test_every_verb_has_its_place_in_the_reference() -> None:
    text = (DOCS / "verbs.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == verb_names()


def test_the_messages_of_the_page_are_those_of_the_code() -> None:
    """The page is found by what one reads: a message that was reworded leaves it."""
    rows = re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    code = " ".join(
        re.sub(r"\"\s*\n\s*f?\"", "", path.read_text())
        for folder in ("stagegraph", "stages")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert len(rows) >= 10
    assert [row for row in rows if row not in code] == []


def test_the_readme_is_short_with_one_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    assert len(re.findall(r"!\[", text)) == 1


def test_the_site_is_built(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed: the extra docs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert (tmp_path / "tutorial" / "index.html").exists()
