"""tokenizer.model of sentencepiece against sentencepiece itself: what is read, every id, every text, every refusal."""

from __future__ import annotations

import json
import random
import resource

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stagegraph.stage import StageError
from stages.runtime.tokenizer import BundleTokenizer
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats.sentencepiece_bpe import splits
from stages.tokenizers.formats.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_model
from stages.tokenizers.proof import beside_transformers
from stages.tokenizers.proof.equality import PROBES, code_points, sample_corpus
from tests.support.sentencepiece_models import (
    BYTES,
    META,
    MODELS,
    SYMBOLS,
    field,
    metaspace_first,
    model,
    runs_of_one_score,
    tables,
    trained,
)
from tests.support.tokenizer_folders import build

EXACT = ["llama", "no space before", "no bytes", "spaces collapsed", "symbols", "runs of spaces", "digits"]
EXACT += ["control tokens", "split by nothing"]
REFUSED = {"word": "the model is Word", "suffix": "are not written as"}
TEXTS = [*PROBES, *(text for _, text in sample_corpus()), *(text for _, text in code_points()[::9])]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """transformers' reading has tests of its own."""

    def unread(*_):
        raise beside_transformers.Unread("N", "not asked")

    monkeypatch.setattr(beside_transformers, "open_files", unread)


def convert(folder, data, **config):
    files = {"tokenizer.model": data, **({"tokenizer_config.json": config} if config else {})}
    ctx, directory = build(folder, files, "llama", 2)
    from tokenizers import Tokenizer

    emitted = Tokenizer.from_file(str(directory / "tokenizer.json"))
    emitted.encode_special_tokens = True
    return ctx, emitted, json.loads((directory / "tokenizer_info.json").read_bytes())


def refusal(folder, data, **config):
    with pytest.raises(StageError) as caught:
        convert(folder, data, **config)
    return " ".join(caught.value.problems)


def ids(emitted, text):
    return emitted.encode(text, add_special_tokens=False).ids


def collages(loaded, count):
    """Random texts of pieces and parts of pieces: merges meet there in every way."""
    generator = random.Random(7)  # noqa: S311 - the same texts on every run
    pieces = [loaded.id_to_piece(i) for i in range(loaded.vocab_size())]
    pieces = [piece.replace("▁", " ") for piece in pieces if not piece.startswith("<")]
    for _ in range(count):
        parts = generator.choices(pieces, k=generator.randrange(1, 30))
        yield "".join(part[: generator.randrange(1, len(part) + 1)] for part in parts)


@pytest.mark.parametrize("name", EXACT)
def test_every_id_is_sentencepieces_own(tmp_path, name):
    loaded = sentencepiece.SentencePieceProcessor(model_proto=trained(name))
    ctx, emitted, info = convert(tmp_path, trained(name))
    assert "proven equal to tokenizer.model" in ctx.summary_text
    assert info["prefix"] == [1]
    for text in [*TEXTS, *collages(loaded, 500)]:
        assert ids(emitted, text) == loaded.encode(text), text
        # A literal U+2581 that leads is text like any other here; sentencepiece drops it with the spaces that lead.
        if loaded.unk_id() not in loaded.encode(text) and not text.lstrip(" ").startswith("▁"):
            assert emitted.decode(loaded.encode(text), skip_special_tokens=False) == loaded.decode(loaded.encode(text))


@pytest.mark.parametrize("name", REFUSED)
def test_what_tokenizer_json_cannot_say_is_refused(tmp_path, name):
    assert REFUSED[name] in refusal(tmp_path, trained(name))


def test_runs_of_spaces_that_share_a_score_grow_from_the_left(tmp_path):
    data = runs_of_one_score()
    loaded = sentencepiece.SentencePieceProcessor(model_proto=data)
    _, emitted, _ = convert(tmp_path, data)
    for text in [" " * n + "and" * (n % 3) + " " * m for n in range(70) for m in (0, 1, 7, 30)]:
        assert ids(emitted, text) == loaded.encode(text), text
    for text in collages(loaded, 3000):
        assert ids(emitted, text) == loaded.encode(text), text


