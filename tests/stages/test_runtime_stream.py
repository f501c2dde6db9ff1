"""Stop strings: found over bytes, wherever tokens end, and nothing of one is ever shown."""

from __future__ import annotations

import random

import pytest

from stages.runtime.stream import TextStream


def streamed(pieces: list[bytes], stops: list[str]) -> tuple[str, bytes | None]:
    stream = TextStream(pieces.__getitem__)
    stream.stop_at([stop.encode() for stop in stops])
    return "".join([*(stream.step(i) for i in range(len(pieces))), stream.finish()]), stream.stopped


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    edges = sorted(rng.sample(range(len(data) + 1), min(rng.randrange(6), len(data))))
    return [data[a:b] for a, b in zip([0, *edges], [*edges, len(data)], strict=True)]


def byte_by_byte(data: bytes, stops: list[str]) -> str:
    """What a text ends at, said in the plainest way."""
    for end in range(1, len(data) + 1):
        whole = [stop.encode() for stop in stops if data[:end].endswith(stop.encode())]
        if whole:
            return data[: end - max(map(len, whole))].decode(errors="replace")
    return data.decode(errors="replace")


def test_the_text_ends_at_the_same_place_however_bytes_are_spread_over_tokens():
    rng = random.Random(5)  # noqa: S311
    for _ in range(3000):
        data = "".join(rng.choices("abä\n月", k=rng.randrange(1, 14))).encode()
        stops = ["".join(rng.choices("abä\n月", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
        expected = byte_by_byte(data, stops)
        for _ in range(3):
            pieces = cut(data, rng)
            assert streamed(pieces, stops)[0] == expected, (pieces, stops)


@pytest.mark.parametrize(
    ("pieces", "stops", "text", "stopped"),
    [
        ([b"one", b" t", b"wo three"], [" two"], "one", b" two"),
        ([b"one", b" t", b"en"], [" two"], "one ten", None),
        ([b"one \xe6\x9c", b"\x88 two"], ["月"], "one ", "月".encode()),
        ([b"one", b" t"], [" two"], "one t", None),
        ([b"aab"], ["ab", "b"], "a", b"ab"),
        ([b"one"], [], "one", None),
    ],
)
def test_what_may_begin_a_stop_string_waits(pieces, stops, text, stopped):
    assert streamed(pieces, stops) == (text, stopped)


def test_what_cannot_be_a_stop_string_any_more_is_shown_at_once():
    stream = TextStream([b"a", b"ab", b"c"].__getitem__)
    stream.stop_at([b"abd"])
    assert [stream.step(0), stream.step(1), stream.step(2)] == ["", "a", "abc"]
