"""Mixed batches under gradient checkpointing: the backward pass runs blocks again with the rows of their forward, wherever."""

import gc
import threading
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from support.models import Block, randomize
from support.tiny_transformers import build

ONE, OTHER = ["a", None, "b"], ["b", "b", "a"]
KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward pass, unless `reentrant` is None."""

    def __init__(self):
        super().__init__()
        self.reentrant = None
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return {"states": [x], "length": x.shape[1]}


def made(method="lora"):
    torch.manual_seed(0)
    model = Checkpointed().double()
    methods = {
        "lora": lambda k: dk.LoRA(r=2 + k),
        "adapter": lambda k: dk.Adapter(size=2 + k),
        "ia3": lambda k: dk.IA3(),
        "prefix": lambda k: dk.Prefix(tokens=2 + k, at="layers.*"),
    }
    for k, name in enumerate("ab"):
        randomize(dk.attach(model, methods[method](k), name=name))
    return model, torch.randn(3, 5, 20, dtype=torch.float64, requires_grad=True)


def loss(model, x):
    return model(x)["states"][0].pow(3).sum()


def gradients(model, x):
    found = [x.grad, *(p.grad for delta in dk.deltas(model) for p in delta.parameters())]
    model.zero_grad()
    x.grad = None
    return found


def wanted(model, x, *batches):
    """The gradients of the sum of the losses of all batches, without checkpointing."""
    model.reentrant = None
    for names in batches:
        with dk.rows(model, names) if names else nullcontext():
            loss(model, x).backward()
    return gradients(model, x)


@contextmanager
def the_place(where, model):
    """Where `backward` is called: the function with which to call it."""
    if where == "outside":
        yield lambda call: call()
    elif where == "in another block":
        with dk.rows(model, OTHER):
            yield lambda call: call()
    elif where == "in another thread":

        def in_thread(call):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()

        yield in_thread


@pytest.mark.parametrize("where", ["inside", "outside", "in another block", "in another thread"])
@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "prefix"])
@KINDS
def test_the_rows_of_the_forward(reentrant, method, where):
    model, x = made(method)
    expected = wanted(model, x, ONE)
    model.reentrant = reentrant
    with dk.rows(model, ONE):
        output = loss(model, x)
        if where == "inside":
            output.backward()
    if where != "inside":
        with the_place(where, model) as call:
            call(output.backward)
    torch.testing.assert_close(gradients(model, x), expected)


@pytest.mark.parametrize("where", ["outside", "in another block", "in another thread"])
@KINDS
def test_two_batches_and_a_plain_forward_in_one_backward(reentrant, where):
    model, x = made()
    expected = wanted(model, x, ONE, OTHER, None)
    model.reentrant = reentrant
    with dk.rows(model, ONE):
        output = loss(model, x)
    output = output + dk.rows(model, OTHER)(x)["states"][0].pow(3).sum() + loss(model, x)
    with the_place(where, model) as call:
        call(output.backward)
    torch.testing.assert_close(gradients(model, x), expected)


@KINDS
def test_outputs_that_are_inputs_of_the_next_forward(reentrant):
    """Each graph has its own rows, also where one continues the other."""
    model, x = made()

    def run(*batches):
        h = x
        for names in batches:
            with dk.rows(model, names) if names else nullcontext():
                h = model(h)["states"][0]
        h.pow(3).sum().backward()
        return gradients(model, x)

    for batches in ((ONE, OTHER), (ONE, None), (None, ONE), (None, OTHER, ONE)):
        model.reentrant = None
        expected = run(*batches)
        model.reentrant = reentrant
        torch.testing.assert_close(run(*batches), expected)


@KINDS
def test_a_plain_graph_from_before_the_block(reentrant):
    """It has no note, because rows were not in use. Outside it runs plain; inside it cannot be told from others."""
    model, x = made()
    expected = wanted(model, x, None)
    model.reentrant = reentrant
    before = loss(model, x)
    with dk.rows(model, ONE):
        held = loss(model, x)
    before.backward()
    torch.testing.assert_close(gradients(model, x), expected)
    del held
    before = loss(model, x)
    with (
        dk.rows(model, ONE),
        pytest.raises(dk.StateError, match=r"its forward did not run inside a rows\(\) block; call its"),
    ):
        before.backward()


@KINDS
def test_a_part_of_the_backbone_that_is_called_alone(reentrant):
    model, x = made()
    part = model.layers[0]
    with dk.rows(model, ONE):
        part(x).pow(3).sum().backward()
        expected = gradients(model, x)
        checkpoint(part, x, use_reentrant=reentrant).pow(3).sum().backward()
        torch.testing.assert_close(gradients(model, x), expected)
        alone = checkpoint(part, x, use_reentrant=reentrant).pow(3).sum()
        # A forward of the whole backbone afterwards changes nothing.
        whole = loss(model, x)
    with pytest.raises(dk.StateError, match="parts of the backbone were called alone inside a rows"):
        alone.backward()
    del whole


def test_the_whole_backbone_inside_a_checkpoint():
    """The node of reentrant checkpointing stands outside of the forward that it runs again, so no note is on it."""
    model, x = made()
    expected = wanted(model, x, ONE)
    for reentrant in (True, False):
        with dk.rows(model, ONE):
            outside = checkpoint(lambda x: model(x * 1)["states"][0], x, use_reentrant=reentrant).pow(3).sum()
            checkpoint(lambda x: model(x * 1)["states"][0], x, use_reentrant=reentrant).pow(3).sum().backward()
        torch.testing.assert_close(gradients(model, x), expected)
        if reentrant:
            with pytest.raises(dk.StateError, match="its rows are unknown"):
                outside.backward()
        else:
            outside.backward()
            torch.testing.assert_close(gradients(model, x), expected)


@KINDS
def test_a_graph_that_is_given_up_leaves_nothing(reentrant):
    model, x = made()
    model.reentrant = reentrant
    records = [delta._record for delta in dk.deltas(model)]
    with dk.rows(model, ONE):
        output = loss(model, x)
        assert all(record.has_rows and record.open_blocks for record in records)
    assert all(record.has_rows and not record.open_blocks for record in records)
    del output
    gc.collect()
    assert not any(record.has_rows or record.rows_in_use or record.unrooted for record in records)


def test_generating_does_not_make_later_graphs_unknown():
    model, x = made()
    record = dk.deltas(model)[0]._record
    with dk.rows(model, ONE):
        with torch.no_grad():
            model(x)
        with pytest.raises(TypeError):
            model(None)
        assert not record.unrooted
        model.layers[0](x)
        assert record.unrooted


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
@KINDS
def test_transformers(kind, reentrant):
    model = build(kind).double()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.train()
    deltas = [randomize(dk.attach(model, dk.LoRA(r=2 + k), name=name)) for k, name in enumerate("ab")]
    tokens = torch.randint(5, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens} | ({"decoder_input_ids": tokens[:, :4]} if kind == "t5" else {})

    def run():
        return dk.rows(model, ONE)(**batch)[0]

    direction = torch.randn(run().shape, dtype=torch.float64)
    parameters = [p for delta in deltas for p in delta.parameters()]
    expected = torch.autograd.grad((run() * direction).sum(), parameters)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    output = (run() * direction).sum()
    with dk.rows(model, OTHER):
        output.backward()
    torch.testing.assert_close([p.grad for p in parameters], list(expected))


def test_functional_calls_and_their_gradients():
    model, x = made()
    expected = wanted(model, x, ONE)
    values = dict(model.named_parameters())

    def run(values):
        return torch.func.functional_call(model, values, (x,))["states"][0].pow(3).sum()

    with dk.rows(model, ONE):
        found = torch.func.grad(run)({name: value.detach() for name, value in values.items()})
    names = {id(p): name for name, p in values.items()}
    own = [found[names[id(p)]] for delta in dk.deltas(model) for p in delta.parameters()]
    torch.testing.assert_close(own, expected[1:])
