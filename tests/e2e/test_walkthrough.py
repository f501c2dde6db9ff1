"""The command blocks of the pages, run line by line as they stand, on the example model.

``extending.md``, ``real-model.md`` and the two commands of the README have tests of their own (test_extending,
test_real_model, the suite itself).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.edited_project import ROOT, Project

BLOCK = re.compile(r"```(sh|console|python)\n(.*?)```", re.DOTALL)
# What stands on a page for something of the reader's, and what it is here.
INSTEAD = {
    "/models/SmolLM2-135M-Instruct": "checkpoint",
    "compile.cuda": "compile.llvm",
    "--tensor NAME": "--tensor lm_head.weight",
    "selftest tiny-qwen": "selftest dist/tiny-qwen",
    "stages.runtime tiny-qwen ": "stages.runtime dist/tiny-qwen ",
    "another-bundle": "dist/tiny-qwen",
    "artifacts/tiny-qwen/bundle.llvm/bundle": "dist/tiny-qwen",
}
# Lines that need what a test must not use, or that others run, and why.
NOT_HERE = {
    "pip install": "installs: the wheel is tested by itself",
    "pipeline init": "test_the_first_hour begins in an empty folder",
    "pipeline build": "as init",
    "scheme=q8f16_1": "the recorded reference has none of this scheme; test_the_first_hour computes one",
    "@eight-bits": "as above",
    "pipeline chat": "the example is no chat model; test_chat talks with one",
    "stages.runtime chat": "as above",
    "pipeline serve bundle.llvm": "the same as with a folder",
    "pipeline pull": "there is no remote; sharing has tests of its own",
    "schemes.yaml": "three schemes are three builds; its parts are those of test_compare",
    "--scheduler": "a cluster; test_cluster has one",
    "dask ": "as above",
    "examples/cluster/": "test_cluster runs what is in these files",
    "kubectl ": "as above",
    ". venv/bin/activate": "as above",
    "export TLS=": "as above",
    "ssh ": "another machine",
    "scp ": "another machine",
    "cd run": "another machine",
    "tiny-qwen-cuda": "a GPU",
    "pipeline remote key": "writes a key into the home directory",
    "hf://": "the network",
    "/somewhere/bin": "another environment",
    "STAGEGRAPH_TRANSFORMERS4": "as above",
    "dist/smollm2": "a chat model, which the example is not",
    "docs/serving.md": "as dist/",
    "examples/smollm2": "test_real_model",
    "artifacts/smollm2.yaml": "test_real_model",
    "printf": "test_real_model",
    "import openai": "test_serve_clients",
    "import tvm": "a part of a program; test_codegen and others call the library so",
    "vm.builtin": "as above",
}
PAGES = ["tutorial.md", "certificate.md", "tokenizers.md", "python.md", "install.md", "deploy.md"]
PAGES += ["everyday.md", "../README.md"]  # each builds several times
OTHERS = ["extending.md", "quantization.md", "real-model.md", "../CONTRIBUTING.md", "verbs.md"]


def lines(page: str) -> Iterator[str]:
    """Yield the commands of a page: a line of a shell each, or a whole block of Python."""
    for kind, block in BLOCK.findall((ROOT / "docs" / page).read_text()):
        if kind == "python":
            yield f"python - <<'PYTHON'\n{block}PYTHON"
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*", "", line).removeprefix("$ ").strip()
            if command and not (line.startswith("77b1") or command.startswith("#")):
                yield command


class Walk:
    """A shell in a folder, in which ``pipeline`` is the project's copy."""

    def __init__(self, project: Project) -> None:
        self.folder = project.folder
        programs = self.folder / "bin"
        programs.mkdir()
        for name, module in (("pipeline", " -m stagegraph.cli.main"), ("python", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
            (programs / name).chmod(0o755)
        path = os.pathsep.join([str(project.stages.parent), str(ROOT)])
        self._env = {
            **os.environ,
            "PYTHONPATH": path,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
        }

    def __call__(self, command: str) -> None:
        for words, here in INSTEAD.items():
            command = command.replace(words, here)
        print(f"$ {command}")
        if command.startswith(("pipeline serve", "pipeline watch")):
            self._until_interrupted(command.replace("pipeline serve", "pipeline serve --port 0"))
            return
        done = self._start(command).communicate("")
        print(*done, sep="")
        assert self.last.returncode == 0, command

    def _start(self, command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self.last = subprocess.Popen(
            ["bash", "-c", f"exec {command}" if command.startswith("pipeline") else command],
            cwd=self.folder, env=self._env, text=True, stdin=pipe, stdout=pipe, stderr=pipe,
        )  # fmt: skip
        return self.last

    def _until_interrupted(self, command: str) -> None:
        """Run until it says that it is ready, look at what it serves, and end it as Ctrl-C does."""
        process = self._start(command)
        assert process.stderr
        for line in process.stderr:
            print(line, end="")
            if found := re.search(r"http://\S+/v1", line):
                urllib.request.urlopen(f"{found[0]}/models").read()  # noqa: S310 - our own server
            if found or "Ctrl-C" in line:
                break
        else:
            pytest.fail(f"{command} ended by itself")
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode in {0, 130}


@pytest.fixture
def walk(project: Project) -> Walk:
    """The built example pipeline as a project of its own, as a reader has it after the first run."""
    (project.folder / "overlay.yaml").rename(project.folder / "pipeline.yaml")
    return Walk(project)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_does_what_it_says(walk: Walk, page: str) -> None:
    if page == "tokenizers.md":  # which takes up where another page has ended
        walk("pipeline export bundle.llvm:bundle dist/tiny-qwen")
    ran = 0
    for command in lines(page):
        if page == "certificate.md" and "openssl" in command:
            pytest.importorskip("model_signing")
            if not shutil.which("openssl"):
                pytest.skip("openssl is not installed")
        if not any(words in command for words in NOT_HERE):
            walk(command)
            ran += 1
    assert ran


@pytest.mark.slow
def test_the_first_hour_from_an_empty_folder(walk: Walk) -> None:
    """The tutorial as it stands, with its own init and run; nothing is there before."""
    pytest.importorskip("torch")
    new = walk.folder / "new"
    new.mkdir()
    shutil.copytree(walk.folder / "checkpoint", new / "checkpoint")
    walk.folder = new
    for command in lines("tutorial.md"):
        if "chat" not in command:
            walk(command)
    built = Path("dist/one")
    walk(f"pipeline build checkpoint -o {built}")
    assert (new / built / "certificate.json").exists()


def test_every_page_with_commands_is_walked_or_has_a_reason() -> None:
    pages = {os.path.relpath(path, ROOT / "docs") for path in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]}
    left = []
    for page in sorted(pages - {*PAGES, *OTHERS}):
        left += [f"{page}: {line}" for line in lines(page) if not any(words in line for words in NOT_HERE)]
    assert left == []
