"""Ctrl-C in a forward: torch runs no hook behind it, so the next call and `detach` must clear what it left."""

import copy
from threading import Event, Thread, current_thread

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import deltakit as dk
from support.interruptions import everything, interrupted, lines_of, unchanged
from support.kind_methods import Around, AroundDelta
from support.models import Transformer, attached, ids, randomize
from support.tiny_transformers import build


class Encoder(nn.Module):
    """torch's own encoder, whose layers read weights directly."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.encoder(x)
        return self.head(x)


def encoder():
    torch.manual_seed(3)
    x = torch.randn(3, 7, 12)
    return Encoder().eval(), lambda model: model(x)


def plain():
    return Transformer().eval(), lambda model: model(ids())


def tiny(kind):
    model = build(kind)
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    return model, lambda m: m(input_ids=tokens).last_hidden_state


CASES = {
    "weight patch on attention": (encoder, dk.LoRA(r=2, at="encoder.layers.{0-1}.self_attn.in_proj_weight")),
    "weight patch on experts": (lambda: tiny("mixtral"), dk.LoRA(r=2, at="@ff.down")),
    "output hooks in an encoder": (encoder, dk.LoRA(r=2, at="linear1")),
    "prefix by mode, plain torch": (plain, dk.Prefix(tokens=3)),
    "prefix by mode, written out": (lambda: tiny("bloom"), dk.Prefix(tokens=3)),
    "prefix by mode, multi-head": (encoder, dk.Prefix(tokens=3, at="self_attn")),
    "soft prompt": (lambda: tiny("gpt2"), dk.SoftPrompt(tokens=3)),
    "low rank": (plain, dk.LoRA(r=2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [True, False], ids=["the first forward", "a later forward"])
@torch.no_grad()
def test_the_next_forward_and_detach_clear_what_an_interrupted_one_left(case, first):
    make, method = CASES[case]
    model, run = make()
    before, bare = everything(model), run(model)
    delta = randomize(dk.attach(model, method))
    wanted = run(model)
    for line in lines_of(lambda: run(model), 9 if first else 19, model):
        if first:
            delta.detach()
            delta._record.checked = False
            delta.attach()
        interrupted(lambda: run(model), line, model=model)
        assert torch.equal(run(model), wanted), line
        assert not _get_current_function_mode_stack()
        interrupted(lambda: run(model), line, model=model)
        delta.detach()
        unchanged(before, everything(model))
        assert torch.equal(run(model), bare)
        delta.attach()


class Interrupts(nn.Module):
    """Ends the forward of the module that it is in, if it is told to."""

    def __init__(self):
        super().__init__()
        self.now = False

    def forward(self, x):
        if self.now:
            raise KeyboardInterrupt
        return x


def interrupted_prefix():
    """A backbone with a prefix by mode, whose forward can be interrupted between the entry of the mode and its end."""
    model = Transformer().eval()
    attention = model.layers[1].self_attn
    attention.o_proj = nn.Sequential(attention.o_proj, Interrupts())
    return model, attached(model, dk.Prefix(tokens=3)), attention.o_proj[1]


class Counting(TorchFunctionMode):
    """A user's own mode."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        return func(*args, **(kwargs or {}))


def interrupt(model, switch):
    switch.now = True
    with pytest.raises(KeyboardInterrupt):
        model(ids())
    switch.now = False


def test_the_user_s_own_modes_end_with_their_blocks():
    model, delta, switch = interrupted_prefix()
    wanted = model(ids())
    outer, inner = Counting(), Counting()
    with outer:
        with torch.device("cpu"), inner:
            interrupt(model, switch)
            interrupt(model, switch)
        assert inner not in _get_current_function_mode_stack()
        assert outer in _get_current_function_mode_stack()
        assert torch.equal(model(ids()), wanted)
        assert _get_current_function_mode_stack() == [outer]
    interrupt(model, switch)
    assert len(_get_current_function_mode_stack()) == 1
    delta.detach()
    assert not _get_current_function_mode_stack()
    assert outer.seen
    assert inner.seen


def test_a_mode_that_was_left_behind_changes_nothing():
    model, delta, switch = interrupted_prefix()
    heads = torch.randn(2, 4, 7, 5)
    wanted = nn.functional.scaled_dot_product_attention(heads, heads, heads), heads @ heads.mT
    interrupt(model, switch)
    assert _get_current_function_mode_stack()
    assert torch.equal(nn.functional.scaled_dot_product_attention(heads, heads, heads), wanted[0])
    assert torch.equal(heads @ heads.mT, wanted[1])
    delta.detach()


