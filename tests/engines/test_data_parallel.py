"""Every method in the replicas that `nn.DataParallel` makes of a model, one for each GPU and forward.

transformers' Trainer makes them, too, where a script is started without a launcher on a machine with several GPUs.
"""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.data_parallel import replica_of
from support.models import WITHOUT_PARAMETERS, Transformer, beside, ids, method_of, randomize

LARGER = 1.1


class Around(nn.Module):
    """A model whose forward calls the backbone, to which the delta is attached."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def with_own_copies(model, delta):
    """The output and the gradients of a model whose parameters are larger, as the replica's are."""
    given = {name: LARGER * parameter.detach() for name, parameter in model.named_parameters()}
    trained = {id(parameter) for parameter in delta.parameters()}
    asked = [given[name].requires_grad_() for name, p in model.named_parameters() if id(p) in trained]
    output = torch.func.functional_call(model, given, (ids(),))
    return output, torch.autograd.grad(output.square().sum(), asked) if asked else ()


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("name", sorted(dk.METHODS))
def test_replicas_compute_with_their_own_parameters(name, around):
    method = method_of(name)
    backbone = beside(Transformer().double().eval(), method)
    delta = randomize(dk.attach(backbone, method))
    model = Around(backbone) if around else backbone
    wanted = with_own_copies(model, delta)
    trained = {id(parameter) for parameter in delta.parameters()}
    parameters = [p for p in model.parameters() if id(p) in trained]
    output = replica_of(model, LARGER)(ids())
    gradients = torch.autograd.grad(output.square().sum(), parameters) if name not in WITHOUT_PARAMETERS else ()
    torch.testing.assert_close((output, gradients), wanted, rtol=1e-9, atol=1e-12)
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus():
    model = Transformer().eval()
    delta = randomize(dk.attach(model, dk.LoRA(r=3)))
    wanted = model(ids())
    loss = wanted.square().sum()
    gradients = torch.autograd.grad(loss, list(delta.parameters()))
    parallel = nn.DataParallel(model.cuda())
    found = parallel(ids().cuda())
    torch.testing.assert_close(found.cpu(), wanted)
    own = torch.autograd.grad(found.square().sum(), list(delta.parameters()))
    torch.testing.assert_close([one.cpu() for one in own], list(gradients))
