"""Reading the tiktoken text format strictly, and the merges it implies."""

from __future__ import annotations

import base64

import pytest

from stages.problems import MAX_SHOWN
from stages.tokenizers import files
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats.byte_level import BYTES, CHARACTERS, spell, unspell
from stages.tokenizers.formats.ranks import MAX_TOKEN_BYTES, derive_merges, read_ranks
from tests.support.tiny_tokenizers import tiktoken_text, tiny_ranks

SINGLE = [bytes([byte]) for byte in range(256)]


def problems_of(path, data):
    path.write_bytes(data)
    with pytest.raises(TokenizerError) as caught:
        read_ranks(path)
    return caught.value.problems


def test_ranks_come_back_in_rank_order_whatever_the_order_of_lines(tmp_path):
    path = tmp_path / "v.tiktoken"
    lines = tiktoken_text(tiny_ranks()).splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    assert list(read_ranks(path).items()) == [(token, rank) for rank, token in enumerate(tiny_ranks())]


def test_crlf_and_blank_lines_are_harmless(tmp_path):
    path = tmp_path / "v.tiktoken"
    path.write_bytes(tiktoken_text(tiny_ranks()).replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert list(read_ranks(path)) == list(tiny_ranks())


def test_json_after_blank_lines_is_no_empty_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("\n" * 200 + "{}")
    assert files.read_json_text(path).endswith("{}")
    path.write_text("\n" * 200)
    with pytest.raises(TokenizerError, match="is empty"):
        files.read_json_text(path)


def test_git_lfs_pointer_is_named_as_such(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:b2b1\nsize 2561218\n"
    (problem,) = problems_of(tmp_path / "v.tiktoken", pointer)
    assert "Git LFS pointer" in problem
    assert "git lfs pull" in problem


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"onlyonefield", "expected `base64 rank`"),
        (b"aGk= 256 7", "expected `base64 rank`"),
        (b"aGk= minus", "expected `base64 rank`"),
        (b"aGk= -1", "expected `base64 rank`"),
        (b"a*Gk= 256", "is not base64"),
        (b"aGk 256", "is not base64"),
        (b"\xff\xfe 256", "is not base64"),
        (base64.b64encode(b"a" * (MAX_TOKEN_BYTES + 1)) + b" 256", f"a token of {MAX_TOKEN_BYTES + 1} bytes"),
        (b"aGk= " + b"1" * 4299, "a rank of 4299 digits"),
        (b"aGk= " + b"1" * 5000, "a rank of 5000 digits"),
        (b"YQ== 256", "token b'a' again; line 98 gave it rank 97"),
        (b"aGk= 97", "rank 97 again; line 98 has it too"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, says):
    path = tmp_path / "v.tiktoken"
    (problem,) = problems_of(path, tiktoken_text(SINGLE) + line + b"\n")
    assert problem.startswith(f"{path}:257: ")
    assert says in problem
    assert len(problem) < len(str(path)) + 200


def test_all_problems_of_a_file_come_at_once(tmp_path):
    kept = tiktoken_text(SINGLE).splitlines(keepends=True)[:200]
    problems = problems_of(tmp_path / "v.tiktoken", b"".join(kept) + b"broken\naGk= 500\nYQ== 501\n")
    assert len(problems) == 4
    assert "expected `base64 rank`" in problems[0]
    assert "again" in problems[1]
    assert "300 of the ranks 0..500 are missing, the first is 200" in problems[2]
    assert "56 of the 256 single bytes have no token (C8 C9" in problems[3]


def test_a_file_of_nonsense_does_not_flood_the_terminal(tmp_path):
    problems = problems_of(tmp_path / "v.tiktoken", b"x\n" * 5000)
    assert len(problems) == MAX_SHOWN + 1
    assert "and 4,981 more problems" in problems[-1]


def test_an_empty_file_has_no_ranks(tmp_path):
    assert "no ranks in it" in problems_of(tmp_path / "v.tiktoken", b"\n")[0]


def test_each_longer_token_has_one_merge_of_two_older_tokens(tmp_path):
    ranks = {token: rank for rank, token in enumerate(tiny_ranks())}
    merges = derive_merges(ranks, tmp_path)
    assert [left + right for left, right in merges] == list(tiny_ranks()[256:])
    assert all(max(ranks[left], ranks[right]) < ranks[left + right] for left, right in merges)


def test_the_merge_is_the_one_that_replaying_reaches_and_not_the_first_split(tmp_path):
    ranks = {token: rank for rank, token in enumerate([*SINGLE, b"bc", b"ab", b"abc"])}
    assert derive_merges(ranks, tmp_path)[-1] == (b"a", b"bc")


def test_a_token_that_no_merge_reaches_is_refused(tmp_path):
    ranks = {token: rank for rank, token in enumerate([*SINGLE, b"abcd"])}
    with pytest.raises(TokenizerError, match=r"1 tokens cannot be made .* b'abcd' \(rank 256\)"):
        derive_merges(ranks, tmp_path)


def test_the_byte_alphabet_is_the_one_of_the_tokenizers_library():
    from tokenizers import decoders, pre_tokenizers

    assert set(CHARACTERS) == set(pre_tokenizers.ByteLevel.alphabet())
    assert len(BYTES) == 256
    for text in ("hello world\n", "é好👍\x00\x7f\xad"):
        assert unspell(spell(text.encode())) == text.encode()
        assert decoders.ByteLevel().decode([spell(text.encode())]) == text
