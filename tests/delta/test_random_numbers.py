"""Only attaching a new delta draws random numbers: all other calls leave every generator as it was."""

import copy
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.cli import main
from deltakit.ops import OutputMap, like
from support.kind_methods import registered
from support.models import Transformer, attached, ids, randomize
from support.tiny_transformers import build

METHODS = {
    "lora": dk.LoRA(r=3),
    "adapter": dk.Adapter(size=5),
    "bitfit": dk.BitFit(),
    "ia3": dk.IA3(),
    "prefix": dk.Prefix(tokens=3),
    "prefix_reparam": dk.Prefix(tokens=3, reparam=True, hidden=7),
    "soft_prompt": dk.SoftPrompt(tokens=3),
    "soft_prompt_random": dk.SoftPrompt(tokens=3, init="random"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def generators():
    """The state of every generator but Python's own, from which the type checks of the tests draw."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    _, keys, *others = numpy.random.get_state()
    return [bytes(state) for state in (torch.random.get_rng_state(), *cuda)], keys.tobytes(), others


@pytest.fixture
def model():
    return Transformer().eval()


@pytest.fixture
def unchanged():
    """Checks that a call changes no generator, and returns its result."""

    def check(call):
        torch.manual_seed(17)
        numpy.random.seed(17)
        before = generators()
        result = call()
        assert generators() == before
        return result

    return check


class NoisyDelta(OutputMap):
    """A delta module of somebody else, which draws from all generators."""

    def __init__(self, target):
        super().__init__(target)
        start = random.random() + float(numpy.random.rand())
        self.shift = nn.Parameter(torch.randn(self.size, **like(target)) + start)

    def forward(self, x, y):
        return y + self.shift


@dataclass(frozen=True, kw_only=True)
class Noisy(dk.Method):
    name = "test_noisy"
    kind = NoisyDelta
    identity = False


@every_method
def test_looking_saving_and_loading_draw_nothing(model, method, unchanged, tmp_path):
    unchanged(lambda: repr(dk.plan(model, method)))
    delta = dk.attach(model, method)
    unchanged(lambda: (repr(delta), str(dk.show(model)), repr(dk.roles(model)), dk.select(model, "**")))
    randomize(delta)
    unchanged(lambda: delta.save(tmp_path))
    unchanged(lambda: (delta.detach(), delta.attach(), delta.state_dict(), dk.deltas(model)))
    unchanged(lambda: delta.load_state_dict(delta.state_dict()))
    unchanged(lambda: (copy.deepcopy(model), model.state_dict(), dk.base_state_dict(model)))
    unchanged(lambda: (setattr(delta, "active", False), setattr(delta, "trainable", False)))
    delta.detach()
    unchanged(lambda: dk.load(tmp_path, model)).detach()
    unchanged(lambda: dk.load(tmp_path, model, attach=False))


@pytest.mark.parametrize("command", ["show", "roles"])
def test_the_command_line_draws_nothing(command, unchanged, tmp_path, capsys):
    build("gpt2").config.save_pretrained(tmp_path)
    assert unchanged(lambda: main([command, str(tmp_path)])) == 0


def test_merging_swapping_combining_and_mixed_batches_draw_nothing(model, unchanged):
    first = dk.attach(model, dk.LoRA(r=3), name="first")
    second = dk.attach(model, dk.LoRA(r=3), name="second")
    unchanged(lambda: dk.combine(model, {"first": 0.5, "second": -1.5}))
    unchanged(lambda: dk.combine(model, {"first": 0.5, "second": -1.5}, rank=2))
    unchanged(lambda: first.swap(second))
    unchanged(lambda: second.detach())
    unchanged(lambda: (first.merge(), first.unmerge()))
    second.attach()
    with dk.rows(model, ["first", None, "second"]):
        unchanged(lambda: model(ids(3)))


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
def test_measuring_a_fused_projection_draws_nothing(kind, unchanged):
    model = build(kind)
    unchanged(lambda: dk.select(model, "@attn.q"))
    unchanged(lambda: dk.roles(model))


def test_a_method_that_draws_by_itself(model, unchanged, tmp_path):
    with registered(Noisy):
        method = Noisy(at="@attn.q")
        unchanged(lambda: dk.plan(model, method))
        delta = attached(model, method)
        delta.save(tmp_path)
        delta.detach()
        loaded = unchanged(lambda: dk.load(tmp_path, model))
        for name, value in delta.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


PYTHONS_OWN = """
import random, sys, torch
import deltakit as dk
from support.kind_methods import registered
from support.models import Transformer
from delta.test_random_numbers import METHODS, Noisy
for method in (*METHODS.values(), Noisy(at="@attn.q")):
    with registered(Noisy):
        model = Transformer()
        delta = dk.attach(model, method)
        before = random.getstate()
        delta.save(sys.argv[1])
        delta.detach()
        dk.load(sys.argv[1], model).detach()
        dk.plan(model, method), dk.show(model), dk.roles(model)
        assert random.getstate() == before, method
"""


def test_pythons_own_generator(tmp_path):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests.parent, tests)))
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", PYTHONS_OWN, str(tmp_path)], env=environment, check=True)


def test_a_call_that_fails_draws_nothing(unchanged):
    # Many layers are built before the one that is too small for the rank.
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 7), nn.Linear(7, 2))

    def failing(call):
        with pytest.raises(dk.DeltaError):
            call()

    unchanged(lambda: failing(lambda: dk.attach(model, dk.LoRA(r=3, at="**"))))
    unchanged(lambda: failing(lambda: dk.plan(model, dk.LoRA(r=3, at="**"))))
    # Without attention, the message of the prefix may try other methods on the layers that it names.
    unchanged(lambda: failing(lambda: dk.attach(model, dk.Prefix())))
    unchanged(lambda: failing(lambda: dk.attach(model, dk.IA3(at="@attn.q"))))
    dk.attach(model, dk.LoRA(r=2, at="0"), name="taken")
    unchanged(lambda: failing(lambda: dk.attach(model, dk.LoRA(r=2, at="1"), name="taken")))


@every_method
def test_start_values_do_not_depend_on_a_plan_before(model, method):
    def start(look):
        twin = copy.deepcopy(model)
        torch.manual_seed(5)
        if look:
            dk.plan(twin, method)
            dk.select(twin, "@attn.q")
        return dk.attach(twin, method).state_dict()

    plain, looked = start(False), start(True)
    assert plain.keys() == looked.keys()
    assert all(torch.equal(plain[name], looked[name]) for name in plain)


@every_method
def test_values_that_are_loaded_are_not_drawn_before(model, method, tmp_path, monkeypatch):
    attached(model, method).save(tmp_path)
    dk.deltas(model)[0].detach()

    def drawn(*args, **kwargs):
        raise AssertionError("start values were drawn")

    for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, drawn)
    monkeypatch.setattr(torch, "randint", drawn)
    dk.load(tmp_path, model)
    if not getattr(method, "reparam", False):
        dk.plan(model, method)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_generators_of_devices_in_use(kind, model, monkeypatch):
    """On a machine without one: what is asked for is given back."""
    device, given = getattr(torch, kind), []
    monkeypatch.setattr(device, "is_initialized", lambda: True)
    monkeypatch.setattr(device, "get_rng_state_all", lambda: ["the state"])
    monkeypatch.setattr(device, "set_rng_state_all", given.append)
    dk.plan(model, dk.LoRA(r=3))
    assert given
    assert all(state == ["the state"] for state in given)
