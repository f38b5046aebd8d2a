"""Updates computed again in the backward pass, when something is different from what it was in the forward."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import deltakit as dk
from support.models import method_of, randomize
from support.processes import in_a_process

D_IN, D_OUT = 6, 8
AGAIN = ["loha", "hira", "glora", "boft", "shira", "fourierft", "waveft", "randlora", "said"]
every_method = pytest.mark.parametrize("name", AGAIN)


def attached(name, change=lambda layer: None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
    change(model[0])
    return model, randomize(dk.attach(model, method_of(name, at="0")))


def inputs():
    return torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)


def hooked(delta):
    for modules in delta.modules.values():
        for module in modules:
            module.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("way", ["plain", "hooked", "create_graph"])
@pytest.mark.parametrize("name", [*AGAIN, "c3a"])
def test_a_delta_that_is_frozen_after_the_forward(name, way):
    """Gradients go on to what is below it, as through a frozen layer of torch."""
    model, delta = attached(name)
    if way == "hooked":
        hooked(delta)
    x = inputs()
    (wanted,) = torch.autograd.grad(model(x).square().sum(), x)
    loss = model(x).square().sum()
    delta.trainable = False
    if way == "create_graph":
        (found,) = torch.autograd.grad(loss, x, create_graph=True)
    else:
        loss.backward()
        found = x.grad
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is None for parameter in delta.parameters())


@every_method
def test_one_parameter_that_is_frozen_after_the_forward(name):
    model, delta = attached(name)
    first, *others = delta.parameters()
    wanted = torch.autograd.grad(model(inputs()).sum(), [first, *others], allow_unused=True)
    loss = model(inputs()).sum()
    first.requires_grad_(False)
    loss.backward()
    assert first.grad is None
    assert [p.grad is None for p in others] == [gradient is None for gradient in wanted[1:]]


@pytest.mark.parametrize("name", ["shira", "fourierft", "waveft", "randlora", "said"])
def test_functional_calls_with_other_buffers(name):
    """Such as those of a base on the meta device, whose own buffers have no values."""
    model, delta = attached(name)
    parameters = list(delta.parameters())
    x = inputs()
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    base = copy.deepcopy(model).to("meta")
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    output = torch.func.functional_call(base, state, (x,))
    found = torch.autograd.grad(output.square().sum(), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", ["one parameter", "the weight"])
@pytest.mark.parametrize("name", ["hira", "glora", "boft"])
def test_a_functional_call_of_a_part_of_what_has_hooks_is_an_error(name, given):
    model, delta = attached(name)
    hooked(delta)
    names = [path for path, p in model.named_parameters() if (path == "0.weight") is (given == "the weight")]
    path = next(path for path in names if not path.endswith("bias"))
    other = model.get_parameter(path).detach() * 2
    other.requires_grad_(given != "the weight")
    y = torch.func.functional_call(model, {path: other}, (inputs(),))
    with pytest.raises(
        dk.StateError, match="gradients would be lost or wrong: call backward inside torch.func.functional_"
    ):
        y.sum().backward()


@pytest.mark.parametrize("name", ["loha", "hira", "glora", "boft"])
def test_hooks_alone_change_nothing(name):
    model, delta = attached(name)
    x, parameters = inputs(), list(delta.parameters())
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    hooked(delta)
    with torch.autograd.graph.save_on_cpu():
        loss = model(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), wanted, rtol=1e-12, atol=1e-12)


class TestWeightsThatMove:
    """`spectral_norm` makes one step of its power iteration each time its weight is read in training."""

    @staticmethod
    def spectral(layer):
        nn.utils.parametrizations.spectral_norm(layer)

    @pytest.mark.parametrize("name", ["loha", "hira", "glora", "boft"])
    def test_an_untrained_delta_moves_nothing(self, name):
        models = []
        for method in (None, method_of(name, at="0")):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(D_IN, D_OUT)).double()
            self.spectral(model[0])
            if method is not None:
                dk.attach(model, method)
            models.append(model.train())
        x = inputs()
        for _ in range(3):
            bare, own = (model(x) for model in models)
            torch.testing.assert_close(own, bare, rtol=1e-12, atol=1e-12)
            own.sum().backward()
        bare, own = (dict(model.named_buffers()) for model in models)
        for path, value in bare.items():
            torch.testing.assert_close(own[path], value, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", ["hira", "boft"])
    def test_gradients_are_those_of_their_own_forward(self, name):
        model, delta = attached(name, self.spectral)
        parameters, x = list(delta.parameters()), inputs()
        model.eval()
        model(x)
        model.train()
        loss = model(x).square().sum()
        # In evaluation the weight is that of the last step.
        wanted = torch.autograd.grad(model.eval()(x).square().sum(), parameters)
        model.train()
        # A second forward goes one step further.
        model(x)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "prune"])
@pytest.mark.parametrize("name", ["hira", "glora", "boft"])
def test_weights_that_a_hook_computes_in_each_forward(name, how):
    def change(layer):
        if how == "prune":
            prune.random_unstructured(layer, "weight", amount=0.4)
        else:
            nn.utils.weight_norm(layer)

    model, delta = attached(name, change)
    x, parameters = inputs(), list(delta.parameters())
    own = {path: p.detach().clone() for path, p in model[0].named_parameters(recurse=False)}
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    loss = torch.func.functional_call(model, {f"0.{path}": p for path, p in own.items()}, (x,)).square().sum()
    # The next forward has another weight.
    torch.func.functional_call(model, {f"0.{path}": 2 * p for path, p in own.items()}, (x,))
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), wanted, rtol=1e-10, atol=1e-12)


def test_traces():
    """In a process of its own: the shapes of a trace are tensors, which the tests' checks of shapes cannot compare."""
    code = f"""
        import sys, torch, deltakit as dk
        from torch import nn
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from support.models import method_of, randomize
        wrong = []
        for name in {AGAIN!r}:
            model = nn.Sequential(nn.Linear({D_IN}, {D_OUT})).double()
            randomize(dk.attach(model, method_of(name, at="0")))
            traced = torch.jit.trace(model, torch.randn(3, {D_IN}).double(), check_trace=False)
            x = torch.randn(2, {D_IN}).double()
            if not torch.allclose(traced(x), model(x), rtol=1e-10, atol=1e-12):
                wrong.append(name)
        print(wrong)
    """
    assert in_a_process(code) == "[]"