def test_of_cuts_that_meet_the_left_one_is_made():
    """aba: after ``ab``+``a`` the same ``a`` could begin another aba; the cut that ends with it must come first."""
    assert splits("aba") == [2, 1]
    assert splits("abab") == [3, 2, 1]
    assert splits("ababc") == [4, 3, 2, 1]
    assert splits("xabcx") == [4, 3, 2, 1]
    assert splits("abcab") == [4, 3, 2, 1]
    assert splits("aab") == [2, 1]


def test_what_is_read_is_what_sentencepiece_reads(tmp_path):
    for name in MODELS:
        (tmp_path / name).write_bytes(trained(name))
        found, loaded = read_model(tmp_path / name), sentencepiece.SentencePieceProcessor(model_proto=trained(name))
        assert (found.unk, found.bos, found.eos, found.pad) == (
            loaded.unk_id(),
            loaded.bos_id(),
            loaded.eos_id(),
            loaded.pad_id(),
        )
        for i in range(loaded.vocab_size()):
            piece = found.pieces[i]
            assert (piece.text, piece.score) == (loaded.id_to_piece(i), loaded.get_score(i))
            kinds = (loaded.is_unknown(i), loaded.is_control(i), loaded.is_byte(i), loaded.is_unused(i))
            assert kinds == (piece.kind == UNKNOWN, piece.kind == CONTROL, piece.kind == BYTE, False)
            assert piece.kind in {NORMAL, USER_DEFINED} or any(kinds)
        assert len(found.pieces) == loaded.vocab_size()


def test_symbols_after_a_space_are_special_and_said_to_be(tmp_path):
    data = trained("symbols after a space")
    loaded = sentencepiece.SentencePieceProcessor(model_proto=data)
    ctx, emitted, _ = convert(tmp_path, data)
    assert any("T13: the 2 user-defined symbols" in warning for warning in ctx.warnings)
    for text in TEXTS:
        if not any(symbol in text for symbol in SYMBOLS):
            assert ids(emitted, text) == loaded.encode(text)
    assert loaded.piece_to_id("<sep>") not in ids(emitted, "a <sep>")
    said = [loaded.piece_to_id(piece) for piece in ("▁a", "<sep>", "▁a", "[REF]")]
    ours = BundleTokenizer(tmp_path / "out" / "tokenizer")
    stream = ours.stream()
    assert "".join(map(stream.step, said)) + stream.finish() == ours.decode(said) == loaded.decode(said)
    emitted.encode_special_tokens = False
    assert loaded.piece_to_id("<sep>") in ids(emitted, "a <sep>")


@pytest.mark.parametrize("legacy", [True, False])
def test_digits_and_newlines_that_are_symbols_of_the_model_are_text(tmp_path, legacy):
    """What is user-defined must neither merge, nor vanish when it comes out, nor part a text as special tokens do."""
    data = trained("digits")
    loaded = sentencepiece.SentencePieceProcessor(model_proto=data)
    ctx, _, info = convert(tmp_path, data, legacy=legacy)
    ours = BundleTokenizer(tmp_path / "out" / "tokenizer")
    assert "shown" not in info
    assert not [warning for warning in ctx.warnings if "T13" in warning]
    for text in ("the year 204\nx", "1", "2024 and 7\t8", "\n\n9a", "a1b22c"):
        found = loaded.encode(text)
        assert ours.encode(text) == found
        stream = ours.stream()
        assert "".join(map(stream.step, found)) + stream.finish() == ours.decode(found) == loaded.decode(found) == text
    after = ours.encode("a</s>1b 2", specials=True)
    assert after[after.index(2) + 1 :] == loaded.encode("1b 2")[not legacy :]


def test_legacy_says_whether_each_part_between_special_tokens_gets_a_space(tmp_path):
    """As transformers' own LlamaTokenizer: sentencepiece over each part, or one space before the text as a whole."""
    data = trained("llama")
    loaded = sentencepiece.SentencePieceProcessor(model_proto=data)
    _, legacy, _ = convert(tmp_path / "a", data)
    _, modern, _ = convert(tmp_path / "b", data, tokenizer_class="LlamaTokenizer", legacy=False)
    _, bare, info = convert(tmp_path / "c", data, add_prefix_space=False, add_bos_token=False)
    assert info["prefix"] == []
    for text in [*TEXTS, " a", "  ", "▁a"]:
        assert ids(modern, text) == ids(legacy, text) == loaded.encode(text)
    assert ids(bare, " a") == ids(legacy, "a")
    for emitted in (legacy, modern):
        emitted.encode_special_tokens = False
    whole, part = loaded.encode("a"), ids(bare, "a")
    assert ids(legacy, "a</s>a</s>") == [*whole, 2, *whole, 2]
    assert ids(modern, "a</s>a</s>") == [*whole, 2, *part, 2]
    assert ids(modern, "</s>a") == [2, *part]


