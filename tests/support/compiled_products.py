"""What `test_compile.py` runs on compiled low-rank products, in a process of its own (`compiled_models.py` says why)."""

import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.models import randomize

TOKENS, D_IN, D_OUT, RANK = 11, 5, 7, 3


def _layer(dtype=torch.float64, kind=nn.Linear):
    layer = nn.Sequential(kind(D_IN, D_OUT) if kind is nn.Linear else kind(D_OUT, D_IN)).to(dtype)
    delta = randomize(dk.attach(layer, dk.LoRA(r=RANK, alpha=1.7, at="0")))
    layer(torch.zeros(2, D_IN, dtype=dtype))
    return layer, delta


def _same(layer, x, backend="aot_eager", **tolerance):
    """Compares a compiled layer with the layer itself: outputs with and without gradients, and the gradients."""
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), **tolerance)
    found = []
    for module in (layer, compiled):
        given = x.clone().requires_grad_()
        output = module(given)
        found.append([output, *torch.autograd.grad(output.sin().sum(), [given, *_trained(layer)])])
    torch.testing.assert_close(*found, **tolerance)


def _trained(layer):
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def equal_gradients():
    """Raises unless compiled products and their gradients are those of the same layer that is not compiled."""
    for kind in (nn.Linear, Conv1D):
        for shape in ((2, TOKENS, D_IN), (TOKENS, D_IN), (1, 1, D_IN), (D_IN,), (2, 0, D_IN)):
            _same(_layer(kind=kind)[0], torch.randn(shape, dtype=torch.float64))
    # Inputs and outputs that are not contiguous.
    _same(_layer()[0], torch.randn(D_IN, TOKENS, dtype=torch.float64).mT)
    _same(nn.Sequential(_Turned(), *_layer()[0]), torch.randn(TOKENS, 2, D_IN, dtype=torch.float64))
    for shape in ((2, TOKENS, D_IN), (1, 1, D_IN)):
        _same(_layer(torch.float32)[0], torch.randn(shape), "inductor")
        _same(_layer(torch.bfloat16)[0], torch.randn(shape).bfloat16(), atol=2e-2, rtol=2e-2)


class _Turned(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


def other_forms():
    """Raises unless the same holds where the plain formula is compiled: autocast, other dtypes, slices, dropout, stacked deltas."""
    x = torch.randn(2, TOKENS, D_IN)
    layer, delta = _layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _same(layer, x, atol=2e-2, rtol=2e-2)
    for module in delta.modules["0"]:
        module.double()
    _same(layer, x, atol=1e-6, rtol=1e-5)
    stacked, _ = _layer()
    randomize(dk.attach(stacked, dk.LoRA(r=2, at="0"), name="second"))
    _same(stacked, x.double())
    dropping = nn.Sequential(nn.Linear(D_IN, D_OUT))
    randomize(dk.attach(dropping, dk.LoRA(r=2, at="0", dropout=0.5)))
    _same(dropping.eval(), x)


def unknown_numbers_of_tokens():
    """Raises unless the number of tokens may depend on values, as it does for experts."""
    layer, _ = _layer()
    for size, some in (
        ((20, D_IN), lambda x: layer(x[x[:, 0] > 0])),
        ((2, 20, D_IN), lambda x: layer(x[:, x[0, :, 0] > 0])),
    ):
        x = torch.randn(size, dtype=torch.float64)
        for grad in (True, False):
            torch.compiler.reset()
            with torch.set_grad_enabled(grad), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                torch.testing.assert_close(torch.compile(some, backend="aot_eager", fullgraph=True)(x), some(x))


def hooks_of_all_modules():
    """Raises unless torch's hooks for all modules run at delta modules, too."""
    layer, delta = _layer()
    (own,) = delta.modules["0"]
    hooks = torch.nn.modules.module
    for register, change in (
        (hooks.register_module_forward_hook, lambda module, args, output: output * 3 if module is own else None),
        (
            hooks.register_module_forward_pre_hook,
            lambda module, args: (2 * args[0], *args[1:]) if module is own else None,
        ),
    ):
        handle = register(change)
        try:
            for size in (1, 40):
                x = torch.randn(size, D_IN, dtype=torch.float64)
                wanted = layer(x).detach()
                compiled = torch.compile(lambda x: layer(x), backend="aot_eager")
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        torch.testing.assert_close(layer(x), wanted)
                        torch.testing.assert_close(compiled(x), wanted)
        finally:
            handle.remove()


def layouts():
    """Raises if a compiled training step on the CPU has a product whose result is [many, r]. Those take several times as long."""
    found = []

    def noted(graph, _):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        found.extend(
            tuple(node.meta["val"].shape)
            for node in nodes
            if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        )
        return graph

    layer, _ = _layer(torch.float32)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=noted, bw_compiler=noted), fullgraph=True)
    compiled(torch.randn(2, TOKENS, D_IN, requires_grad=True)).sum().backward()
    tokens = 2 * TOKENS
    small = sorted(shape for shape in found if RANK in shape)
    assert small == sorted([(RANK, tokens), (RANK, tokens), (RANK, D_IN), (RANK, D_OUT)]), found
