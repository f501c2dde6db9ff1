"""The tiktoken text format: one ``base64(token) rank`` per line; reading it strictly, and the merges it implies."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from pathlib import Path

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.files import read_bytes

# Far above any real vocabulary's (128 bytes); replaying merges is quadratic in the length of a token, so a hostile file
# must not choose it.
MAX_TOKEN_BYTES = 1024
MAX_RANK_DIGITS = 9
MAX_LINES = 1 << 20  # of a vocabulary; the largest published ones have 262,144
MAX_LENGTH = 8 << 20  # of all tokens together; real ones have 2 MB, and every cut of every token is looked at
MAX_CUTS = 2_000_000  # cuts into two tokens; real vocabularies have 300,000
MAX_SQUARES = 100_000_000  # of lengths, together: replaying merges is that much work; real vocabularies have 15,000,000
NO_RANK = 1 << 62


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return token -> rank in rank order, from 0 without a gap; else :class:`TokenizerError` with every problem."""
    ranks: dict[bytes, int] = {}
    line_of_rank: dict[int, int] = {}
    problems: list[str] = []
    data = read_bytes(path)
    bound_lines(data, path)
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = _parse(line)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        if token in ranks:
            problems.append(
                f"{path}:{number}: token {token!r} again; line {line_of_rank[ranks[token]]} gave it rank {ranks[token]}"
            )
        elif rank in line_of_rank:
            problems.append(f"{path}:{number}: rank {rank} again; line {line_of_rank[rank]} has it too")
        else:
            ranks[token], line_of_rank[rank] = rank, number
    problems += [f"{path}: {problem}" for problem in _gaps(ranks)]
    if problems:
        raise TokenizerError(*problems)
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _parse(line: bytes) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit():
        raise ValueError(f"expected `base64 rank`, found {line[:60]!r}")
    try:
        token = base64.b64decode(fields[0], validate=True)
    except binascii.Error as error:
        raise ValueError(f"{fields[0][:60]!r} is not base64 ({error})") from None
    if not 0 < len(token) <= MAX_TOKEN_BYTES:
        raise ValueError(f"a token of {len(token)} bytes (1 to {MAX_TOKEN_BYTES} are possible)")
    if len(fields[1]) > MAX_RANK_DIGITS:
        raise ValueError(f"a rank of {len(fields[1])} digits (1 to {MAX_RANK_DIGITS} are possible)")
    return token, int(fields[1])


def _gaps(ranks: Mapping[bytes, int]) -> list[str]:
    """Say which ranks below the largest and which single bytes are missing: signs of a truncated or edited file."""
    if not ranks:
        return ["no ranks in it"]
    problems = []
    count, largest = len(ranks), max(ranks.values())
    if largest != count - 1:
        present = set(ranks.values())
        first = next(rank for rank in range(count) if rank not in present)
        problems.append(f"{largest + 1 - count} of the ranks 0..{largest} are missing, the first is {first}")
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        shown = " ".join(f"{byte:02X}" for byte in absent[:8])
        problems.append(
            f"{len(absent)} of the 256 single bytes have no token ({shown}{' ...' if len(absent) > 8 else ''})"
        )
    return problems


def all_splits(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return every way to make each token of two others, by rank: what joining by rank does, whatever led there.

    Some tokens are not reached by merging at all; ``ignore_merges`` finds those, as tiktoken does.
    """
    bound_lengths(ranks)
    merges: list[tuple[bytes, bytes]] = []
    for token in ranks:
        bound_cuts(len(merges))
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def bound_lines(data: bytes, path: Path) -> None:
    """Raise :class:`TokenizerError` for a file of far more lines than any vocabulary's."""
    lines = data.count(b"\n")
    if lines > MAX_LINES:
        raise TokenizerError(f"{path}: {lines:,} lines, which is no vocabulary (at most {MAX_LINES:,} are read)")


def bound_lengths(tokens: Iterable[bytes | str]) -> None:
    """Raise :class:`TokenizerError` for tokens that are far longer together than any vocabulary's."""
    length = sum(map(len, tokens))
    if length > MAX_LENGTH:
        raise TokenizerError(
            f"the tokens have {length:,} characters together, which is no vocabulary (at most {MAX_LENGTH:,})"
        )


def bound_cuts(count: int) -> None:
    """Raise :class:`TokenizerError` where tokens can be made of others in far more ways than any vocabulary's."""
    if count > MAX_CUTS:
        raise TokenizerError(
            f"the tokens can be made of two others in more than {MAX_CUTS:,} ways: this is no vocabulary"
        )


def derive_merges(ranks: Mapping[bytes, int], path: Path) -> list[tuple[bytes, bytes]]:
    """Return the pair that makes each longer token, in rank order.

    tiktoken stores no merges: it joins the adjacent pair whose union has the lowest rank. Replaying that on a token
    with the ranks below its own leaves its two parents; a token that ends in more parts is not made by merging.
    """
    if sum(len(token) ** 2 for token in ranks) > MAX_SQUARES:
        raise TokenizerError(f"{path}: there are too many tokens of hundreds of bytes: this is no vocabulary")
    merges, orphans = [], []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _replay(token, rank, ranks)
            if len(parts) == 2:
                merges.append((parts[0], parts[1]))
            else:
                orphans.append(token)
    if orphans:
        raise TokenizerError(
            f"{path}: {len(orphans)} tokens cannot be made from two tokens of lower rank, the first is {orphans[0]!r} "
            f"(rank {ranks[orphans[0]]}); the file is damaged or of a family that is no plain byte-pair encoding"
        )
    return merges


def _replay(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    pairs = [ranks.get(token[i : i + 2], NO_RANK) for i in range(len(token) - 1)]  # rank of parts[i] + parts[i + 1]
    while len(parts) > 2:
        lowest = min(pairs)
        if lowest >= rank:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i > 0:
            pairs[i - 1] = ranks.get(parts[i - 1] + parts[i], NO_RANK)
        if i < len(pairs):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], NO_RANK)
    return parts
