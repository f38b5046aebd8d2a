"""Compiled models follow attach, detach and active: the cases of `compiled.py`, run in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import deltakit as dk


def test_compiled_models_follow_every_method():
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(here / "compiled.py")], capture_output=True, text=True, check=False, cwd=here, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert {name: result for name, result in results.items() if result != "ok"} == {}
    assert {name.split("-", 1)[1] for name in results} == set(dk.METHODS)
