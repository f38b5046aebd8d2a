"""The notebooks run, and the outputs in them are those of the code that is here."""

import json
import os
import re

import pytest

from support.notebook import run, texts, write
from support.paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def without_numbers(outputs):
    """What two machines have in common: their last digits differ, and so the widths of columns."""
    return {name: [re.sub(r"[\d.,]+|\s+", " ", text).split() for text in shown] for name, shown in outputs.items()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(path, tmp_path, monkeypatch):
    before = path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ran = run(path)
    if os.environ.get("DELTAKIT_UPDATE_GOLDEN"):
        write(path, ran)
        return
    stored = json.loads(before)
    assert without_numbers(texts(stored)) == without_numbers(texts(ran))
    assert len({cell["id"] for cell in stored["cells"]}) == len(stored["cells"])


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["structure", "train_and_compare"]