def test_a_part_of_a_replica_is_an_error_and_never_silent():
    model, delta = attached("hira")
    (module,) = delta.modules["0"]
    replica = module._replicate_for_data_parallel()
    target = model[0]._replicate_for_data_parallel()
    target.weight, target.bias = model[0].weight, model[0].bias
    target._modules = dict.fromkeys(target._modules, replica)
    with pytest.raises(
        dk.StateError, match="HiRA: in a replica of nn.DataParallel it finds no parameters, because only a part"
    ):
        target(inputs())


def _as_fsdp1(model, *, backward):
    """Puts views of the parameters into the modules as torch's first FSDP does; in its backward pass they are plain attributes."""
    for module in list(model.modules()):
        for name, own in list(module._parameters.items()):
            if not backward and own is not None:
                view = own.view_as(own)
                module.__dict__[name] = module._parameters[name] = view
            elif own is not None:
                del module._parameters[name]


@pytest.mark.parametrize("name", [*AGAIN, "c3a", "delora", "lokr", "lora"])
def test_parameters_that_an_engine_holds(name):
    """FSDP1 with `use_orig_params=True`, of which a launcher's slow test has the real one."""
    model, delta = attached(name)
    x, own = inputs(), list(delta.parameters())
    wanted = torch.autograd.grad(model(x).square().sum(), [x, *own])
    _as_fsdp1(model, backward=False)
    loss = model(x).square().sum()
    _as_fsdp1(model, backward=True)
    found = torch.autograd.grad(loss, [x, *own])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
