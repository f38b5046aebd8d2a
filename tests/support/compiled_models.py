"""Prints, for every method and backbone, whether compiled models follow attach and detach. Run by `test_compile.py`.

It runs in a process of its own: Dynamo cannot trace the shape checks that only the test run has.
"""

import json
import sys

import torch
import transformers as tf
from torch._dynamo.utils import counters

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


def follows(model, method, inputs):
    """Raises unless a model compiled before attach, between, and after gives what the model itself gives."""

    def out(m):
        output = m(**inputs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def agree(expected_change):
        with torch.no_grad():
            torch.testing.assert_close(out(compiled), out(model), rtol=1e-4, atol=1e-5)
            assert torch.allclose(out(compiled), bare, rtol=1e-5, atol=1e-6) is not expected_change

    # Frozen already: freezing itself would change what torch guards on, and hide that hooks are not guarded.
    model.requires_grad_(False)
    torch.compiler.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        bare = out(compiled).clone()
    delta = dk.attach(model, method)
    randomize(delta)
    agree(True)
    delta.active = False
    agree(False)
    delta.active = True
    agree(True)
    delta.detach()
    agree(False)
    delta.attach()
    agree(True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    agree(True)
    torch.stack([value.float().sum() for value in (out(compiled),)]).sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.detach()
    agree(False)


def swaps():
    """Raises if another delta of the same kind, swapped in, is not what runs, or is compiled anew."""
    torch.compiler.reset()
    model = Transformer().eval()
    one = randomize(dk.attach(model, dk.LoRA(r=3), name="one"))
    with one.detached():
        other = randomize(dk.attach(model, dk.LoRA(r=3), name="other"))
        expected = model(ids())
        other.detach()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(ids())
        graphs = counters["stats"]["unique_graphs"]
        one.swap(other)
        torch.testing.assert_close(compiled(ids()), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def cases():
    batch = {"input_ids": ids()}
    for name in dk.METHODS:
        yield f"toy-{name}", Transformer().eval(), dk.METHODS[name](), batch
        for kind in ("bert", "llama", "bloom") if name == "prefix" else ("bert", "llama"):
            model = build(kind, tf.AutoModel)
            model.config.use_cache = False
            yield f"{kind}-{name}", model, dk.METHODS[name](), batch
    yield from by_weight(batch)


def by_weight(batch):
    """Targets that are parameters, rows of fused projections, and stacks of experts."""
    # Torch's fused attention, which bare models use without gradients, rounds otherwise.
    torch.backends.mha.set_fastpath_enabled(False)
    layer = torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    yield "torch-lora", torch.nn.Sequential(layer), dk.LoRA(r=2, at="@attn.{q,o}"), {"input": torch.randn(2, 5, 12)}
    for kind in ("gpt2", "mixtral"):
        model = build(kind, tf.AutoModel)
        model.config.use_cache = False
        at = "@attn.{q,v}" if kind == "gpt2" else "@ff.{gate_up,down}"
        yield f"{kind}-lora", model, dk.LoRA(r=2, at=at), batch


def main():
    torch.set_num_threads(1)
    results = {}
    for case, model, method, inputs in cases():
        try:
            follows(model, method, inputs)
            results[case] = "ok"
        except Exception as error:  # every failure is reported by the test that reads this
            results[case] = f"{type(error).__name__}: {str(error)[:400]}"
    swaps()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