def test_an_interruption_in_another_thread_leaves_this_one_alone():
    """The other thread's stack of modes is cleared by its own next forward."""
    model, _, switch = interrupted_prefix()
    wanted = model(ids())
    found = {}

    def elsewhere():
        interrupt(model, switch)
        found["left"] = len(_get_current_function_mode_stack())
        ready.set()
        go_on.wait()
        found["output"] = model(ids())
        found["after"] = len(_get_current_function_mode_stack())

    ready, go_on = Event(), Event()
    thread = Thread(target=elsewhere)
    thread.start()
    ready.wait()
    assert torch.equal(model(ids()), wanted)
    go_on.set()
    thread.join()
    assert found["left"] == 1
    assert found["after"] == 0
    assert torch.equal(found["output"], wanted)


def test_a_call_that_still_runs_in_another_thread_is_not_cleared():
    """Its patch must stay until it ends, whatever is interrupted elsewhere."""
    model = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 12)
    randomize(dk.attach(model, dk.LoRA(r=2, at="self_attn.in_proj_weight")))
    attention, inside, go_on = model.self_attn, Event(), Event()
    with torch.no_grad():
        wanted = model(x)
    plain = attention.forward
    found = {}

    def waiting(*args, **kwargs):
        if current_thread() is thread:
            inside.set()
            go_on.wait()
        elif found.pop("interrupt", False):
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    def elsewhere():
        with torch.no_grad():
            found["output"] = model(x)

    attention.forward = waiting
    thread = Thread(target=elsewhere)
    thread.start()
    inside.wait()
    found["interrupt"] = True
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(x)
        assert torch.equal(model(x), wanted)
    go_on.set()
    thread.join()
    assert torch.equal(found["output"], wanted)
    assert "in_proj_weight" not in vars(attention)
    assert not [name for name in vars(attention) if "deltakit" in name]


class InterruptedLinear(nn.Linear):
    now = False

    def forward(self, x):
        if self.now:
            raise KeyboardInterrupt
        return super().forward(x)


def test_contexts_of_authors_are_cleaned_up():
    """`abandon` is called ahead of the next call, and by detach."""
    model = nn.Sequential(InterruptedLinear(7, 5))
    delta = dk.attach(model, Around(at="0"))
    opened = AroundDelta.opened
    for clean_up in (lambda: model(torch.ones(1, 7)), delta.detach):
        model[0].now = True
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1, 7))
        assert opened == [delta.modules["0"][0]]
        model[0].now = False
        clean_up()
        assert not opened


def test_a_copy_of_a_model_whose_forward_was_interrupted():
    model, x = Encoder().eval(), torch.randn(2, 5, 12)
    model.encoder.layers[0].linear1 = nn.Sequential(model.encoder.layers[0].linear1, Interrupts())
    randomize(dk.attach(model, dk.LoRA(r=2, at="encoder.layers.0.self_attn.in_proj_weight")))
    with torch.no_grad():
        wanted = model(x)
        attention = model.encoder.layers[0].self_attn
        attention.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), prepend=True)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        twin = copy.deepcopy(model)
        for each in (model, twin):
            each.encoder.layers[0].self_attn._forward_hooks.popitem(last=False)
            assert torch.equal(each(x), wanted)
            assert "in_proj_weight" not in vars(each.encoder.layers[0].self_attn)


def test_a_delta_that_is_switched_off_after_an_interruption_has_no_effect():
    model, x = Encoder().eval(), torch.randn(2, 5, 12)
    with torch.no_grad():
        bare = model(x)
        delta = randomize(dk.attach(model, dk.LoRA(r=2, at="encoder.layers.{0-1}.self_attn.in_proj_weight")))
        for line in lines_of(lambda: model(x), 9, model):
            interrupted(lambda: model(x), line, model=model)
            delta.active = False
            assert torch.equal(model(x), bare), line
            delta.active = True


def test_two_threads_may_find_the_same_interrupted_call():
    # The other thread removes the call between this one's look and its removal.
    from deltakit.core import RunningCall
    from deltakit.injection.context_hooks import clean_up

    calls = []

    class Over(RunningCall):
        @property
        def over(self):
            calls.clear()
            return True

    calls.append(Over())
    clean_up(nn.Linear(2, 3), calls)
    assert calls == []
