"""The command: text alone on stdout, one document with --json, exit code 2 for what cannot be served."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.cli import generate
from stages.runtime import command, manifest, serving
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer
from tests.support.output_schema import validate

ROOT = Path(__file__).parents[2]


def run(*arguments):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    code = command.run(parser.parse_args([str(argument) for argument in arguments]), out, err)
    return code, out.getvalue(), err.getvalue()


def test_greedy_text_is_that_of_the_argmax_of_every_step(recorded):
    session, tokenizer = Session(manifest.read(recorded.bundle)), BundleTokenizer(recorded.bundle)
    sequence, ids = session.add(), []
    logits = session.prefill(sequence, tokenizer.encode("every morning"))
    for _ in range(12):
        ids.append(int(logits[: tokenizer.active_vocab_size].argmax()))
        logits = session.decode(sequence, ids[-1])
    code, out, err = run(recorded.bundle, "--prompt", "every morning", "--max-tokens", 12)
    assert (code, out) == (0, tokenizer.decode(ids) + "\n")
    assert "prefill" in err
    assert "tokens/s" in err
    assert "12 tokens; prefill" in err
    assert "decode 11 steps, " in err


def test_one_token_takes_no_decode_step(recorded):
    assert "decode 0 steps; ended by length" in run(recorded.bundle, "--prompt", "every", "--max-tokens", 1)[2]


def test_a_reader_that_leaves_is_no_traceback(recorded):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "stages.runtime", recorded.bundle, "--prompt", "every morning"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_one_document_with_json(quantized):
    arguments = [quantized.bundle, "--prompt", "every morning", "--json", "--temperature", 1.5, "--max-tokens", 9]
    documents = [json.loads(run(*arguments, "--seed", seed)[1]) for seed in (1, 1, 2)]
    assert documents[0]["ids"] == documents[1]["ids"] != documents[2]["ids"]
    first = documents[0]
    assert (first["generated_tokens"], first["finish"], first["target"], first["device"]) == (
        9,
        "length",
        "llvm",
        "cpu",
    )
    assert first["prefill_tokens_per_second"] > 0
    assert first["decode_tokens_per_second"] > 0
    assert max(first["ids"]) < 508


def test_a_prompt_longer_than_a_chunk_and_a_full_context(quantized):
    document = json.loads(run(quantized.bundle, "--prompt", "e" * 500, "--json", "--max-tokens", 100)[1])
    validate(document, "generate")
    assert document["prompt_tokens"] > 24
    assert document["prompt_tokens"] + document["generated_tokens"] - 1 == 512
    assert document["finish"] == "context"


def test_the_prompt_comes_from_the_command_line_a_file_or_standard_input(recorded, tmp_path, monkeypatch):
    expected = run(recorded.bundle, "--prompt", "every\nmorning", "--max-tokens", 5)[1]
    (tmp_path / "prompt.txt").write_bytes(b"every\nmorning\n")
    assert run(recorded.bundle, "--prompt-file", tmp_path / "prompt.txt", "--max-tokens", 5)[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"every\nmorning\r\n")))
    assert run(recorded.bundle, "--prompt", "-", "--max-tokens", 5)[1] == expected


def test_a_prompt_that_is_not_utf8_is_one_message(recorded, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"every \xff morning")
    code, out, err = run(recorded.bundle, "--prompt-file", tmp_path / "prompt.txt")
    assert (code, out, err) == (2, "", f"error: {tmp_path}/prompt.txt: not UTF-8 at byte 6\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"every \xff")))
    assert run(recorded.bundle, "--prompt", "-")[2] == "error: standard input: not UTF-8 at byte 6\n"


def test_the_text_ends_before_a_stop_string_over_token_borders(recorded):
    arguments = [recorded.bundle, "--prompt", "every morning", "--max-tokens", 120, "--json"]
    whole = json.loads(run(*arguments)[1])
    stream, borders, shown = BundleTokenizer(recorded.bundle).stream(), [], ""
    for token in whole["ids"]:
        shown += stream.step(token)
        borders.append(len(shown))
    pairs = (whole["text"][border - 1 : border + 1] for border in borders[20:-20])
    stop = next(pair for pair in pairs if len(pair) == 2 and "\ufffd" not in pair)
    found = json.loads(run(*arguments, "--stop", "never there", "--stop", stop)[1])
    assert (found["text"], found["finish"]) == (whole["text"].partition(stop)[0], "stop string")
    assert found["ids"] == whole["ids"][: len(found["ids"])]


def test_special_tokens_are_shown_on_demand(recorded):
    arguments = [recorded.bundle, "--prompt", "a", "--json", "--max-tokens", 60, "--temperature", 3, "--seed", 4]
    hidden, shown = (json.loads(run(*arguments, *more)[1]) for more in ([], ["--specials"]))
    tokenizer = BundleTokenizer(recorded.bundle)
    assert any(map(tokenizer.is_special, hidden["ids"]))
    assert shown["ids"] == hidden["ids"]
    spelt = b"".join(map(tokenizer.piece, shown["ids"])).decode(errors="replace")
    end = shown["text"].removeprefix(spelt)
    assert end in ({"<|endoftext|>", "<|im_end|>", "<|im_start|>"} if shown["finish"] == "stop" else {""})
    assert "<|extra" not in hidden["text"]


def test_the_penalty_sees_the_prompt_and_what_came(recorded):
    tokenizer = BundleTokenizer(recorded.bundle)
    document = json.loads(
        run(recorded.bundle, "--prompt", "every", "--json", "--max-tokens", 40, "--repetition-penalty", 1e9)[1]
    )
    every = [*tokenizer.encode("every"), *document["ids"]]
    assert len(set(every)) == len(every)
    assert document["sampling"] == "greedy, repetition_penalty 1e+09"


def test_a_chat_is_sampled_as_the_checkpoint_says_unless_an_option_does(recorded):
    def said(*options):
        return run(recorded.bundle, "--prompt", "hi", "--max-tokens", 2, *options)[2]

    assert said("--chat").endswith("; temperature 1, top_p 0.8 (generation_config.json)\n")
    options = ["--top-p", 0.5, "--temperature", 0.5, "--top-k", 9]
    assert said("--chat", *options).endswith("; temperature 0.5, top_k 9, top_p 0.5\n")
    assert said("--chat", "--temperature", 0).endswith("; greedy\n")
    assert said().endswith("ended by length\n")


def test_a_chat_has_the_system_message_that_is_asked_for(recorded):
    def ids(*options):
        arguments = [recorded.bundle, "--prompt", "hi", "--chat", "--temperature", 0, "--max-tokens", 8, "--json"]
        return json.loads(run(*arguments, *options)[1])["prompt_tokens"]

    tokenizer = BundleTokenizer(recorded.bundle)
    assert ids("--system", "Be very brief.") == len(tokenizer.chat("hi", system="Be very brief."))
    assert ids() == len(tokenizer.chat("hi"))


class Interrupting(io.StringIO):
    """Presses Ctrl-C once some text has come."""

    def write(self, text):
        if self.tell() < 12 <= self.tell() + len(text):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_an_interrupt_ends_the_text_with_the_rates_so_far(recorded):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    arguments = [str(recorded.bundle), "--prompt", "every morning", "--max-tokens", "400"]
    out, err = Interrupting(), io.StringIO()
    assert command.run(parser.parse_args(arguments), out, err) == 130
    assert "ended by interrupt" in err.getvalue()
    assert "decode" in err.getvalue()
    assert "run again" not in err.getvalue()
    assert run(*arguments)[1].startswith(out.getvalue()[:-1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        ([], "give the text with --prompt TEXT"),
        (["--prompt", "a", "--prompt-file", "b"], "give the text with --prompt TEXT"),
        (["--prompt-file", "nowhere"], "nowhere: No such file"),
        (["--prompt", "a", "--system", "b"], "add --chat"),
        (["--prompt", "a", "--stop", ""], "--stop: the text is empty"),
        (["--prompt", "a", "--stop", "b\udcff"], "--stop: not UTF-8 at character 1"),
        (["--prompt", "a", "--chat", "--system", "b\udcff"], "--system: not UTF-8 at character 1"),
        (["--prompt", "a\udcff"], "not UTF-8 at character 1"),
        (["--prompt", "e" * 2000], "the context holds 512 tokens and the prompt has 2,000"),
        (["--prompt", "a", "--top-p", "2"], "top_p 2.0"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens 0"),
        (["--prompt", "a", "--device", "cuda"], "it runs on cpu, not on cuda"),
    ],
)
def test_what_cannot_be_served_is_said_without_a_traceback(quantized, arguments, message):
    code, out, err = run(quantized.bundle, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_a_damaged_bundle_is_not_loaded(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    (built.bundle / "model.so").write_bytes(b"not a library")
    code, out, err = run(built.bundle, "--prompt", "a")
    assert (code, out) == (2, "")
    assert "model.so: 13 bytes" in err


DEPLOYED = """
import runpy, sys
sys.argv = ["stages.runtime", *sys.argv[1:]]
try:
    runpy.run_module("stages.runtime", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
import tvm
foreign = {"torch", "transformers", "stagegraph", "yaml", "diskcache", "networkx", "blake3", "tiktoken"}
rooms = {name for name in sys.modules if name.startswith("stages.") and not name.startswith("stages.runtime")}
print(code, tvm.base._RUNTIME_ONLY, sorted(foreign & set(sys.modules)), sorted(rooms), file=sys.stderr)
"""


def test_the_folder_alone_runs_a_bundle_without_compiler_or_torch(recorded, tmp_path):
    sources = shutil.ignore_patterns("__pycache__")  # which come and go beside other tests
    shutil.copytree(ROOT / "stages" / "runtime", tmp_path / "stages" / "runtime", ignore=sources)
    shutil.copy(ROOT / "stages" / "__init__.py", tmp_path / "stages")
    done = subprocess.run(
        [sys.executable, "-c", DEPLOYED, recorded.bundle, "--prompt", "every morning", "--max-tokens", "5"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith(("TVM_", "PYTHON"))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == run(recorded.bundle, "--prompt", "every morning", "--max-tokens", 5)[1]
    assert done.stderr.splitlines()[-1] == "0 True [] []"


def test_json_of_any_text_is_json_and_moves_no_cursor():
    document = {"text": "".join(map(chr, range(0x250))) + "中\u202e\ufffd"}
    text = serving.json_text(document)
    assert json.loads(text) == document
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "中" in text
