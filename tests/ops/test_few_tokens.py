"""The hook of low-rank updates for a few tokens without gradients: when it adds the products itself, and when it must not."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from deltakit.core import OutputHook
from deltakit.methods.lora import LoRADelta
from deltakit.ops.few_tokens import FewTokensHook
from support.models import randomize

METHODS = {
    "lora": dk.LoRA(r=3, at="0"),
    "other": dk.LoRA(r=2, alpha=3, at="0"),
    "adalora": dk.AdaLoRA(init_r=3, target_r=2, total_steps=10, at="0"),
    "vera": dk.VeRA(r=2, at="0"),
    "adapter": dk.Adapter(size=2, at="0"),
    "dora": dk.LoRA(r=2, dora=True, at="0"),
}


def model_with(*names, layer=None, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7) if layer is None else layer).to(dtype)
    deltas = [randomize(dk.attach(model, METHODS[name], name=name)) for name in names]
    return model.eval(), deltas


@pytest.fixture
def general(monkeypatch):
    """Counts how often delta modules are called in the general way, and notes their keys."""
    calls, real = [], OutputHook.call_deltas

    def counted(self, keys, *args):
        calls.append(tuple(keys))
        return real(self, keys, *args)

    monkeypatch.setattr(OutputHook, "call_deltas", counted)
    return calls


def plainly(model, x):
    """The output as the autograd node or the plain formula computes it."""
    with torch.enable_grad():
        return model(x).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (2, 3, 5), (16, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
@pytest.mark.parametrize("names", [["lora"], ["lora", "other"], ["adalora", "vera", "lora"]], ids="-".join)
def test_products(general, names, kind, shape, dtype):
    model, _ = model_with(*names, layer=Conv1D(7, 5) if kind == "Conv1D" else None, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    wanted = plainly(model, x)
    general.clear()
    with torch.no_grad():
        found = model(x)
    assert not general
    torch.testing.assert_close(found, wanted, **({"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}))


def test_one_lora_against_its_formula(general):
    model, (delta,) = model_with("lora")
    (lora,) = delta.modules["0"]
    delta.scale = 0.7
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
    assert not general
    wanted = F.linear(x, model[0].weight, model[0].bias) + 0.7 * 16 / 3 * (x @ lora.A.T) @ lora.B.T
    torch.testing.assert_close(found, wanted)


class Other(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _own_forward(module):
    module.forward = module.forward


CHANGES = {
    "a hook on the delta module": lambda target: target.lora_lora.register_forward_hook(lambda *_: None),
    "a hook before the delta module": lambda target: target.lora_lora.register_forward_pre_hook(lambda *_: None),
    "a delta module with a forward of its own": lambda target: _own_forward(target.lora_lora),
    "a target with a forward of its own": _own_forward,
    "an after_call of its own": lambda target: setattr(target.lora_lora, "after_call", target.lora_lora.after_call),
    "another hook first": lambda target: target.register_forward_hook(lambda *_: None, prepend=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_general_after(general, change):
    model, _ = model_with("lora")
    x = torch.randn(2, 5, dtype=torch.float64)
    wanted = plainly(model, x)
    CHANGES[change](model[0])
    general.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    assert general == [("lora_lora",)]


AROUND = {
    "gradients": torch.enable_grad,
    "a dispatch mode": Other,
    "forward derivatives": forward_ad.dual_level,
    "a hook on all modules": lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    "a hook before all modules": lambda: torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("around", AROUND)
def test_general_under(general, around):
    model, _ = model_with("lora")
    x = torch.randn(2, 5, dtype=torch.float64)
    wanted = plainly(model, x)
    general.clear()
    with torch.no_grad(), AROUND[around]():
        torch.testing.assert_close(model(x), wanted)
    assert general == [("lora_lora",)]


def test_general_for_other_calls(general):
    model, _ = model_with("lora")
    x = torch.randn(17, 5, dtype=torch.float64)
    calls = {
        "17 tokens": lambda: model(x),
        "a keyword": lambda: model[0](input=x[:2]),
        "vmap": lambda: torch.vmap(model)(x[:2]),
    }
    for name, call in calls.items():
        general.clear()
        with torch.no_grad():
            call()
        assert general, name


def test_dropout_in_training_alone(general):
    model = nn.Sequential(nn.Linear(5, 7))
    randomize(dk.attach(model, dk.LoRA(r=2, at="0", dropout=0.5)))
    with torch.no_grad():
        model.train()(torch.randn(1, 5))
        assert len(general) == 1
        model.eval()(torch.randn(1, 5))
    assert len(general) == 1


@pytest.mark.parametrize("name", ["A", "B"])
def test_a_factor_of_another_dtype(general, name):
    model, _ = model_with("lora", dtype=torch.float32)
    factor = getattr(model[0].lora_lora, name)
    factor.data = factor.data.double()
    x = torch.randn(1, 5)
    wanted = plainly(model, x)
    general.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    assert general


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize("which", ["input", "output", "factor"])
def test_tensors_of_other_classes(general, which):
    """They may do anything with an operation in place."""
    model, _ = model_with("lora")
    x = torch.randn(2, 5, dtype=torch.float64)
    wanted = plainly(model, x)
    bare = F.linear(x, model[0].weight, model[0].bias).detach()
    if which == "factor":
        model[0].lora_lora._parameters["A"] = model[0].lora_lora.A.detach().as_subclass(Own)
    (hook,) = model[0]._forward_hooks.values()
    general.clear()
    with torch.no_grad():
        x, y = x.as_subclass(Own) if which == "input" else x, bare.as_subclass(Own) if which == "output" else bare
        found = hook(model[0], (x,), {}, y)
    assert general
    torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted)


def test_an_output_that_is_not_contiguous(general):
    model, _ = model_with("lora")
    x = torch.randn(2, 5, dtype=torch.float64)
    wanted = plainly(model, x)
    (hook,) = model[0]._forward_hooks.values()
    general.clear()
    with torch.no_grad():
        y = F.linear(x, model[0].weight, model[0].bias).T.contiguous().T
        torch.testing.assert_close(hook(model[0], (x,), {}, y), wanted)
    assert general


def test_from_the_first_other_method_on(general):
    """An adapter makes an output of its own, and what comes before it is added once."""
    model, _ = model_with("lora", "adapter", "other")
    x = torch.randn(1, 5, dtype=torch.float64)
    wanted = plainly(model, x)
    general.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    assert general == [("adapter_adapter", "other_lora")]


@pytest.mark.parametrize("off", ["inactive", "merged"])
def test_deltas_that_take_no_part(general, off):
    model, (first, second, _) = model_with("lora", "adapter", "other")
    x = torch.randn(1, 5, dtype=torch.float64)
    if off == "merged":
        second.detach()
        first.merge()
    else:
        second.active = first.active = False
    wanted = plainly(model, x)
    general.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    assert not general


def test_mixed_rows(general):
    model, (_, other) = model_with("lora", "other")
    x = torch.randn(2, 1, 5, dtype=torch.float64)
    with torch.no_grad():
        with dk.rows(model, ["lora", "other"]):
            found = model(x)
        assert general == [("lora_lora", "other_lora")]
        other.active = False
        torch.testing.assert_close(found[0], model(x[0]))


def hooks_of(model):
    return [type(hook) for hook in model[0]._forward_hooks.values()]


def test_the_first_delta_module_says_which_hook():
    """The hook object stays, so that no forward of another thread finds a target without one."""
    model, (adapter,) = model_with("adapter")
    (hook,) = model[0]._forward_hooks.values()
    assert hooks_of(model) == [OutputHook]
    lora = dk.attach(model, METHODS["lora"], name="lora")
    assert hooks_of(model) == [OutputHook]
    adapter.detach()
    assert hooks_of(model) == [FewTokensHook]
    adapter.attach()
    assert hooks_of(model) == [OutputHook]
    assert [*model[0]._forward_hooks.values()] == [hook]
    lora.detach()
    adapter.detach()
    assert hooks_of(model) == []
    assert hooks_of(model_with("dora")[0]) == [OutputHook]
    assert hooks_of(copy.deepcopy(model_with("lora")[0])) == [FewTokensHook]


def test_a_class_with_its_own_after_call_is_called():
    class Doubled(LoRADelta):
        def after_call(self, target, args, kwargs, output):
            return 2 * super().after_call(target, args, kwargs, output)

    class Below(Doubled):
        pass

    class Chosen(LoRADelta):
        output_hook = OutputHook

    assert {kind.output_hook for kind in (Doubled, Below, Chosen)} == {OutputHook}


def test_what_a_class_computes_is_used(general):
    """Its `scaling` is no attribute of the delta module."""

    class Scaled(LoRADelta):
        @property
        def scaling(self):
            return 2.0

        @scaling.setter
        def scaling(self, value):
            pass

    model, (delta,) = model_with("lora")
    (lora,) = delta.modules["0"]
    lora.__class__ = Scaled
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
    assert not general
    torch.testing.assert_close(found, F.linear(x, model[0].weight, model[0].bias) + 2 * (x @ lora.A.T) @ lora.B.T)
