"""``pipeline completion SHELL``: prints a completion script for a shell, which calls ``pipeline complete WORD...``.

Completed are verbs, options, the values an option chooses from, and the names of nodes in the nearest pipeline.yaml or
the file that the command line names.

Why no library does it: shtab writes scripts that are fixed when they are printed, and the nodes are those of the
pipeline file at hand; argcomplete wants one parser of all verbs, of which only the one that is typed is imported here.
Either would leave to be written which argument names a node, which is most of this module.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from stagegraph.cli.common import locate
from stagegraph.cli.verbs import build_parser, references, verb_names

EXAMPLE = 'eval "$(pipeline completion bash)"    # in ~/.bashrc'
NODES = {"NODE", "REF", "A", "B"}  # arguments that name nodes
NODE_OPTIONS = {"--stage", "--from", "--until", "--debug"}

BASH = """\
_pipeline() {
  local IFS=$'\\n' found
  COMPREPLY=()
  for found in $(pipeline complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); do
    COMPREPLY+=("$(printf '%q' "$found")")
  done
}
complete -o default -F _pipeline pipeline
"""
ZSH = """\
#compdef pipeline
_pipeline() {
  local -a found
  found=("${(@f)$(pipeline complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "$found" ]]; then compadd -- $found; else _files; fi
}
compdef _pipeline pipeline
"""
FISH = """\
function __pipeline_complete
  set -l word (commandline -ct)
  set -l found (pipeline complete (commandline -opc)[2..] "$word" 2>/dev/null)
  if test -n "$found"
    printf '%s\\n' $found
  else
    __fish_complete_path "$word"
  end
end
complete -c pipeline -f -a '(__pipeline_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shell", choices=tuple(SCRIPTS), metavar="SHELL", help=f"one of {', '.join(SCRIPTS)}")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    print(SCRIPTS[args.shell], end="")
    return 0


def complete(words: list[str]) -> list[str]:
    """Return the completions of the last word; empty where the shell should complete file names."""
    *before, word = words or [""]
    word = word.strip("'\"").replace("\\", "")  # as the shell quotes it
    names: Iterable[str] = verb_names() if not before else ()
    if before and before[0] in verb_names():
        actions = build_parser(before[0])._actions  # noqa: SLF001 - argparse tells its options in no other way
        options = {option: action for action in actions for option in action.option_strings}
        expected = _expected(actions, options, before)
        if word.startswith("-") and not _takes(options, before[-1]):
            names = options
        elif expected is not None and _names_node(before[0], expected):
            names = _nodes(before)
        elif expected is not None:
            names = [str(choice) for choice in expected.choices or ()]
    return sorted(name for name in names if name.startswith(word))


def _expected(
    actions: list[argparse.Action], options: dict[str, argparse.Action], before: list[str]
) -> argparse.Action | None:
    """Return the option whose value is being typed, or else the positional argument."""
    if _takes(options, before[-1]):
        return options[before[-1]]
    given = [w for i, w in enumerate(before[1:]) if not w.startswith("-") and not _takes(options, before[i])]
    positional = [action for action in actions if not action.option_strings]
    return positional[len(given)] if len(given) < len(positional) else None


def _names_node(verb: str, argument: argparse.Action) -> bool:
    """Say whether an argument takes a node's name, alone or as an alternative to a path."""
    return (
        argument.metavar in NODES
        or argument.dest in references(verb)
        or not NODE_OPTIONS.isdisjoint(argument.option_strings)
    )


def _takes(options: dict[str, argparse.Action], word: str) -> bool:
    return word in options and options[word].nargs != 0


def _nodes(words: list[str]) -> list[str]:
    """Return the names of entries and nodes of the pipeline file on the command line, or of the nearest one."""
    from stagegraph.errors import PipelineError
    from stagegraph.project import Project

    file = next((word for word in words if word.endswith((".yaml", ".yml"))), None) or locate()
    try:
        with Project(file) as project:
            nodes = project.dag.pipeline.nodes
    except PipelineError:
        return []
    return list({node.entry for node in nodes} | {node.name for node in nodes})
