"""First-generation Qwen: a ``*.tiktoken`` vocabulary, NFC, Qwen's split pattern and 208 special tokens after the ranks.

The pattern, the special tokens and the order of normalising and splitting are those of ``tokenization_qwen.py``, which
a checkpoint names in ``auto_map`` and which is never executed here.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats.byte_level import spell
from stages.tokenizers.formats.patterns import QWEN
from stages.tokenizers.formats.ranks import derive_merges, read_ranks
from stages.tokenizers.reference.tiktoken_reference import TiktokenReference, ranks_of
from stages.tokenizers.tokenizer_family import ChatFormat, TokenizerFamily

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.tokenizers.resolution import Resolution

PATTERN = QWEN
# Their ids follow the ranks in this order; the published vocabulary has 151,643 ranks.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def convert(resolution: Resolution) -> Tokenizer:
    """Build the equivalent tokenizer from a file of ranks; :class:`TokenizerError` if the file is not sound."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE

    path = resolution.vocabulary
    ranks = read_ranks(path)
    merges = [(spell(left), spell(right)) for left, right in derive_merges(ranks, path)]
    tokenizer = Tokenizer(
        BPE({spell(token): rank for token, rank in ranks.items()}, merges, fuse_unk=False, byte_fallback=False)
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIALS])
    misplaced = [text for i, text in enumerate(SPECIALS) if tokenizer.token_to_id(text) != len(ranks) + i]
    if misplaced:
        text = misplaced[0]
        raise TokenizerError(
            f"{path}: special token {text} must have id {len(ranks) + SPECIALS.index(text)} and has "
            f"{tokenizer.token_to_id(text)}; does the file hold special tokens among its ranks?"
        )
    return tokenizer


class QwenReference(TiktokenReference):
    """What ``QWenTokenizer`` does, on tiktoken: ``NFC`` over the whole text, then ranks."""

    def __init__(self, resolution: Resolution) -> None:
        ranks = ranks_of(resolution.vocabulary)
        super().__init__("qwen", PATTERN, ranks, {text: len(ranks) + i for i, text in enumerate(SPECIALS)}, None)

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of the normalised ``text``."""
        return super().encode(unicodedata.normalize("NFC", text), specials=specials)


# The family's own code builds this from pieces; the template is for runtimes that know templates only.
CHATML = ChatFormat(
    template=(
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    system="You are a helpful assistant.",
    # The chat code of the family adds both to the end of text of generation_config; without them a chat never stops.
    stops=("<|im_end|>", "<|im_start|>"),
    piecewise=True,
)

FAMILY = TokenizerFamily(
    name="tiktoken-qwen",
    convert=convert,
    reference=QwenReference,
    normalize="NFC",
    end_of_text=("<|endoftext|>",),
    chats={"chatml": CHATML},
    transformers_needs=None,  # its class is the checkpoint's own code
)
