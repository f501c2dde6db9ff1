"""The engine on 12 trivial stages, beside doit and DVC where they are installed; all in one run on one machine.

Usage: python benchmarks/dag.py [--runs N] [--keep DIR]   (exit status 1 if a figure of ours is missed)

small.txt -> s01; a 1 GiB big.bin -> s02; s01, s02 -> s03 -> s04 and s05 -> s06 -> s07 -> s08 -> s09 -> s10, s06 -> s11;
s10, s11 and one YAML parameter -> s12. Times are CPU seconds with all child processes, medians; how many stages ran is
counted by the stages themselves.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
MARK = "@value@"  # in the template of a file, where the parameter goes
NEEDS = {
    "s01": [], "s02": [], "s03": ["s01", "s02"], "s04": ["s03"], "s05": ["s03"], "s06": ["s04", "s05"],
    "s07": ["s06"], "s08": ["s07"], "s09": ["s08"], "s10": ["s09"], "s11": ["s06"], "s12": ["s10", "s11"],
}  # fmt: skip
SOURCES = {"s01": "small.txt", "s02": "big.bin"}
BOUNDS = {"nothing changed": (0.12, 0), "all outputs deleted": (0.3, 0), "leaf parameter": (0.5, 1)}
COUNTS = {"input touched": 0, "edit, same output": 1}

# What a stage does, in every tool: its inputs' digest, repeated to about 4 KiB. A source is judged by its first MiB.
WORK = '''
import hashlib, os, sys
from pathlib import Path

def work(name, sources, parameter=""):
    """Return the output."""
    with open(os.environ["COUNT_FILE"], "a") as file:
        file.write(name + "\\n")
    digest = hashlib.sha256((name + parameter).encode())
    for path in sources:
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
    return (digest.hexdigest() + "\\n") * 64
'''
STAGE = '''
    """The stage {name}."""
    from __future__ import annotations
    from dataclasses import dataclass
    from dag_stages.work import work
    from stagegraph.stage import Context, In, Out, Source, Stage, param, source

    class Step(Stage):
        """One of twelve."""
        id = "{name}"

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            value: str = param("a value", default="")
            source: Source = source("a file", include=("*",), optional=True)

        inputs = {inputs}
        outputs = {{"out": Out("out.txt", "the output")}}

        def run(self, ctx: Context) -> None:
            EDIT = 0
            paths = [ctx.input(port) for port in sorted(self.inputs)]
            if ctx.params.source:
                paths += ctx.source("source").files.values()
            (ctx.out / "out.txt").write_text(work("{name}", paths, ctx.params.value))
'''
SCRIPT = """
EDIT = 0
Path(sys.argv[2]).write_text(work(sys.argv[1], [p for p in sys.argv[4:]], sys.argv[3]))
"""


@dataclass
class Tool:
    """One build tool in a directory of its own: the command that runs everything, and where the scenarios reach in."""

    name: str
    folder: Path
    command: list[str]
    env: dict[str, str]
    outputs: Callable[[], list[Path]]
    parameter: tuple[Path, str]  # a file, and its text with MARK in place of the value
    code: Path  # that makes s03

    def run(self) -> tuple[float, int]:
        """Run everything; return CPU seconds and how many stages ran."""
        counter = self.folder / "count"
        counter.unlink(missing_ok=True)
        env = {**os.environ, **self.env, "COUNT_FILE": str(counter)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(self.command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stdout}{done.stderr}")
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return seconds, len(counter.read_text().split()) if counter.exists() else 0


def ours(folder: Path) -> Tool:
    """Write the pipeline for this engine."""
    stages = folder / "dag_stages"
    stages.mkdir(parents=True)
    (stages / "work.py").write_text('"""What a stage does."""\n' + WORK, encoding="utf-8")
    lines = ["version: 1", "name: dag", f'vars: {{value: "{MARK}"}}', "stages:"]
    for name, needs in NEEDS.items():
        inputs = ", ".join(f'"{need}": In("{need}", "out", "what came before")' for need in needs)
        text = textwrap.dedent(STAGE.format(name=name, inputs="{" + inputs + "}"))
        (stages / f"{name}.py").write_text(text.lstrip(), encoding="utf-8")
        given = f"source: {SOURCES[name]}" if name in SOURCES else 'value: "${vars.value}"' if name == "s12" else ""
        lines.append(f"  {name}: {{needs: [{', '.join(needs)}], with: {{{given}}}}}")
    code = (
        f"from stagegraph import registry; stages = {{n: f'dag_stages.{{n}}:Step' for n in {list(NEEDS)}}}; "
        "registry.shipped = lambda: registry.Provider(stages=stages);"
        "from stagegraph.cli.main import main; main()"
    )
    env = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, "-c", code, "run", "dag.yaml"]
    shown = folder / "artifacts" / "dag"
    template = "\n".join(lines) + "\n"
    return Tool(
        "stagegraph",
        folder,
        command,
        env,
        lambda: [*shown.glob("*/*")],
        (folder / "dag.yaml", template),
        stages / "s03.py",
    )


def scripts(folder: Path) -> dict[str, list[str]]:
    """Write one script for each stage; return the command of each, ``VALUE`` standing for the parameter."""
    folder.mkdir(parents=True)
    commands = {}
    for name, needs in NEEDS.items():
        (folder / f"{name}.py").write_text(WORK + SCRIPT, encoding="utf-8")
        read = [*(f"{need}.txt" for need in needs), *([SOURCES[name]] if name in SOURCES else [])]
        value = "VALUE" if name == "s12" else "-"
        commands[name] = [sys.executable, "-S", f"{name}.py", name, f"{name}.txt", value, *read]
    return commands


def doit(folder: Path, program: str) -> Tool:
    """Write the same for doit."""
    commands = scripts(folder)
    lines = ["import yaml", "VALUE = str(yaml.safe_load(open('params.yaml'))['value'])"]
    for name, command in commands.items():
        read = [*command[6:], f"{name}.py"]
        action = repr([*command]).replace("'VALUE'", "VALUE")
        config = ", 'uptodate': [__import__('doit').tools.config_changed(VALUE)]" if name == "s12" else ""
        task = f"'actions': [{action}], 'file_dep': {read!r}, 'targets': ['{name}.txt']{config}"
        lines.append(f"def task_{name}(): return {{{task}}}")
    (folder / "dodo.py").write_text("import doit.tools\n" + "\n".join(lines) + "\n", encoding="utf-8")
    parameter = (folder / "params.yaml", f"value: '{MARK}'\n")
    return Tool("doit", folder, [program], {}, lambda: [*folder.glob("s[0-9]*.txt")], parameter, folder / "s03.py")


def dvc(folder: Path, program: str) -> Tool:
    """Write the same for DVC, without Git."""
    commands = scripts(folder)
    lines = ["stages:"]
    for name, command in commands.items():
        line = " ".join(command).replace("VALUE", "${value}")
        lines += [f"  {name}:", f"    cmd: {line}", f"    deps: [{', '.join([*command[6:], name + '.py'])}]"]
        lines += [f"    outs: [{name}.txt]"] + (["    params: [value]"] if name == "s12" else [])
    (folder / "dvc.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parameter = (folder / "params.yaml", f"value: '{MARK}'\n")
    env = {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(folder / "site")}
    subprocess.run([program, "init", "--no-scm", "-q"], cwd=folder, check=True, env={**os.environ, **env})
    command = [program, "repro", "-q"]
    return Tool("dvc", folder, command, env, lambda: [*folder.glob("s[0-9]*.txt")], parameter, folder / "s03.py")


def delete_outputs(tool: Tool, _: int) -> None:
    """Delete everything that was made."""
    for path in tool.outputs():
        path.unlink()


def set_parameter(tool: Tool, number: int) -> None:
    """Give s12 a value it never had."""
    path, template = tool.parameter
    path.write_text(template.replace(MARK, f"v{number}"), encoding="utf-8")


def touch_input(tool: Tool, _: int) -> None:
    """Touch the large source."""
    os.utime(tool.folder / "big.bin")


def edit_code(tool: Tool, number: int) -> None:
    """Change the code of s03 in a way that changes no output."""
    before, _, after = tool.code.read_text(encoding="utf-8").partition("EDIT = ")
    tool.code.write_text(f"{before}EDIT = {number}\n" + after.partition("\n")[2], encoding="utf-8")


SCENARIOS: dict[str, Callable[[Tool, int], None]] = {
    "nothing changed": lambda _tool, _number: None,
    "all outputs deleted": delete_outputs,
    "leaf parameter": set_parameter,
    "input touched": touch_input,
    "edit, same output": edit_code,
}


def measure(tool: Tool, scenario: str, runs: int) -> tuple[float, set[int]]:
    """Return the median CPU seconds of a scenario, and every number of stages that ran."""
    times, counts = [], set()
    for number in range(runs):
        SCENARIOS[scenario](tool, number + 1)
        time.sleep(0.06)  # a file that was written within the clock's tick is not trusted
        seconds, ran = tool.run()
        times.append(seconds)
        counts.add(ran)
    return statistics.median(times), counts


def set_up(folder: Path) -> list[Tool]:
    """Write the sources once and every tool's files beside links to them."""
    source = folder / "big.bin"
    with source.open("wb") as file:
        block = os.urandom(16 << 20)
        for _ in range(GIB // len(block)):
            file.write(block)
    print(f"Python {platform.python_version()}")
    tools = [ours(folder / "stagegraph")]
    for name, make in (("doit", doit), ("dvc", dvc)):
        program = shutil.which(name)
        if program:
            version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
            print(f"{name} {version[0]}")
            tools.append(make(folder / name, program))
        else:
            print(f"{name}: not installed")
    for tool in tools:
        os.link(source, tool.folder / "big.bin")
        (tool.folder / "small.txt").write_text("small\n", encoding="utf-8")
        set_parameter(tool, 0)
        tool.run()
        time.sleep(0.1)
        tool.run()
    return tools


def main() -> int:
    """Measure everything, print the table, say whether all of ours is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each scenario")
    parser.add_argument("--keep", type=Path, help="work here and leave it; default: a temporary directory")
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps its byte code
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="stagegraph-dag-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tools = set_up(folder)
        names = "".join(f"{tool.name:>20}" for tool in tools)
        print(f"{'CPU s (stages run)':<20}{names}  required of stagegraph")
        missed = [scenario for scenario in SCENARIOS if not _row(tools, scenario, args.runs)]
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if missed else 0


def _row(tools: list[Tool], scenario: str, runs: int) -> bool:
    found = [measure(tool, scenario, runs) for tool in tools]
    bound, count = BOUNDS.get(scenario, (None, COUNTS.get(scenario)))
    (seconds, counts), *_ = found
    met = (bound is None or seconds <= bound) and counts == {count}
    cells = [f"{s:.3f} ({'/'.join(map(str, sorted(n)))})" for s, n in found]
    required = (f"<= {bound} s, " if bound else "") + f"{count} run"
    print(
        f"{scenario:<20}" + "".join(f"{cell:>20}" for cell in cells) + f"  {required:<16} {'met' if met else 'MISSED'}"
    )
    return met


if __name__ == "__main__":
    sys.exit(main())