def test_stated_tokens_come_after_the_pieces(tmp_path):
    size = sentencepiece.SentencePieceProcessor(model_proto=trained("llama")).vocab_size()
    stated = {str(size): {"content": "<|im_end|>", "special": True, "normalized": True, "rstrip": True}}
    _, emitted, _ = convert(tmp_path, trained("llama"), added_tokens_decoder=stated, pad_token="<|im_end|>")  # noqa: S106
    emitted.encode_special_tokens = False
    assert ids(emitted, "<|im_end|>  a") == [size, *ids(emitted, "a")]


FAULTS = {
    "truncated": (trained("llama")[:-9], "not a whole sentencepiece model"),
    "cut in the middle": (trained("llama")[:4321], "the file is truncated"),
    "no piece has text": (field(1, b"") + field(2, field(3, 2)), "a piece of 0 characters"),
    "no protocol buffer": (b"\n" + b"\xff" * 90, "not a whole sentencepiece model"),
    "piece twice": (model([*META, ("a", -1, 1), ("a", -2, 1)]), "T05: piece 'a' is there 2 times"),
    "bytes missing": (model([*META, *BYTES[:200], ("a", -1, 1)], byte_fallback=True), "T12"),
    "unknown missing": (model([*META[1:], ("a", -1, 1)]), "the unknown pieces have ids []"),
    "unused piece": (model([*META, ("a", -1, 1), ("aa", -2, 5)]), "1 pieces are unused"),
    "score shared": (model([*META, *((t, -1, 1) for t in ("ab", "ba")), ("a", -3, 1), ("b", -4, 1)]), "share a score"),
    "no character": (model([*META, ("ab", -1, 1), ("a", -2, 1)]), "join a character that is no piece (['b'])"),
    "score is no number": (model([*META, ("a", float("nan"), 1)]), "has score nan"),
    "type unknown": (model([*META, ("a", -1, 9)]), "and type 9"),
    "long piece": (model([*META, ("a" * 2_000_000, -1, 1)]), "a piece of 2,000,000 characters"),
    "not UTF-8": (model([*META]) + field(1, field(1, b"\xff")), "utf-8"),
    "space in a symbol": (model([*META, ("a b", 0, 4), ("a", -1, 1)], dummy_prefix=0), "have spaces in them"),
    "spaces stay": (model([*META, ("a", -1, 1)], escape=0), "are not written as"),
    "number without end": (b"\n" + b"\x80" * 99, "more than 64 bits"),
    "symbols and collapse": (
        model([*META, ("=>", 0, 4), ("a", -1, 1)], dummy_prefix=0, remove_extra=1),
        "spaces beside them are removed",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_model_is_refused_by_name(tmp_path, name):
    data, says = FAULTS[name]
    message = refusal(tmp_path, data)
    assert says in message, message
    assert len(message) < 2_000


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bos_token": "<bos>"}, "T14"),
        ({"added_tokens_decoder": {"5": {"content": "<x>", "special": True}}}, "T05"),
        ({"added_tokens_decoder": {"9000": {"content": "<x>", "special": True}}}, "leave a gap"),
    ],
)
def test_a_configuration_that_contradicts_the_model_is_refused(tmp_path, config, says):
    assert says in refusal(tmp_path, trained("llama"), **config)


