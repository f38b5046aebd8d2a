"""What `test_compile.py` runs in a process of its own: compiled models while deltas come, go and change.

Dynamo cannot trace the checks of types and shapes that the test run puts into every function, so the process that compiles
must be one in which pytest's plugins are not loaded.
"""

import traceback
from functools import partial

import torch
import transformers as tf

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


def in_a_toy(name):
    """Two blocks, so that what differs between blocks shows; one is enough for the others, where tracing takes longer."""
    return Transformer().eval(), dk.METHODS[name](), {"input_ids": ids()}


def in_transformers(kind, method):
    model = build(kind, tf.AutoModel, num_hidden_layers=1)
    model.config.use_cache = False
    return model, method, {"input_ids": ids()}


def in_torch_s_encoder():
    layer = torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    return torch.nn.Sequential(layer), dk.LoRA(r=2, at="@attn.{q,o}"), {"input": torch.randn(2, 5, 12)}


CASES = {
    **{f"{name}-toy": partial(in_a_toy, name) for name in dk.METHODS},
    **{f"{name}-{kind}": partial(in_transformers, kind, dk.METHODS[name]()) for name in dk.METHODS for kind in ("bert", "llama")},
    "prefix-bloom": partial(in_transformers, "bloom", dk.Prefix()),
    # Targets that are parameters, rows of fused projections, and stacks of experts.
    "lora-torch": in_torch_s_encoder,
    "lora-gpt2": partial(in_transformers, "gpt2", dk.LoRA(r=2, at="@attn.{q,v}")),
    "lora-mixtral": partial(in_transformers, "mixtral", dk.LoRA(r=2, at="@ff.{gate_up,down}")),
}  # fmt: skip


def start():
    """What the process needs before its first case."""
    torch.set_num_threads(1)
    # Torch's fused attention, which bare models use without gradients, rounds otherwise.
    torch.backends.mha.set_fastpath_enabled(False)


def failure(check, *args):
    """The traceback with which a check failed, or None. As text: Dynamo's exceptions cannot be sent between processes."""
    torch.compiler.reset()
    torch.manual_seed(0)
    try:
        # As it is for users: hooks are not guarded.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
            check(*args)
    except Exception:
        return traceback.format_exc()
    return None


def follows(case):
    """Raises unless a model compiled before attach, between, and after gives what the model itself gives."""
    model, method, inputs = CASES[case]()

    def out(m):
        output = m(**inputs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def agree(expected_change):
        with torch.no_grad():
            torch.testing.assert_close(out(compiled), out(model), rtol=1e-4, atol=1e-5)
            assert torch.allclose(out(compiled), bare, rtol=1e-5, atol=1e-6) is not expected_change

    # Frozen already: freezing itself would change what torch guards on, and hide that hooks are not guarded.
    model.requires_grad_(False)
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
    out(compiled).float().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.detach()
    agree(False)


def swaps():
    """Raises if another delta of the same kind, swapped in, is not what runs, or is compiled anew."""
    from torch._dynamo.utils import counters

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


def any_number_of_tokens():
    """Raises if LoRA needs more graphs than the bare layer when the number of tokens changes.

    It takes another way for a few tokens. Asked while compiling, that number would become a guard.
    """
    from torch._dynamo.utils import counters

    found = []
    for adapted in (False, True):
        torch.compiler.reset()
        counters.clear()
        layer = torch.nn.Sequential(torch.nn.Linear(5, 7)).requires_grad_(False)
        if adapted:
            randomize(dk.attach(layer, dk.LoRA(r=2, at="0")))
            # The first forward checks the targets and removes its hooks, which is a change that compiled code must follow.
            layer(torch.randn(3, 5))
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
        with torch.no_grad():
            for tokens in (40, 3, 20, 17, 2):
                x = torch.randn(tokens, 5)
                torch.testing.assert_close(compiled(x), layer(x))
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1], f"{found[1]} graphs with LoRA, {found[0]} without"
