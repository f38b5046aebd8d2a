"""Code that runs in a process of its own, which has imported nothing yet."""

import subprocess
import sys
from textwrap import dedent


def in_a_process(code):
    """What the last line says that code prints in a process of its own."""
    ran = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return (ran.stdout.splitlines() or [""])[-1]
