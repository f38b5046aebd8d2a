"""Deltas are attached and detached while a forward runs: it sees them at some targets only, and does not raise."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch

import deltakit as dk
from deltakit.injection.first_forward import FirstForward
from deltakit.injection.replaced_targets import TargetGuard
from deltakit.injection.tables import ours
from support.models import Transformer, ids, randomize

METHODS = {
    "lora": lambda: dk.LoRA(r=2),
    "adapter": lambda: dk.Adapter(size=2),
    "bitfit": lambda: dk.BitFit(),
    "ia3": lambda: dk.IA3(),
    "ia3 input": lambda: dk.IA3(at="@ff.down"),
    "prefix": lambda: dk.Prefix(tokens=2, at="layers.*"),
    "soft prompt": lambda: dk.SoftPrompt(tokens=2, prepend=False),
    "patch": lambda: dk.LoRA(r=2, at="layers.*.self_attn.o_proj.weight"),
}
HOOKS = {
    # What a hook ahead of the delta's own does, another thread may do just then: torch has read the table of hooks already.
    "before": lambda module, call: module.register_forward_pre_hook(lambda *_: call(), prepend=True),
    "behind": lambda module, call: module.register_forward_hook(lambda *_: call(), prepend=True),
}


def once(change):
    """A function that makes a change the first time it is called, and nothing later."""
    left = [change]
    return lambda: left.pop()() and None if left else None


@pytest.mark.parametrize("when", HOOKS)
@pytest.mark.parametrize("method", METHODS)
def test_detached(method, when):
    for path in ("", "embed", "layers.0.self_attn", "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"):
        model = Transformer().eval()
        with torch.no_grad():
            plain = model(ids())
            delta = randomize(dk.attach(model, METHODS[method]()))
            model(ids())
            hook = HOOKS[when](model.get_submodule(path), once(delta.detach))
            model(ids())
            hook.remove()
            assert not delta.attached
            assert torch.equal(model(ids()), plain)


@pytest.mark.parametrize("when", HOOKS)
@pytest.mark.parametrize("method", METHODS)
def test_attached(method, when):
    for path in ("", "embed", "layers.0.self_attn", "layers.0.self_attn.o_proj", "layers.0.mlp.down_proj"):
        model = Transformer().eval()
        with torch.no_grad():
            delta = randomize(dk.attach(model, METHODS[method]()))
            wanted = model(ids())
            delta.detach()
            hook = HOOKS[when](model.get_submodule(path), once(delta.attach))
            # The embedding has been given its ids without the prompt, so it is too late to write its vectors.
            late = method == "soft prompt" and path == "embed" and when == "before"
            with pytest.raises(dk.StateError, match="attached while the call ran") if late else nullcontext():
                model(ids())
            hook.remove()
            assert torch.equal(model(ids()), wanted)


@pytest.mark.parametrize("when", HOOKS)
def test_another_delta_is_attached_in_the_first_forward(when):
    """It replaces the hooks of those targets that were called already."""
    model = Transformer().eval()
    first = randomize(dk.attach(model, dk.LoRA(r=2), name="first"))
    hook = HOOKS[when](model.layers[1], once(lambda: dk.attach(model, dk.LoRA(r=3), name="second")))
    with torch.no_grad():
        model(ids())
        hook.remove()
        assert not first._record.checked
        model(ids())
    assert all(delta._record.checked for delta in dk.deltas(model))


@pytest.fixture
def switching():
    """Threads take turns as often as Python allows."""
    was = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(was)


@pytest.mark.parametrize("method", METHODS)
def test_forwards_of_other_threads_do_not_raise(method, switching):
    model = Transformer().eval()
    changes = iter([None] * 12)
    over = threading.Event()

    @torch.no_grad()
    def serve():
        while not over.is_set():
            with suppress(dk.StateError) if method == "soft prompt" else nullcontext():
                assert model(ids()).isfinite().all()

    with ThreadPoolExecutor(2) as pool:
        served = [pool.submit(serve) for _ in range(2)]
        try:
            for _ in changes:
                dk.attach(model, METHODS[method]()).detach()
        finally:
            over.set()
        for future in served:
            future.result()


def test_a_comparison_from_before_a_change_restarts_no_check():
    """A forward compares the modules while another thread attaches a delta; that is no replacement by the user."""
    model = Transformer().eval()
    dk.attach(model, dk.LoRA(r=2), name="first")
    guard = ours(model, TargetGuard)[0]
    before = guard.seen
    model(ids())
    second = dk.attach(model, dk.Adapter(size=2), name="second")
    first_forward = ours(model, FirstForward)[0]
    change = first_forward.change
    guard._look(model, before)
    assert first_forward.change is change
    assert list(first_forward.watched) == [second._record]


def test_with_a_lock_each_forward_sees_all_of_a_delta_or_nothing(switching):
    """The README's example."""
    model, lock = Transformer().eval(), threading.Lock()
    with torch.no_grad():
        plain = model(ids())
        delta = randomize(
            dk.attach(model, dk.LoRA(r=2), dk.Prefix(tokens=2, at="layers.*"), dk.SoftPrompt(tokens=2, prepend=False))
        )
        wanted = model(ids())
    over = threading.Event()

    def activate(active):
        delta.active = active

    def serve():
        seen = []
        while not over.is_set():
            with lock, torch.no_grad():
                seen.append(model(ids()))
        return seen

    with ThreadPoolExecutor(2) as pool:
        served = [pool.submit(serve) for _ in range(2)]
        for _ in range(10):
            for change in (delta.detach, delta.attach, partial(activate, False), partial(activate, True)):
                with lock:
                    change()
        over.set()
        seen = [output for future in served for output in future.result()]
    assert seen
    assert all(torch.equal(output, plain) or torch.equal(output, wanted) for output in seen)
