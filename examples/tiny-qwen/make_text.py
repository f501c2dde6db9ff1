"""Write the texts of the example model: text/train.txt.xz, text/heldout.txt, text/prompts.json.

Stories are generated (seeded) from plots.py and told in English and Chinese; the split is by story and no story is in
both parts. The public-domain passages of text/classics.txt go into the training text several times: they are to be
learnt by heart, so that a reader sees at once whether a compiled model still knows them.

    python examples/tiny-qwen/make_text.py
"""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path
from typing import TYPE_CHECKING

import chinese
import english
from plots import PLOTS, Beat

if TYPE_CHECKING:
    from types import ModuleType

TEXT = Path(__file__).resolve().parent / "text"
SEPARATOR = "<|endoftext|>\n"
SEED = 20240131
STORIES = {english: 4000, chinese: 5000}
HELD_OUT = 0.016
CLASSIC_COPIES = 14

SORTS = {
    "A": "person", "B": "person", "C": "person", "J": "job", "K": "box", "L": "box", "M": "some", "N": "some",
    "P": "place", "Q": "place", "S": "total", "T": "thing", "U": "thing", "X": "animal",
}  # fmt: skip

# Beginnings of passages that were learnt by heart; the other prompts are beginnings of held-out stories.
FAMILIAR = (
    "Alice was beginning to get very tired of",
    "Shall I compare thee to a summer's day?\n",
    "It was the best of times,",
    "静夜思\n李白\n床前明月光，",
    "道可道，非常道；",
)
STORY_BEATS = 3  # how many sentences of a held-out story make a prompt


def tell(language: ModuleType, beats: list[Beat], rng: random.Random) -> list[str]:
    """Return one sentence per beat, each in a randomly chosen wording."""
    sentences = []
    for beat in beats:
        words: dict[str, str] = {}
        for role, value in beat.roles.items():
            words |= getattr(language, SORTS[role])(role, value)
        sentence = rng.choice(language.PHRASES[beat.kind]).format(**words)
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences


def stories(language: ModuleType, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return `count` different stories, each with the beginning that may serve as a prompt."""
    told: dict[str, str] = {}
    while len(told) < count:
        plot = PLOTS[len(told) % len(PLOTS)]
        sentences = tell(language, plot(rng), rng)
        text = language.SEPARATOR.join(sentences).replace(f"{language.SEPARATOR}\n", "\n")
        told.setdefault(text, language.SEPARATOR.join(sentences[:STORY_BEATS]))
    return list(told.items())


def main() -> None:
    """Generate, split, check that the parts are disjoint, and write."""
    rng = random.Random(SEED)
    train, held_out, prompts = [], [], list(FAMILIAR)
    for language, count in STORIES.items():
        told = stories(language, count, rng)
        kept = int(count * HELD_OUT)
        held_out += [text for text, _ in told[:kept]]
        train += [text for text, _ in told[kept:]]
        # Story kinds alternate: a journey and a promise in English, a journey in Chinese.
        prompts += [beginning for _, beginning in told[3 : 5 if language is english else 4]]
    assert not set(train) & set(held_out), "a story is in both parts"
    train += (TEXT / "classics.txt").read_text(encoding="utf-8").strip().split("\n" + SEPARATOR) * CLASSIC_COPIES
    rng.shuffle(train)
    rng.shuffle(held_out)
    with lzma.open(TEXT / "train.txt.xz", "wt", encoding="utf-8", preset=9) as file:
        file.write(("\n" + SEPARATOR).join(train) + "\n")
    (TEXT / "heldout.txt").write_text(("\n" + SEPARATOR).join(held_out) + "\n", encoding="utf-8")
    prompts_text = json.dumps(prompts, ensure_ascii=False, indent=1)
    (TEXT / "prompts.json").write_text(prompts_text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
