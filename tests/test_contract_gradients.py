"""What every registered method promises of its gradients, in whatever way they are computed."""

import pytest
import torch

import deltakit as dk
from support.functional import functional_and_own
from support.models import WITHOUT_PARAMETERS, Transformer, beside, ids, method_of, randomize

every_trained_method = pytest.mark.parametrize("name", sorted({*dk.METHODS} - WITHOUT_PARAMETERS))


@pytest.fixture
def model(name):
    return beside(Transformer().double().eval(), method_of(name))


def trained(model, name):
    return randomize(dk.attach(model, method_of(name)))


def gradients(run, parameters):
    return torch.autograd.grad(run(ids()).square().sum(), parameters)


@every_trained_method
def test_hooks_of_parameters_run_once(model, name):
    """Hooks that clip, scale or mask gradients, also where a formula is computed again in the backward pass."""
    parameters = list(trained(model, name).parameters())
    wanted = gradients(model, parameters)
    for parameter in parameters:
        parameter.register_hook(lambda gradient: gradient * 3)
    torch.testing.assert_close(gradients(model, parameters), tuple(3 * one for one in wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("whole", [False, True])
@every_trained_method
def test_functional_calls_with_the_backward_pass_outside(model, name, whole):
    """The backward pass uses the tensors of its forward, of which some updates read the backbone's own weights and biases."""
    found, wanted = functional_and_own(model, trained(model, name), ids(), whole=whole)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def on_the_cpu(model, parameters):
    with torch.autograd.graph.save_on_cpu():
        loss = model(ids()).square().sum()
    return torch.autograd.grad(loss, parameters)


def twice(model, parameters):
    loss = model(ids()).square().sum()
    torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.autograd.grad(loss, parameters)


def batched(model, parameters):
    out = model(ids())
    both = torch.autograd.grad(out, parameters, torch.stack([out, 2 * out]).detach(), is_grads_batched=True)
    torch.testing.assert_close([2 * first for first, _ in both], [second for _, second in both])
    return tuple(second for _, second in both)


def transformed(model, parameters, *, by_example=False):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given = {names[id(parameter)]: parameter.detach() for parameter in parameters}
    gradient = torch.func.grad(lambda values, x: torch.func.functional_call(model, values, (x,)).square().sum())
    if by_example:
        each = torch.func.vmap(lambda values, x: gradient(values, x[None]), in_dims=(None, 0))(given, ids())
        found = {name: values.sum(0) for name, values in each.items()}
    else:
        found = gradient(given, ids())
    return tuple(found[names[id(parameter)]] for parameter in parameters)


def for_each_example(model, parameters):
    return transformed(model, parameters, by_example=True)


@pytest.mark.filterwarnings("ignore:.*have not yet implemented the batching rule:UserWarning")
@every_trained_method
def test_every_way_to_differentiate(model, name):
    """Fast paths have backward passes of their own, and transforms go around them."""
    parameters = list(trained(model, name).parameters())
    wanted = gradients(model, parameters)
    for way in (on_the_cpu, twice, batched, transformed, for_each_example):
        found = way(model, parameters)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10, msg=lambda text, way=way: f"{way}: {text}")
