"""Methods that change weights: each with the formula of its paper, and with what PEFT calls it and its parameters."""

from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.models import randomize


class Case(NamedTuple):
    """A method, PEFT's config for the same, and the formula of the update.

    `names`: our parameters and PEFT's. `update`: takes the weight [d_out, d_in], our tensors by name, and the frozen ones.
    `sizes`: of a linear layer and a Conv1D behind it; without the third one there is no Conv1D.
    """

    ours: dk.Method
    theirs: peft.PeftConfig
    names: dict[str, str]
    update: Callable
    sizes: tuple[int, ...] = (7, 11, 5)
    turned: tuple[str, ...] = ()
    """Those of our parameters that PEFT has transposed."""


def vera(weight, p, shared):
    out, into = weight.shape
    a, b = shared["A"][:, :into], shared["B"][:out]
    return torch.diag(p["b"]) @ b @ torch.diag(p["d"]) @ a


CASES = {
    "VeRA": Case(
        dk.VeRA(r=3, start=0.2, seed=4),
        peft.VeraConfig(r=3, d_initial=0.2, projection_prng_key=4),
        {"b": "vera_lambda_b", "d": "vera_lambda_d"},
        vera,
    ),
}


class Chain(nn.Module):
    """A linear layer, a nonlinear function, and a Conv1D if there are three sizes."""

    def __init__(self, sizes):
        super().__init__()
        self.first = nn.Linear(*sizes[:2])
        self.second = Conv1D(sizes[2], sizes[1]) if len(sizes) > 2 else nn.Identity()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    @property
    def targets(self):
        return ["first"] + (["second"] if isinstance(self.second, Conv1D) else [])


def chain(case):
    """The model of a case in float64, and its input."""
    torch.manual_seed(3)
    model = Chain(case.sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, torch.randn(2, 13, case.sizes[0], dtype=torch.float64)


def with_options(method, **options):
    """The method with other options."""
    return dk.Method.from_dict({**method.to_dict(), **options})


def attached(case, model, **options):
    return randomize(dk.attach(model, with_options(case.ours, at=model.targets, **options)))


def frozen(module):
    """The tensors of the shared module in float64."""
    return {} if module.shared is None else {name: value.double() for name, value in module.shared.named_buffers()}
