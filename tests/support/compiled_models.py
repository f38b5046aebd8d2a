"""What `test_compile.py` runs in a process of its own: compiled models while deltas come, go and change.

Dynamo cannot trace the checks of types and shapes that the test run puts into every function, so the process that compiles
must be one in which pytest's plugins are not loaded.
"""

import asyncio
import copy
import threading
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial

import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from support.models import Transformer, beside, ids, method_of, randomize
from support.tiny_transformers import build


def in_a_toy(name):
    """Two blocks, so that what differs between blocks shows; one is enough for the others, where tracing takes longer."""
    method = method_of(name)
    return beside(Transformer().eval(), method), method, {"input_ids": ids()}


def in_transformers(kind, method):
    model = build(kind, tf.AutoModel, num_hidden_layers=1)
    model.config.use_cache = False
    return beside(model, method), method, {"input_ids": ids()}


def in_torch_s_encoder():
    layer = torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    return torch.nn.Sequential(layer), dk.LoRA(r=2, at="@attn.{q,o}"), {"input": torch.randn(2, 5, 12)}


CASES = {
    **{f"{name}-toy": partial(in_a_toy, name) for name in dk.METHODS},
    **{f"{name}-{kind}": partial(in_transformers, kind, method_of(name)) for name in dk.METHODS for kind in ("bert", "llama")},
    "prefix-bloom": partial(in_transformers, "bloom", dk.Prefix()),
    "gated_lora-llama": partial(in_transformers, "llama", dk.LoRA(r=2, gate=True)),
    **{f"gated_prefix-{kind}": partial(in_transformers, kind, dk.Prefix(gate=True)) for kind in ("bert", "bloom")},
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
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(0)
    try:
        # As it is for users: hooks are not guarded.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
            check(*args)
    except Exception:
        return traceback.format_exc()
    return None


def follows(case):
    """Raises unless a model compiled before attach, between, and after gives what the model itself gives.

    There are no graph breaks, except for methods that read the backbone's call.
    """
    model, method, inputs = CASES[case]()
    whole = not _reads_call(dk.attach(copy.deepcopy(model), method))

    def out(m):
        output = m(**inputs)
        return output if isinstance(output, torch.Tensor) else output[0]

    def agree(expected_change):
        with torch.no_grad():
            torch.testing.assert_close(out(compiled), out(model), rtol=1e-4, atol=1e-5)
            assert torch.allclose(out(compiled), bare, rtol=1e-5, atol=1e-6) is not expected_change

    # Frozen already: freezing itself would change what torch guards on, and hide that hooks are not guarded.
    model.requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
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
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    agree(True)
    if next(delta.parameters(), None) is not None:
        out(compiled).float().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.detach()
    agree(False)


def traces(name):
    """Raises if dynamo cannot trace a method in one block, or computes something else than the block itself."""
    method = method_of(name)
    model = beside(Transformer(blocks=1).eval(), method)
    delta = randomize(dk.attach(model, method))
    compiled = torch.compile(model, backend="eager", fullgraph=not _reads_call(delta))
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids()), model(ids()), rtol=1e-4, atol=1e-5)


def _reads_call(delta):
    """Whether a method of the delta reads the backbone's call, which no graph contains."""
    return any(module.reads_call for modules in delta.modules.values() for module in modules)


