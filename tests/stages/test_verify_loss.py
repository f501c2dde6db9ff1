"""The loss as a check of the tokenizer: the example model knows its own ids from any other's."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from stages.runtime import manifest
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer
from stages.verification import checks
from stages.verification.prompts import PARAGRAPH
from stages.verification.tolerances import LOSS_RATIO
from tests.support.bundles import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen"
SPECIALS = 208


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    built = build(tmp_path_factory.mktemp("example"), "q0f32", checkpoint=EXAMPLE)
    return Session(manifest.read(built.bundle)), BundleTokenizer(built.bundle)


@pytest.mark.slow
def test_the_bound_lies_between_the_right_tokenizer_and_every_wrong_one(example):
    session, tokenizer = example

    size = tokenizer.active_vocab_size

    def ratio(ids):
        ids = ids[:128]
        return checks.mean_loss(checks.decode_all(session, ids), ids) / checks.disorder_loss(session, ids, size)

    table = random.Random(1).sample(range(size), size)  # noqa: S311 - the same permutation on every run
    recorded = json.loads((EXAMPLE / "reference" / "reference.json").read_bytes())["cases"][0]["prompt"]
    heldout = (EXAMPLE / "text" / "heldout.txt").read_text()
    for text in (recorded, heldout[:800], PARAGRAPH):
        ids = tokenizer.encode(text)
        wrong = {
            "permuted": [table[i] for i in ids],
            "next": [(i + 1) % size for i in ids],
            "shifted": [(i + SPECIALS) % size for i in ids],
        }
        assert ratio(ids) < LOSS_RATIO
        measured = {name: round(ratio(other), 2) for name, other in wrong.items()}
        assert min(measured.values()) > LOSS_RATIO, measured
