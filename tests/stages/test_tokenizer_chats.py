"""T23: a bundle whose chats are not those of transformers on the checkpoint's own files is not passed on."""

from __future__ import annotations

import json
import shutil

import pytest

from stages.tokenizer_bundle import FILES
from stages.tokenizers.proof.chats import same_chats
from stages.tokenizers.reference.automatic import Automatic
from stages.tokenizers.resolution import resolve

BROKEN = "{% for m in messages %}\n{{ m.content }}\n{{ m.content.x.y }}{% endfor %}"


@pytest.fixture
def subject(emitted, tmp_path):
    """A checkpoint of Qwen 2's kind with its emitted tokenizer, both to be changed."""
    source = emitted("qwen2 vocab")
    for folder, path in (("tokenizer", source), ("checkpoint", source.parents[1] / "checkpoint")):
        shutil.copytree(path, tmp_path / folder)
    return tmp_path


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def found(subject):
    checkpoint = subject / "checkpoint"
    resolution = resolve(checkpoint, {name: checkpoint / name for name in FILES if (checkpoint / name).is_file()})
    return [
        (finding.level, finding.message)
        for finding in same_chats(subject / "tokenizer", resolution, Automatic(resolution.files), exact=True)
    ]


def test_the_chats_of_a_bundle_are_those_of_transformers(subject):
    ((level, message),) = found(subject)
    assert level == "N"
    assert "5 chats have the ids of transformers'" in message


@pytest.mark.parametrize(
    "change",
    [
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template": "{{ raise_exception('no') }}"},
        {"chat_control_tokens": []},
    ],
    ids=["another template", "a template that refuses", "tokens that a user may write"],
)
def test_chats_of_another_template_are_refused(subject, change):
    config = subject / "checkpoint" / "tokenizer_config.json"
    template = json.loads(config.read_text())["chat_template"]
    spec = subject / "tokenizer" / "tokenizer.json"
    added = json.loads(spec.read_text())["added_tokens"]
    if "chat_control_tokens" in change:  # without them the end of a turn is a control token only if it is special
        spec.write_text(
            json.dumps(json.loads(spec.read_text()) | {"added_tokens": [t | {"special": False} for t in added]})
        )
    edit(subject / "tokenizer" / "tokenizer_config.json", **{"chat_template": template, **change})
    levels = [level for level, _ in found(subject)]
    assert "E" in levels


def test_a_template_that_no_chat_gets_through_is_a_warning_with_its_line(subject):
    for folder in ("checkpoint", "tokenizer"):
        edit(subject / folder / "tokenizer_config.json", chat_template=BROKEN)
    ((level, message),) = found(subject)
    assert level == "W"
    assert "it takes none of 5 chats: the chat template could not be rendered: line 3: UndefinedError" in message


def test_named_templates_are_each_compared(subject):
    several = [{"name": "default", "template": "a{{ messages[0].content }}"}, {"name": "rag", "template": "b"}]
    for folder in ("checkpoint", "tokenizer"):
        edit(subject / folder / "tokenizer_config.json", chat_template=several)
    assert [level for level, _ in found(subject)] == ["N", "N"]
    several[1]["template"] = "c"
    edit(subject / "tokenizer" / "tokenizer_config.json", chat_template=several)
    assert [level for level, _ in found(subject)] == ["N", *"EEEEE"]
