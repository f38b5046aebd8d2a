"""Python's garbage collector rests while delta modules are built, and works again afterwards, whatever happened."""

import gc

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.core import collections_paused


@pytest.fixture(autouse=True)
def working():
    gc.enable()
    yield
    gc.enable()


def test_it_rests_while_delta_modules_are_built(tmp_path, monkeypatch):
    working, build_at = [], dk.LoRA.build_at

    def looking(self, target):
        working.append(gc.isenabled())
        return build_at(self, target)

    monkeypatch.setattr(dk.LoRA, "build_at", looking)
    model = nn.Sequential(nn.Linear(3, 3))
    dk.plan(model, dk.LoRA(r=1, at="0"))
    delta = dk.attach(model, dk.LoRA(r=1, at="0"))
    torch.nn.init.normal_(next(delta.parameters()))
    delta.save(tmp_path)
    delta.detach()
    dk.load(tmp_path, model)
    assert len(working) >= 3
    assert not any(working)
    assert gc.isenabled()


def test_it_works_again_after_an_error():
    with pytest.raises(dk.OptionError):
        dk.attach(nn.Sequential(nn.Linear(3, 3)), dk.LoRA(r=5, at="0"))
    assert gc.isenabled()


def test_blocks_inside_each_other():
    with collections_paused():
        with collections_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_user_who_has_stopped_it_finds_it_so():
    gc.disable()
    with collections_paused():
        pass
    assert not gc.isenabled()


def test_an_interruption_ends_the_pause():
    with pytest.raises(KeyboardInterrupt), collections_paused():
        raise KeyboardInterrupt
    assert gc.isenabled()
