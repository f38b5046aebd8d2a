"""Gradients of a functional call whose backward pass runs outside of it, when the model has its own parameters again."""

import torch


def functional_and_own(model, delta, x, *, whole):
    """The gradients of a functional call with parameters 1.1 times as large, and of the model with these of its own.

    whole: whether all parameters of the model are other ones, or those of the delta alone.
    """
    own = {id(parameter) for parameter in delta.parameters()}
    changed = {path: p for path, p in model.named_parameters() if whole or id(p) in own}
    trained = [path for path, p in changed.items() if id(p) in own]
    given = {path: 1.1 * p.detach() for path, p in changed.items()}
    asked = [given[path].requires_grad_() for path in trained]
    found = torch.autograd.grad(torch.func.functional_call(model, given, (x,)).square().sum(), asked)
    with torch.no_grad():
        for parameter in changed.values():
            parameter.mul_(1.1)
    return found, torch.autograd.grad(model(x).square().sum(), [changed[path] for path in trained])