def test_a_small_length_that_claims_gigabytes_costs_nothing(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n" + b"\xff\xff\xff\xff\x0f" + b"x" * 50)
    with pytest.raises(TokenizerError, match="truncated"):
        read_model(tmp_path / "tokenizer.model")


def hostile():
    """Every run of one character up to the longest, and a long one after each of 9,000 characters."""
    runs = [("a" * n, -float(n), 1) for n in range(1, 1024)]
    others = [chr(0x4E00 + i) for i in range(9_000)]
    after = [(c + "a" * 990, -2e4 - i, 1) for i, c in enumerate(others)]
    return [*META, *runs, *((c, -1e5 - i, 1) for i, c in enumerate(others)), *after]


def test_pieces_that_can_be_cut_in_millions_of_ways_are_refused_in_bounded_time(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF)
    message = refusal(tmp_path, model(hostile()))
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert "which is no vocabulary" in message
    assert after.ru_utime - before.ru_utime < 20
    assert after.ru_maxrss - before.ru_maxrss < 400_000  # KiB
    small = [("a" * n, -float(n), 1) for n in range(1, 1024)] + [("é" * n, -3e3 - n, 1) for n in range(1, 1024)]
    more = [(c * n, -1e4 * ord(c) - n, 1) for c in "bcdefgh" for n in range(1, 1024)]
    assert "more than 2,000,000 ways" in refusal(tmp_path / "ways", model([*META, *small, *more]))


def both(folder, spec, data):
    files = {"tokenizer.json": spec, "tokenizer.model": data}
    return build(folder, files, "mistral", 2)[0]


def test_tokenizer_json_is_preferred_and_held_against_tokenizer_model(tmp_path):
    ctx = both(tmp_path / "a", tables(), trained("llama"))
    assert "tokenizer.model: transformers uses tokenizer.json; the two are compared" in ctx.views["trace"]
    assert not [warning for warning in ctx.warnings if warning.startswith("T21")]
    ctx = both(tmp_path / "b", metaspace_first(), trained("llama"))
    (warning,) = [warning for warning in ctx.warnings if warning.startswith("T21")]
    assert "tokenizer.model and tokenizer.json hold the same tokens" in warning
    assert "tokenizer.json is used, as transformers does" in warning


def test_a_tokenizer_model_of_another_model_fails_the_build(tmp_path):
    with pytest.raises(StageError, match=r"T05: .* ids differ between tokenizer\.model and tokenizer\.json"):
        both(tmp_path / "a", tables(), trained("no space before").replace("▁the".encode(), "▁tha".encode()))
    assert any("cannot be read as" in w for w in both(tmp_path / "b", tables(), trained("llama")[:-7]).warnings)


# Of a tokenizer.json no list of known forms is kept: what transformers makes of it is emitted and proven.
CHANGED = {
    "split": lambda spec: spec["pre_tokenizer"].update(split=True),
    "other character": lambda spec: spec["pre_tokenizer"].update(replacement="_"),
    "decoder": lambda spec: spec["decoder"]["decoders"].pop(1),
    "byte lost": lambda spec: spec["model"]["vocab"].pop("<0x0A>"),
    "no unknown": lambda spec: spec["model"].update(unk_token="<none>"),  # noqa: S106
    "ignore_merges": lambda spec: spec["model"].update(ignore_merges=True),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_tokenizer_json_has_the_ids_that_transformers_gives_it(tmp_path, name):
    spec = metaspace_first()
    CHANGED[name](spec)
    _, directory = build(tmp_path, {"tokenizer.json": spec}, "llama", 2)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    emitted = Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("the sea_and  the wind\n", " two spaces", "日本 é\r\n"):
        wanted = loaded(text, add_special_tokens=False)["input_ids"]
        assert emitted.encode(text, add_special_tokens=False).ids == wanted
        assert emitted.decode(wanted, skip_special_tokens=False) == loaded.decode(
            wanted, clean_up_tokenization_spaces=False
        )


SPOILT = {
    "unigram": (lambda spec: spec["model"].update(type="Unigram"), "no list of tokens and scores"),
    "forged": (lambda spec: spec["added_tokens"][1].update(content="▁the", id=None), "is no added token"),
    "merge unknown": (lambda spec: spec["model"]["merges"].append("zz qq"), "not in the vocabulary"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_tokenizer_json_that_contradicts_itself_is_refused(tmp_path, name):
    change, says = SPOILT[name]
    spec = metaspace_first()
    change(spec)
    with pytest.raises(StageError) as caught:
        build(tmp_path, {"tokenizer.json": spec}, "llama", 2)
    assert says in " ".join(caught.value.problems)
