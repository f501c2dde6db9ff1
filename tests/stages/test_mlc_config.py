"""mlc-chat-config.json: its form as MLC-LLM's classes declare it, and its conversations beside the chat template's."""

from __future__ import annotations

import json

import pytest

from stages.packing import mlc
from stages.runtime.render import render

# The fields of MLC-LLM's MLCChatConfig and Conversation: type, and whether a file must have them.
TEXT, WHOLE, NUMBER, SWITCH, ANY = str, int, (int, float), bool, object
CONFIG = {
    "version": (TEXT, True),
    "model_type": (TEXT, True),
    "quantization": (TEXT, True),
    "model_config": ({str: ANY}, True),
    "vocab_size": (WHOLE, True),
    "context_window_size": (WHOLE, True),
    "sliding_window_size": (WHOLE, True),
    "prefill_chunk_size": (WHOLE, True),
    "attention_sink_size": (WHOLE, True),
    "tensor_parallel_shards": (WHOLE, True),
    "pipeline_parallel_stages": (WHOLE, False),
    "active_vocab_size": (WHOLE, False),
    "temperature": (NUMBER, False),
    "presence_penalty": (NUMBER, False),
    "frequency_penalty": (NUMBER, False),
    "repetition_penalty": (NUMBER, False),
    "top_p": (NUMBER, False),
    "tokenizer_files": ([TEXT], False),
    "tokenizer_info": ({str: ANY}, False),
    "conv_template": ({str: ANY}, True),
    "pad_token_id": (WHOLE, None),
    "bos_token_id": (WHOLE, None),
    "eos_token_id": ([WHOLE], None),
}
CONVERSATION = {
    "name": (TEXT, None),
    "system_template": (TEXT, False),
    "system_message": (TEXT, False),
    "system_prefix_token_ids": ([WHOLE], None),
    "add_role_after_system_message": (SWITCH, False),
    "roles": ({str: TEXT}, True),
    "role_templates": ({str: TEXT}, False),
    "messages": ([ANY], False),
    "seps": ([TEXT], True),
    "role_content_sep": (TEXT, False),
    "role_empty_sep": (TEXT, False),
    "stop_str": ([TEXT], False),
    "stop_token_ids": ([WHOLE], False),
    "function_string": (TEXT, False),
    "use_function_calling": (SWITCH, False),
}


def fits(value, kind):
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        ((_, of),) = kind.items()
        return isinstance(value, dict) and all(isinstance(key, str) and fits(item, of) for key, item in value.items())
    return isinstance(value, kind) and not (kind in (WHOLE, NUMBER) and isinstance(value, bool))


def problems(document, fields):
    unknown = [key for key in document if key not in fields]
    missing = [key for key, (_, needed) in fields.items() if needed and key not in document]
    wrong = [
        key
        for key, value in document.items()
        if key in fields and not fits(value, fields[key][0]) and not (value is None and fields[key][1] is None)
    ]
    return [*unknown, *missing, *wrong]


def test_the_file_has_the_form_that_mlc_reads(recorded):
    document = json.loads((recorded.bundle / "mlc-chat-config.json").read_text())
    assert problems(document, CONFIG) == []
    template = document["conv_template"]
    assert problems(template, CONVERSATION) == []
    assert len(template["seps"]) in (1, 2)
    assert template["stop_token_ids"] == document["eos_token_id"]
    assert template["roles"] == {"user": "<|im_start|>user\n", "assistant": "<|im_start|>assistant\n"}
    assert template["system_message"] == "You are a helpful assistant."
    assert document["tokenizer_info"] == mlc.tokenizer_info({"decoder": {"type": "ByteLevel"}})
    spoilt = {**document, "conv_template": "chatml", "top_p": "1", "x": 0}
    assert set(problems(spoilt, CONFIG)) == {"x", "top_p", "conv_template"}


PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
INST = (
    "{% set s = messages[0].content if messages[0].role == 'system' else 'Be kind.' %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' }}{% if loop.index0 == (1 if messages[0].role == 'system' else 0) %}"
    "{{ '<<SYS>>' + s + '<</SYS>>' }}{% endif %}{{ m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ m.content + eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
THINK = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
USER = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
INFO = {"bos": 1, "stop": [2, 7], "prefix": [1]}
TABLES = {
    "added_tokens": [{"id": 2, "content": "</s>"}, {"id": 7, "content": "<|im_end|>"}, {"id": 1, "content": "<s>"}]
}


@pytest.mark.parametrize(
    ("template", "prefix", "stop", "system"),
    [
        (CHATML, [], ["<|im_end|>"], False),
        (SYSTEM, [], ["<|im_end|>"], True),
        (MISTRAL, [1], ["</s>"], False),
        (LLAMA2, [], ["</s>"], False),
        (INST, [], ["</s>"], True),
        (THINK, [], ["<|im_end|>"], False),
        (USER, [], ["User:"], False),
    ],
    ids=["chatml", "system", "mistral", "llama 2", "system in the turn", "think", "user"],
)
def test_a_conversation_is_written_as_the_template_writes_it(template, prefix, stop, system):
    found, said = mlc.conversation({"chat_template": template, **TOKENS}, INFO, TABLES)
    assert problems(found, CONVERSATION) == []
    assert said.startswith("as the checkpoint's chat template writes it")
    assert ("system message goes without" in said) is not system
    assert (found["system_prefix_token_ids"], found["stop_str"], found["stop_token_ids"]) == (prefix, stop, [2, 7])
    turns = [("user", "a b"), ("assistant", "c\nd"), ("user", "{e}"), ("assistant", "f"), ("user", "g")]
    for start in ([("system", "s")], []) if system else ([],):
        for count in (1, 3, 5):
            messages = [{"role": role, "content": text} for role, text in (*start, *turns[:count])]
            text = render(template, {"messages": messages, "add_generation_prompt": True, **TOKENS})
            assert ("<s>" if prefix else "") + mlc.written(found, messages, speaks=True) == text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "has no chat template"),
        ("{{ messages[-1].content }}", "depends on more than the role"),
        ("{% for m in messages %}{{ loop.index }}: {{ m.content }}{% endfor %}", "depends on more than the role"),
        ("{{ raise_exception('no') }}", "line 1: no"),
        ([{"name": "rag", "template": ""}], "no chat template named default"),
    ],
)
def test_what_cannot_be_said_in_mlcs_form_is_said_to_be_so(template, says):
    found, said = mlc.conversation({"chat_template": template, **TOKENS}, INFO, TABLES)
    assert says in said
    assert (found["name"], found["roles"], found["system_prefix_token_ids"]) == (
        "LM",
        {"user": "", "assistant": ""},
        [1],
    )


def test_a_bos_that_every_turn_begins_with_stays_in_the_roles():
    roles = {**TOKENS, "bos_token": "<|im_start|>"}
    found, _ = mlc.conversation({"chat_template": SYSTEM, **roles}, INFO, TABLES)
    assert found["system_prefix_token_ids"] == []
    assert found["system_template"] == "<|im_start|>system\n{system_message}<|im_end|>\n"


def test_a_template_with_a_clock_gives_the_same_bytes_on_any_day():
    found, said = mlc.conversation({"chat_template": "{{ strftime_now('%d %b %Y') }}" + CHATML}, INFO, TABLES)
    assert found["system_template"].startswith("26 Jul 2024")
    assert "its date of the day stays 26 July 2024" in said


def test_tokenizer_info_is_what_mlc_detects():
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    sentencepiece = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]},
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
    }
    keys = ("token_postproc_method", "prepend_space_in_encode", "strip_space_in_decode")
    for tables, expected in (
        (sentencepiece, ("byte_fallback", True, True)),
        ({"decoder": {"type": "ByteLevel"}, "normalizer": {"type": "NFC"}}, ("byte_level", False, False)),
        ({"decoder": {**strip, "start": 0}, "normalizer": None}, ("byte_fallback", False, False)),
        (None, ("byte_fallback", False, False)),
    ):
        assert mlc.tokenizer_info(tables) == dict(zip(keys, expected, strict=True))
