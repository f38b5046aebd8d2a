"""Where the files that tests read lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
CHECKPOINTS = TESTS / "checkpoints"
SUPPORT = TESTS / "support"
