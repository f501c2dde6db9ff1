"""The compiler profile: what a worker has loaded, and has not, before it compiles."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

from stages.ir import compat

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from stages import profiles
profiles.compiler()
profiles.compiler()
import tvm
print(json.dumps({"compiler": not tvm.base._RUNTIME_ONLY, "torch": "torch" in sys.modules}))
"""


def test_the_compiler_is_loaded_quietly_and_without_torch():
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}  # as a shell may have it that ran a bundle before
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    assert json.loads(done.stdout) == {"compiler": True, "torch": False}
    assert done.stderr == ""


def test_cached_module_lookups_answer_as_the_standard_library_does(monkeypatch):
    original = getattr(inspect.getmodule, "__wrapped__", inspect.getmodule)
    asked = [sys._getframe(), sys._getframe().f_code, json.dumps, json.JSONDecoder, json, compat.cache_module_lookups]
    expected = [original(item) for item in asked]
    monkeypatch.setattr(inspect, "getmodule", original)
    compat.cache_module_lookups()
    assert inspect.getmodule is not original
    assert [inspect.getmodule(item) for item in asked * 2] == expected * 2
    cached = inspect.getmodule
    compat.cache_module_lookups()
    assert inspect.getmodule is cached
