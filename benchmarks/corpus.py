"""Write stages/tokenizers/proof/generated_corpus.jsonl: texts on which tokenizers go apart, drawn.

Usage: python benchmarks/corpus.py > stages/tokenizers/proof/generated_corpus.jsonl

The written texts of sample_corpus.jsonl are mixed and put into other normal forms; the rest is drawn from a seed.
"""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1] / "stages" / "tokenizers" / "proof" / "sample_corpus.jsonl"
BYTES = 182_000  # with the written texts a little more than 200 KiB
SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x180), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x620, 0x650), (0x900, 0x980),
    (0xE00, 0xE60), (0x10A0, 0x1100), (0x1200, 0x1250), (0x1780, 0x17E0), (0x3040, 0x3100), (0x4E00, 0x9FA6),
    (0xAC00, 0xD7A4), (0x1F300, 0x1F650), (0x20000, 0x20100),
)  # fmt: skip
MARKS = "".join(map(chr, (*range(0x300, 0x370), *range(0x591, 0x5C8), *range(0x64B, 0x660), 0x93C, 0x94D, 0x20E3)))
PEOPLE, TONES, SIGNS = "👨👩🧑👧👦🧔", "🏻🏼🏽🏾🏿", ("💻", "🚀", "❤️", "⚕️", "✈️", "🌾")
SPACES = (" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u3000", "\xa0", "\u2009", " \n ", "   ")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "’s", "'LL", "'x")
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]", "<|",
    "|>", "<0x0A>", "<|IM_END|>", "<|extra_0|>", "<|extra_205|>",
)  # fmt: skip
CODINGS = ("latin-1", "utf-8", "utf-16-le", "cp1252")


def texts(draw: random.Random, written: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) without end, all kinds in turn."""
    words = [word for text in written for word in text.split(" ") if word]
    while True:
        mixed = " ".join(draw.choices(words, k=60))
        yield "mixture", mixed
        yield "lines", "".join(draw.choice(words) + draw.choice(SPACES) for _ in range(30))
        form = draw.choice(("NFC", "NFD", "NFKC", "NFKD"))
        yield form.lower(), unicodedata.normalize(form, draw.choice(written)[:400])
        start, end = draw.choice(SCRIPTS)
        yield "script", "".join(chr(draw.randrange(start, end)) for _ in range(60))
        yield "scripts", "".join(chr(draw.randrange(*draw.choice(SCRIPTS))) for _ in range(40))
        yield "anything", "".join(_any(draw) for _ in range(25))
        yield "marks", "".join(draw.choice("aeoIx كא한क") + "".join(draw.choices(MARKS, k=3)) for _ in range(15))
        yield "jamo", "".join(chr(draw.randrange(a, b)) for _ in range(12) for a, b in _JAMO)
        yield "emoji", "".join(_emoji(draw) for _ in range(8))
        yield "numbers", " ".join(_number(draw) for _ in range(15))
        yield "edges", draw.choice(SPACES) + draw.choice(("a", "é", "好", "1", *CONTRACTIONS)) + draw.choice(SPACES)
        yield (
            "contractions",
            "".join(draw.choice(("I", "we", "é", "好", " ")) + draw.choice(CONTRACTIONS) for _ in range(15)),
        )
        yield "specials", "".join(draw.choice((*SPECIAL, draw.choice(words), " ", "\n")) for _ in range(20))
        yield "run", draw.choice((" ", "\n", "a", "=", "好", "1", "ab", "\t", "e\u0301", "▁")) * draw.randrange(2, 400)
        coding = draw.choice(CODINGS)
        yield f"bytes as {coding}", draw.randbytes(draw.randrange(8, 120)).decode(coding, "replace")


_JAMO = ((0x1100, 0x1113), (0x1161, 0x1176), (0x11A8, 0x11C3))


def _any(draw: random.Random) -> str:
    """Return any code point but a surrogate, assigned or not."""
    point = draw.randrange(draw.choice((0x800, 0x3000, 0xD800, 0x1F800, 0x10F800)))
    return chr(point if point < 0xD800 else point + 0x800)


def _emoji(draw: random.Random) -> str:
    person = draw.choice(PEOPLE) + draw.choice(("", draw.choice(TONES)))
    flag = "".join(chr(draw.randrange(0x1F1E6, 0x1F200)) for _ in range(2))
    family = "\u200d".join(draw.choice(PEOPLE) for _ in range(draw.randrange(2, 5)))
    return draw.choice((person, flag, family, f"{person}\u200d{draw.choice(SIGNS)}", "1️⃣", "☺︎"))


def _number(draw: random.Random) -> str:
    value = draw.randrange(10 ** draw.randrange(1, 15))
    return draw.choice(
        (f"{value}", f"{value:,}", f"{value / 997:.3f}", f"-{value}e-{value % 99}", f"0x{value:x}", f"a{value}b")
    )


def main() -> None:
    """Print the lines."""
    draw = random.Random(2024)
    written = [json.loads(line)[1] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    size = 0
    for kind, text in texts(draw, written):
        size += len(text.encode())
        sys.stdout.buffer.write(f"{json.dumps([kind, text])}\n".encode())
        if size >= BYTES:
            return


if __name__ == "__main__":
    main()
