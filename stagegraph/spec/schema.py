"""The JSON Schema of pipeline files, for editors: generated from the registry and from each stage's parameters.

It is as strict as a file by itself allows. A file that ``extends`` another may leave out what that one has; what
only a whole pipeline shows (cycles, unknown entries, values of references) is checked by ``stagegraph.spec.load``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from stagegraph.registry import get_stage, names
from stagegraph.spec import matrix, params, remotes, shell
from stagegraph.spec.entries import ENTRY_NAME, SHELL
from stagegraph.spec.load import NAME, VERSION
from stagegraph.spec.nodes import MEBIBYTES, SECONDS
from stagegraph.spec.scope import VARIABLE_NAME

if TYPE_CHECKING:
    from stagegraph.spec.params import Param

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_REFERENCE: Schema = {"type": "string", "pattern": r"^.*\$\{.*$"}
_IN_FILE = r"^[^:]*\.py:[A-Za-z_][A-Za-z0-9_]*$"
_SCALAR: Schema = {"type": ["string", "number", "boolean", "null"]}
_RECORD: Schema = {
    "type": "object",
    "required": [matrix.NAME],
    "additionalProperties": _SCALAR,
    "description": "a value with others of its own: ${each.KEY.FIELD}; name is part of the node's name",
}
_RULES: Schema = {"type": "array", "minItems": 1, "items": {"type": "object", "minProperties": 1}}
_LIST: Schema = {"type": "array", "items": _SCALAR}
_TYPES = {"str": "string", "Source": "string", "int": "integer", "float": "number", "bool": "boolean"}


def json_schema() -> Schema:
    """Return the schema (draft 2020-12) of a pipeline file that may use any known stage."""
    stages = names("stages")
    return {
        "$schema": DIALECT,
        "title": "stagegraph pipeline",
        "type": "object",
        "properties": {
            "version": {"const": VERSION, "description": "version of the file format"},
            "name": {
                "anyOf": [{"type": "string", "pattern": f"^{NAME.pattern}$"}, _REFERENCE],
                "description": "name of the pipeline; its artifacts are stored under it",
            },
            "extends": {"type": "string", "description": "another pipeline file, relative to this one, to overlay"},
            "vars": {
                "type": "object",
                "propertyNames": {"pattern": f"^{VARIABLE_NAME.pattern}$"},
                "additionalProperties": {"anyOf": [_SCALAR, _LIST]},
                "description": "values for ${vars.NAME}; --set NAME=VALUE overrides one",
            },
            "defaults": {
                "type": "object",
                "properties": {
                    "with": {"type": "object", "description": "parameters, for every stage that has them"},
                    **_shared(),
                },
                "additionalProperties": False,
                "description": "what entries share: keys for those without them, parameters for those not given them",
            },
            "remotes": {
                "type": "object",
                "additionalProperties": _remote(),
                "description": "where results are shared: name -> place; asked after those that the user configured",
            },
            "stages": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"pattern": f"^{ENTRY_NAME.pattern}$"},
                "properties": {stage: _own_entry(stage) for stage in stages},
                "additionalProperties": {"$ref": "#/$defs/entry"},
                "description": "the entries: each is a stage, or a use of one by another name",
            },
        },
        "additionalProperties": False,
        "if": {"not": {"required": ["extends"]}},
        "then": {
            "required": ["version", "name", "stages"],
            "properties": {
                "remotes": {"additionalProperties": {"required": ["url"]}},
                "stages": {"properties": dict.fromkeys(stages, True), "additionalProperties": {"required": ["uses"]}},
            },
            "if": {"not": {"required": ["defaults"]}},
            "then": {"properties": {"stages": {"properties": {stage: _complete(stage) for stage in stages}}}},
        },
        "$defs": {
            "entry": _entry(stages),
            **{f"with-{stage}": _with(stage) for stage in stages},
            f"with-{SHELL}": _shell(),
        },
    }


def _remote() -> Schema:
    url = "a directory, from this file, or one of " + ", ".join(f"{scheme}://" for scheme in remotes.SCHEMES)
    return {
        "type": "object",
        "properties": {
            "url": {"type": "string", "minLength": 1, "description": url},
            "mode": {
                "anyOf": [{"enum": list(remotes.MODES)}, _REFERENCE],
                "default": "read",
                "description": "whether results are taken from it, given to it, both or neither",
            },
        },
        "additionalProperties": False,
    }


def _entry(stages: list[str]) -> Schema:
    """Return the schema of an entry; the parameters of a stage apply where ``uses`` names it."""
    entries = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    return {
        "type": "object",
        "properties": {
            "uses": {
                "anyOf": [{"enum": [*stages, SHELL]}, {"type": "string", "pattern": _IN_FILE}, _REFERENCE],
                "description": "the stage, or FILE.py:CLASS for one beside this file; by default that of its own name",
            },
            "needs": {"anyOf": [entries, _REFERENCE], "description": "the entries whose outputs this one reads"},
            "with": {"type": "object", "description": "parameters of the stage"},
            **{key: {"anyOf": [schema, {"type": "null"}]} for key, schema in _shared().items()},
        },
        "additionalProperties": False,
        "allOf": [
            {
                "if": {"required": ["uses"], "properties": {"uses": {"const": stage}}},
                "then": {"properties": {"with": {"$ref": f"#/$defs/with-{stage}"}}},
            }
            for stage in [*stages, SHELL]
        ],
    }


def _shared() -> dict[str, Schema]:
    """Return the keys of an entry that ``defaults`` may have too, but for parameters; null leaves one out."""
    values: Schema = {"type": "array", "items": {"anyOf": [_SCALAR, _RECORD]}, "minItems": 1, "uniqueItems": True}
    lists: Schema = {"anyOf": [values, _REFERENCE]}
    return {
        "foreach": {
            "type": "object",
            "minProperties": 1,
            "properties": {
                "exclude": {"anyOf": [_RULES, lists], "description": "combinations that are left out, by their values"},
                "include": {"anyOf": [_RULES, lists], "description": "combinations more: a value for every key"},
            },
            "additionalProperties": lists,
            "description": "one node for every combination of these values; ${each.NAME} is its value",
        },
        "resources": {
            "type": "object",
            "properties": {
                "memory": {**_quantity(MEBIBYTES), "description": "most memory it may take, in MiB or as '2 GiB'"},
                "exclusive": {"anyOf": [{"type": "boolean"}, _REFERENCE], "description": "whether a node runs alone"},
                "labels": {
                    "anyOf": [{"type": "array", "items": {"type": "string"}}, _REFERENCE],
                    "description": "what a worker of a cluster must offer: NAME, or NAME=AMOUNT that it takes",
                },
            },
            "additionalProperties": False,
            "description": "what each node takes",
        },
        "timeout": {**_quantity(SECONDS), "description": "longest run of a node, in seconds or as '10m'"},
    }


def _shell() -> Schema:
    text: Schema = {"type": "string"}

    def named(names: re.Pattern[str], values: Schema, doc: str) -> Schema:
        keys = {"pattern": f"^{names.pattern}$"}
        return {"type": "object", "propertyNames": keys, "additionalProperties": values, "description": doc}

    input_ = {"anyOf": [{"type": "string", "pattern": f"^{shell.INPUT.pattern}$"}, _REFERENCE]}
    output = {"anyOf": [{"type": "string", "pattern": f"^{shell.PATH.pattern}$"}, _REFERENCE]}
    program = "a program and its arguments, or a text for bash; ${in.NAME} and ${out.NAME} are paths"
    return {
        "type": "object",
        "properties": {
            "cmd": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}], "description": program},
            "inputs": named(shell.NAME, input_, "what it reads of other entries: name -> ENTRY.OUTPUT"),
            "sources": named(shell.NAME, text, "files and folders it reads: name -> path"),
            "outputs": {
                **named(shell.NAME, output, "what it writes: name -> path below the folder it starts in"),
                "minProperties": 1,
            },
            "env": named(shell.VARIABLE, text, "the environment variables it gets"),
            "tools": {
                "anyOf": [{"type": "array", "items": text}, _REFERENCE],
                "description": "programs it runs, whose content counts",
            },
        },
        "additionalProperties": False,
    }


def _quantity(units: dict[str, int]) -> Schema:
    text = {"type": "string", "pattern": rf"^[0-9]+(\.[0-9]+)? ?({'|'.join(units)})$"}
    return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, text, _REFERENCE]}


def _own_entry(stage: str) -> Schema:
    """Return the schema of the entry named like a stage, which uses that stage unless it says otherwise."""
    return {
        "description": (type(get_stage(stage)).__doc__ or "").strip().partition("\n")[0],
        "$ref": "#/$defs/entry",
        "if": {"not": {"required": ["uses"]}},
        "then": {"properties": {"with": {"$ref": f"#/$defs/with-{stage}"}}},
    }


def _complete(stage: str) -> Schema:
    """Return what the entry named like a stage must have in a file that extends no other."""
    required = [param.name for param in params.declared(get_stage(stage)).values() if param.required]
    if not required:
        return {}
    given = {"required": ["with"], "properties": {"with": {"required": required}}}
    return {"if": {"not": {"required": ["uses"]}}, "then": given}


def _with(stage: str) -> Schema:
    declared = params.declared(get_stage(stage))
    return {
        "type": "object",
        "properties": {param.name: _param(param) for param in declared.values()},
        "additionalProperties": False,
    }


def _param(param: Param) -> Schema:
    element: Schema = {"type": _TYPES[param.kind]}
    allowed = param.names()
    if allowed is not None:
        element = {"enum": list(allowed)}
    if param.minimum is not None:
        element["minimum"] = param.minimum
    values = [{"type": "array", "items": {"anyOf": [element, _REFERENCE]}} if param.many else element, _REFERENCE]
    schema: Schema = {"description": param.doc, "anyOf": [*values, {"type": "null"}] if param.nullable else values}
    if not param.required:
        schema["default"] = list(param.default) if isinstance(param.default, tuple) else param.default
    return schema
