"""The rows of a mixed batch belong to the thread or task that entered the block, and to nobody else."""

import asyncio
import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build

BATCHES = (["a", None, "b"], ["b", "b", "a"], [None, "a", None])


def served(make=lambda k: dk.LoRA(r=2 + k), model=None):
    """A model with two deltas, an input, and the outputs for each of the batches and for none."""
    model = (Transformer() if model is None else model).eval()
    for k, name in enumerate("ab"):
        randomize(dk.attach(model, make(k), name=name))
    x = ids()
    with torch.no_grad():
        return model, x, [dk.rows(model, names)(x) for names in BATCHES], model(x)


@pytest.fixture
def switching():
    """Threads take turns as often as Python allows."""
    was = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(was)


def in_threads(*calls):
    """Runs all calls at once, and returns what they return. An error in one of them ends the test."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


METHODS = {
    "lora": lambda k: dk.LoRA(r=2 + k),
    "adapter": lambda k: dk.Adapter(size=2 + k),
    "parallel_adapter": lambda k: dk.ParallelAdapter(size=2 + k, at="down_proj", source="up_proj"),
    "bitfit": lambda k: dk.BitFit(),
    "ia3": lambda k: dk.IA3(),
    "prefix": lambda k: dk.Prefix(tokens=2 + k),
}


@pytest.mark.parametrize("method", METHODS)
def test_threads(method, switching):
    model, x, wanted, plain = served(METHODS[method])

    @torch.no_grad()
    def serve(names, output):
        for turn in range(15):
            if turn % 2:
                with dk.rows(model, names) as backbone:
                    found = backbone(x)
            else:
                found = dk.rows(model, names)(x)
            assert torch.equal(found, output)

    @torch.no_grad()
    def serve_plain():
        for _ in range(30):
            assert torch.equal(model(x), plain)

    in_threads(serve_plain, *(lambda n=n, w=w: serve(n, w) for n, w in zip(BATCHES, wanted, strict=True)))
    assert not any(delta._record.open_blocks or delta._record.has_rows for delta in dk.deltas(model))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
@pytest.mark.parametrize(
    "method", [lambda k: dk.SoftPrompt(tokens=2 + k), lambda k: dk.Prefix(tokens=1 + k)], ids=["soft", "prefix"]
)
def test_soft_prompts_and_prefixes_of_transformers(name, method, switching):
    model = build(name, tf.AutoModel)
    model.config.use_cache = False
    for k, delta in enumerate("ab"):
        randomize(dk.attach(model, method(k), name=delta))
    tokens = torch.randint(5, 30, (3, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch |= {"decoder_input_ids": tokens[:, :4]} if name == "t5" else {}
    with torch.no_grad():
        wanted = [dk.rows(model, names)(**batch)[0] for names in BATCHES]

    @torch.no_grad()
    def serve(names, output):
        for _ in range(8):
            assert torch.equal(dk.rows(model, names)(**batch)[0], output)

    in_threads(*(lambda n=n, w=w: serve(n, w) for n, w in zip(BATCHES, wanted, strict=True)))


def test_training_in_one_thread_and_serving_in_others(switching):
    model, x, wanted, _ = served()
    parameters = [p for delta in dk.deltas(model) for p in delta.parameters()]

    def train():
        for names in BATCHES * 3:
            loss = dk.rows(model, names)(x).square().sum()
            torch.autograd.grad(loss, parameters, allow_unused=True)

    @torch.no_grad()
    def serve():
        for _ in range(10):
            for names, output in zip(BATCHES, wanted, strict=True):
                torch.testing.assert_close(dk.rows(model, names)(x), output)

    in_threads(train, serve, serve)


def test_a_plain_thread_during_a_block():
    model, x, wanted, plain = served()
    with torch.no_grad(), dk.rows(model, BATCHES[0]):
        with torch.no_grad():
            assert torch.equal(model(x), wanted[0])
        (found,) = in_threads(torch.no_grad()(lambda: model(x)))
        assert torch.equal(found, plain)


def test_nothing_changes_from_another_thread():
    model, x, wanted, _ = served()
    delta, _ = dk.deltas(model)
    other = dk.attach(model, dk.LoRA(r=2), name="other").detach()
    changes = {
        "attach or detach": delta.detach,
        "attach": lambda: dk.attach(model, dk.BitFit(), name="new"),
        "merge": delta.merge,
        "changing scale": lambda: setattr(delta, "scale", 2.0),
        "changing active": lambda: setattr(delta, "active", False),
        "in a rows": lambda: delta.swap(other),
    }
    with torch.no_grad(), dk.rows(model, BATCHES[0]):
        for what, change in changes.items():
            with pytest.raises(dk.StateError, match=what):
                in_threads(change)
        assert torch.equal(model(x), wanted[0])
    delta.detach()
    assert not delta.attached


class TestTasks:
    def test_blocks_over_awaits(self):
        model, x, wanted, plain = served()

        async def serve(names, output):
            for _ in range(3):
                with dk.rows(model, names):
                    await asyncio.sleep(0)
                    assert torch.equal(model(x), output)
                    assert torch.equal(await asyncio.to_thread(torch.no_grad()(model), x), output)
                    await asyncio.sleep(0)
                await asyncio.sleep(0)

        async def serve_plain():
            for _ in range(9):
                assert torch.equal(model(x), plain)
                await asyncio.sleep(0)

        async def main():
            await asyncio.gather(serve_plain(), *(serve(*pair) for pair in zip(BATCHES, wanted, strict=True)))

        # Grad mode belongs to the thread and not to the task, so it is switched around all tasks.
        with torch.no_grad():
            asyncio.run(main())

    def test_a_task_that_outlives_its_block(self):
        model, x, wanted, _ = served()

        async def main():
            left = asyncio.Event()

            async def late():
                assert torch.equal(model(x), wanted[0])
                await left.wait()
                with pytest.raises(dk.StateError, match="in which this task or thread was started has ended"):
                    model(x)
                assert torch.equal(dk.rows(model, BATCHES[1])(x), wanted[1])

            with dk.rows(model, BATCHES[0]):
                task = asyncio.create_task(late())
                await asyncio.sleep(0)
            left.set()
            await task

        with torch.no_grad():
            asyncio.run(main())

    def test_a_block_inside_the_block_that_started_the_task(self):
        model, x, _, _ = served()

        async def main():
            with dk.rows(model, BATCHES[0]):
                await asyncio.create_task(inner())

        async def inner():
            dk.rows(model, BATCHES[1])(x)

        with pytest.raises(dk.StateError, match=r"this backbone is in another rows\(\) block already"):
            asyncio.run(main())


class TestBlocks:
    def test_one_call(self):
        model, x, wanted, plain = served()
        once = dk.rows(model, BATCHES[0])
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(once(input_ids=x), wanted[0])
                assert torch.equal(model(x), plain)
            with once as backbone:
                assert backbone is model
                assert torch.equal(model(x), wanted[0])
                with pytest.raises(dk.StateError, match="another rows"):
                    once(x)

    def test_an_exception(self):
        model, x, wanted, plain = served()
        for call in (lambda: dk.rows(model, BATCHES[0])(None), lambda: dk.rows(model, ["a", "b"])(x)):
            with pytest.raises((TypeError, dk.StateError)):
                call()
        with pytest.raises(KeyboardInterrupt), dk.rows(model, BATCHES[0]):
            raise KeyboardInterrupt
        with torch.no_grad():
            assert torch.equal(model(x), plain)
            assert torch.equal(dk.rows(model, BATCHES[1])(x), wanted[1])
        assert not dk.deltas(model)[0]._record.open_blocks

    def test_an_interruption_on_entering(self, monkeypatch):
        model, x, _, plain = served()
        monkeypatch.setattr("deltakit.delta.mixed_rows.watch_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), dk.rows(model, BATCHES[0]):
            pass
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        assert not dk.deltas(model)[0]._record.open_blocks

    def test_copies_and_pickles_are_outside(self):
        model, x, wanted, plain = served()
        with torch.no_grad(), dk.rows(model, BATCHES[0]):
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                record = dk.deltas(twin)[0]._record
                assert (record.has_rows, record.open_blocks, record.rows_in_use) == (False, set(), set())
                assert torch.equal(twin(x), plain)
                assert torch.equal(dk.rows(twin, BATCHES[1])(x), wanted[1])
                assert dk.deltas(twin)[0].detach().attached is False
            assert torch.equal(model(x), wanted[0])

    def test_two_backbones(self):
        model, x, wanted, plain = served()
        twin = copy.deepcopy(model)
        with torch.no_grad(), ExitStack() as first, ExitStack() as second:
            first.enter_context(dk.rows(model, BATCHES[0]))
            second.enter_context(dk.rows(twin, BATCHES[1]))
            assert torch.equal(model(x), wanted[0])
            # Left in the order in which they were entered.
            first.close()
            assert torch.equal(model(x), plain)
            assert torch.equal(twin(x), wanted[1])

    def test_a_block_that_ends_in_another_context(self):
        model, x, wanted, plain = served()
        block = dk.rows(model, BATCHES[0])
        context = copy_context()
        context.run(block.__enter__)
        with torch.no_grad():
            assert torch.equal(context.run(model, x), wanted[0])
            block.__exit__(None, None, None)
            assert torch.equal(model(x), plain)
            with pytest.raises(dk.StateError, match="has ended"):
                context.run(model, x)
        assert not dk.deltas(model)[0]._record.open_blocks

    def test_one_object_in_several_threads(self, switching):
        model, x, wanted, _ = served()
        blocks = [dk.rows(model, names) for names in BATCHES]

        @torch.no_grad()
        def serve():
            for _ in range(5):
                for block, output in zip(blocks, wanted, strict=True):
                    with block:
                        assert torch.equal(model(x), output)

        in_threads(serve, serve, serve)

    def test_detaching_leaves_no_hook(self):
        for root in (lambda m: m, lambda m: m.layers[0]):
            model = Transformer()
            counts = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
            delta = dk.attach(root(model), dk.LoRA(r=2), name="a")
            for at in (model, model.layers[0]):
                dk.rows(at, ["a", None, None])(ids() if at is model else torch.randn(3, 2, 20))
            delta.detach()
            assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == counts


class TestGenerators:
    @staticmethod
    def stream(model, names, x):
        with dk.rows(model, names):
            while True:
                yield model(x)

    def test_a_block_around_yield_holds_for_who_drives_it(self):
        """Documented: a plain forward gets the rows, but two streams never mix."""
        model, x, wanted, plain = served()
        with torch.no_grad():
            stream = self.stream(model, BATCHES[0], x)
            assert torch.equal(next(stream), wanted[0])
            assert torch.equal(model(x), wanted[0])
            with pytest.raises(dk.StateError, match="another rows"):
                next(self.stream(model, BATCHES[1], x))
            stream.close()
            assert torch.equal(model(x), plain)

    def test_in_contexts_of_their_own(self):
        model, x, wanted, plain = served()
        with torch.no_grad():
            streams = [(copy_context(), self.stream(model, names, x)) for names in BATCHES]
            for _ in range(3):
                for (context, stream), output in zip(streams, wanted, strict=True):
                    assert torch.equal(context.run(next, stream), output)
                    assert torch.equal(model(x), plain)
            for context, stream in streams:
                context.run(stream.close)

    def test_the_call_holds_no_block(self):
        model, x, wanted, plain = served()

        def stream(names):
            for _ in range(2):
                yield dk.rows(model, names)(x)

        with torch.no_grad():
            for first, second in zip(stream(BATCHES[0]), stream(BATCHES[1]), strict=True):
                assert torch.equal(first, wanted[0])
                assert torch.equal(second, wanted[1])
                assert torch.equal(model(x), plain)


def replicas(model):
    """What `nn.DataParallel` makes for each device, from `torch.nn.parallel.replicate`, without the copies of parameters."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in made.items():
        for name, child in module._modules.items():
            replica._modules[name] = made[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter
    return made[model]


def test_replicas_of_data_parallel_are_refused():
    model, x, _, plain = served()
    replica = replicas(model)
    with torch.no_grad():
        assert torch.equal(replica(x), plain)
        with (
            dk.rows(model, BATCHES[0]),
            pytest.raises(dk.StateError, match=r"nn\.DataParallel runs its replicas in threads of their own"),
        ):
            in_threads(torch.no_grad()(lambda: replica(x)))


def test_a_bare_thread_takes_no_rows_with_it():
    model, x, _, plain = served()
    found = []
    with dk.rows(model, BATCHES[0]):
        thread = threading.Thread(target=lambda: found.append(model(x)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], plain)
