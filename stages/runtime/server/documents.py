"""Types of the OpenAI API's response documents (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict


class Function(TypedDict):
    """What a call calls: a function's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One call of a function that an answer makes; ``index`` counts them in a stream."""

    id: str
    type: str
    function: Function
    index: NotRequired[int]


class TokenLogprob(TypedDict):
    """A token as text and as bytes, its log probability, and the likeliest tokens in its place."""

    token: str
    logprob: float
    bytes: Sequence[int]
    top_logprobs: NotRequired[Sequence[TokenLogprob]]


class ChatLogprobs(TypedDict):
    """The log probabilities of a message's tokens."""

    content: Sequence[TokenLogprob]
    refusal: None


class TextLogprobs(TypedDict):
    """The log probabilities of a text's tokens, in columns of one length; ``text_offset`` counts characters.

    That of a text's first token is None.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[Mapping[str, float] | None]
    text_offset: list[int]


class Message(TypedDict, total=False):
    """A message of an answer, or what is added to one."""

    role: str
    content: str | None
    refusal: None
    tool_calls: Sequence[ToolCall]


class Choice(TypedDict, total=False):
    """One answer, or what is added to it: ``message`` or ``delta`` of a conversation, ``text`` of a completion."""

    index: int
    message: Message
    delta: Message
    text: str
    logprobs: ChatLogprobs | TextLogprobs | None
    finish_reason: str | None


class CachedTokens(TypedDict):
    """How many tokens of a prompt were read before."""

    cached_tokens: int


class Predictions(TypedDict):
    """Which tokens that were guessed were right, and which were not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Proof(TypedDict):
    """One check of a certificate."""

    name: str
    ok: bool
    detail: str


class Proofs(TypedDict):
    """What the certificate beside a bundle says, or why there is none."""

    verdict: str
    checks: Sequence[Proof]


class Usage(TypedDict):
    """How many tokens were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: Predictions


class Completion(TypedDict):
    """A whole answer, or a chunk of one: its choices; a chunk's usage is null until the last."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Choice]
    usage: NotRequired[Usage | None]


class Mistake(TypedDict):
    """What was wrong, of which kind, with which parameter."""

    message: str
    type: str
    param: str | None
    code: str | None


class Refusal(TypedDict):
    """The body of an answer that is an error."""

    error: Mistake
