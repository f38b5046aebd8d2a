"""Compiled models follow attach, detach and active: the cases of `compiled_models.py`, run in a process of its own."""

import json
import subprocess
import sys

import deltakit as dk
from support.paths import TESTS


def test_compiled_models_follow_every_method():
    run = subprocess.run(
        [sys.executable, "-m", "support.compiled_models"], capture_output=True, text=True, check=False, cwd=TESTS
    )
    assert run.returncode == 0, run.stderr[-2000:]
    results = json.loads(run.stdout)
    assert {name: result for name, result in results.items() if result != "ok"} == {}
    assert {name.split("-", 1)[1] for name in results} == set(dk.METHODS)