def shared_hooks():
    """Raises unless a compiled model follows deltas that come to targets that have one, whose hooks stay, and go."""
    model = Transformer(blocks=1).eval().requires_grad_(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def attached(name, **options):
        return randomize(dk.attach(model, dk.LoRA(**options), name=name))

    def agree():
        with torch.no_grad():
            found = compiled(ids())
            torch.testing.assert_close(found, model(ids()), rtol=1e-4, atol=1e-5)
        return found

    seen = [agree()]
    one = attached("one", r=2)
    seen.append(agree())
    two = attached("two", r=3)
    seen.append(agree())
    one.detach()
    seen.append(agree())
    adapter = randomize(dk.attach(model, dk.Adapter(size=3, at="*.q_proj"), name="three"))
    seen.append(agree())
    for place, output in enumerate(seen):
        assert not any(torch.allclose(output, other, rtol=1e-4, atol=1e-5) for other in seen[:place])
    adapter.detach()
    torch.testing.assert_close(agree(), seen[3])
    two.detach()
    one.attach()
    torch.testing.assert_close(agree(), seen[1])


def compiled_blocks():
    """Raises unless the check of the first forward leaves deltas alone that compiled blocks call, and checks the others."""
    model = Transformer().eval()
    model.idle = torch.nn.ModuleList([torch.nn.Linear(3, 5)])
    encoder = torch.nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    for block in (*model.layers, encoder):
        block.compile(backend="eager")

    def checked(delta, backbone=model, x=None):
        with torch.no_grad():
            backbone(ids() if x is None else x)
        assert delta._record.checked
        return delta

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deltas = [checked(dk.attach(model, dk.LoRA(r=2), name=name)) for name in ("one", "two")]
        for delta in deltas:
            delta.detach()
        # The targets had no hooks meanwhile, and the compiled blocks are those of before.
        last = checked(dk.attach(model, dk.LoRA(r=2), name="one"))
        checked(dk.attach(model, dk.OFT(), name="before"))
        # Another module in the backbone: all deltas are checked again.
        model.classifier = torch.nn.Linear(*model.classifier.weight.shape[::-1])
        checked(last)
        patched = dk.attach(torch.nn.Sequential(encoder), dk.LoRA(r=2, at="@attn.{q,o}"))
        checked(patched, patched.backbone, torch.randn(2, 5, 12))
        # The documented limit.
        checked(dk.attach(model, dk.LoRA(r=2, at=["idle.0", "*.q_proj"]), name="both"))
    # At each target it would take time in each call.
    hooks = [hook for layer in model.layers for hook in layer.self_attn.q_proj._forward_hooks.values()]
    assert hooks
    assert not any(hook.fired for hook in hooks)
    for around in (lambda: None, lambda: torch.compile(model, backend="eager")(ids())):
        idle = dk.attach(model, dk.LoRA(r=2, at="idle.0"), name="idle")
        with torch.no_grad():
            around()
        try:
            checked(idle)
        except dk.TargetError as error:
            assert "idle.0" in str(error)
        else:
            raise AssertionError("a target that is never called was not reported")
        idle.detach()


def compiled_checkpoints():
    """Raises unless gradient checkpointing inside a compiled model is compiled, after a forward that was not."""

    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(5, 5) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x.sum()

    model, x = Blocks().requires_grad_(False), torch.randn(3, 5)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="layers.{0-1}")))
    model(x).backward()
    wanted = [parameter.grad for parameter in delta.parameters()]
    model.zero_grad(set_to_none=True)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).backward()
    for parameter, grad in zip(delta.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def merges():
    """Raises unless compiled code follows `merge` and `unmerge`, compiled before or after the merge."""
    x = torch.randn(3, 20, dtype=torch.float64)
    for name in ("lora", "ia3", "oft", "hra", "loha"):
        for merged in (False, True):
            torch.compiler.reset()
            model = torch.nn.Sequential(torch.nn.Linear(20, 20)).double().requires_grad_(False)
            delta = randomize(dk.attach(model, method_of(name, at="0")))
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            with torch.no_grad():
                wanted = model(x)
                if merged:
                    delta.merge()
                torch.testing.assert_close(compiled(x), wanted)
                for change in (delta.unmerge, delta.merge) if merged else (delta.merge, delta.unmerge):
                    change()
                    torch.testing.assert_close(compiled(x), wanted)


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


def _served():
    """A model with three deltas, an input, mixed batches, and the outputs for each of them and without."""
    model = Transformer().double().eval()
    for k, name in enumerate("abc"):
        randomize(dk.attach(model, dk.LoRA(r=2 + k), name=name))
    x, batches = ids(4, 5), (["a", None, "b", "c"], ["b", "b", "a", None], ["c", "a", None, None])
    with torch.no_grad():
        return model, x, batches, [dk.rows(model, names)(x) for names in batches], model(x)


def rows_of_threads():
    """Raises unless threads with blocks of their own share one compiled model: whole graphs, one with and one without rows."""
    from torch._dynamo.utils import counters

    model, x, batches, wanted, plain = _served()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            for names, output in zip(batches, wanted, strict=True):
                with dk.rows(model, names):
                    torch.testing.assert_close(compiled(x), output)
                torch.testing.assert_close(dk.rows(compiled, names)(x), output)
                torch.testing.assert_close(compiled(x), plain)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2, graphs
    inside = threading.Barrier(len(batches))

    @torch.no_grad()
    def serve(names, output):
        for _ in range(3):
            with dk.rows(model, names):
                inside.wait()
                torch.testing.assert_close(compiled(x), output)
                inside.wait()

    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(serve, batches, wanted))
    assert counters["stats"]["unique_graphs"] == graphs


def rows_of_any_size():
    """Raises if mixed batches of other examples, tokens, or numbers of examples need other graphs than the bare model does."""
    from torch._dynamo.utils import counters

    found = []
    for adapted in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = _served()[0] if adapted else Transformer().double().eval()
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        with torch.no_grad():
            for names, length in (
                (["a", None, "b", "c"], 5),
                (["b", "c", "c"], 5),
                ([None, "c", "a", "a", "b", None], 3),
            ):
                x = ids(len(names), length)
                expected = dk.rows(model, names)(x) if adapted else model(x)
                torch.testing.assert_close(dk.rows(compiled, names)(x) if adapted else compiled(x), expected)
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1], f"{found[1]} graphs with rows, {found[0]} without"


def rows_of_tasks():
    """Raises unless blocks that are held over awaits and yields are right. There torch breaks the graph."""
    model, x, batches, wanted, plain = _served()
    compiled = torch.compile(model, backend="eager")

    async def serve(names, output):
        with dk.rows(model, names):
            await asyncio.sleep(0)
            torch.testing.assert_close(compiled(x), output)
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*map(serve, batches, wanted))

    def stream(names):
        with dk.rows(model, names):
            while True:
                yield compiled(x)

    with torch.no_grad():
        asyncio.run(main())
        torch.testing.assert_close(compiled(x), plain)
        streams = [(copy_context(), stream(names)) for names in batches]
        for (context, one), output in zip(streams, wanted, strict=True):
            torch.testing.assert_close(context.run(next, one), output)
            torch.testing.assert_close(compiled(x), plain)
        # A plain forward in a thread, while others are in blocks.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(torch.no_grad()(compiled), x).result()
        torch.testing.assert_close(found, plain)


def rows_in_training():
    """Raises unless a compiled model has the gradients of its mixed batch, with `backward` outside of the block."""
    model, x, batches, _, _ = _served()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters = [p for delta in dk.deltas(model) for p in delta.parameters()]
    for names in batches:
        with dk.rows(model, names):
            losses = [m(x).square().sum() for m in (model, compiled)]
        one, other = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
        for a, b in zip(one, other, strict=True):
            # What no example uses has no gradient or one of zeros.
            torch.testing.assert_close(*(torch.zeros(()) if g is None or not g.any() else g for g in (a, b)))
