"""What each process of `test_distributed.py` does: trains a delta under FSDP2 or DDP on its share of the batch."""

import os
import sys

import torch
import torch.distributed as dist

import deltakit as dk
from support.models import WITHOUT_PARAMETERS, Transformer, beside, method_of, randomize


def to_train(start=None):
    torch.manual_seed(3)
    model = Transformer()
    if start is not None:
        return model, dk.load(start, model)
    pair = dk.ParallelAdapter(size=2, at="@ff.down", source="@ff.up")
    methods = (dk.LoRA(r=3), dk.Adapter(size=2), dk.BitFit(at="@ff.up"), dk.Prefix(tokens=2), pair, dk.Compacter())
    # Trained parameters for all targets, frozen factors for all, frozen parameters, and a full update.
    shared = (dk.VBLoRA(length=4, vectors=7), dk.SAID(size=60))
    products = (dk.VeRA(r=3), dk.DeLoRA(r=2, strength=0.1), dk.LoHa(r=2), dk.LoKr(r=2))
    return model, randomize(dk.attach(model, *methods, *shared, *products, train="norm"), scale=0.03)


def batch(step):
    return torch.randint(2, 31, (4, 5), generator=torch.Generator().manual_seed(step))


def losses(model, delta, steps, rank=0, size=1):
    """Three things an engine could get wrong: the loss, the gradients (by what they lead to), and the order of steps."""
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    found = []
    for step in steps:
        loss = model(batch(step).chunk(size)[rank]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().clone())
    return found


def shard(model, engine):
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def worker(rank, size, port, engine, steps, start, out, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    model, delta = to_train(start)
    sharded = shard(model, engine)
    found = losses(sharded, delta, steps, rank, size)
    means = []
    for loss in found:
        dist.all_reduce(loss)
        means.append(float(loss) / size)
    state = {name: value.clone() for name, value in delta.state_dict().items()}
    if engine == "fsdp2" or rank == 0:
        delta.save(out)
    try:
        dk.attach(sharded, dk.LoRA(r=2), name="late")
        late = "attached"
    except dk.StateError as error:
        late = str(error)
    if engine == "fsdp2":
        delta.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
        assert all(not value.any() for value in delta.state_dict().values())
    results[rank] = (means, state, late)
    dist.destroy_process_group()
    leave()


def ranked():
    """A model with a delta that takes steps and has a penalty, and one whose targets share parameters."""
    torch.manual_seed(3)
    model = Transformer()
    adalora = dk.AdaLoRA(total_steps=4, init_r=3, target_r=1, tinit=1, tfinal=1)
    return model, randomize(dk.attach(model, adalora, dk.InvertibleAdapter()), scale=0.03)


def steps(model, delta, rank=0, size=1):
    """Trains it, and returns the ranks."""
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for step in range(4):
        (model(batch(step).chunk(size)[rank]).square().mean() + delta.penalty()).backward()
        optimizer.step()
        delta.step()
        optimizer.zero_grad()
    return [module.rank for (module,) in delta.modules_of("adalora").values()]


def stepping(rank, size, port, engine, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    model, delta = ranked()
    found = steps(shard(model, engine), delta, rank, size)
    results[rank] = (found, {name: value.clone() for name, value in delta.state_dict().items()})
    dist.destroy_process_group()
    leave()


def every_method():
    """Yields each registered method by name, with a toy that it is attached to; equal in all processes."""
    for name in sorted({*dk.METHODS} - WITHOUT_PARAMETERS):
        torch.manual_seed(7)
        model = beside(Transformer(), method_of(name))
        yield name, model, randomize(dk.attach(model, method_of(name)), scale=0.03)


def saver(rank, size, port, out, results):
    """Saves every method under FSDP2, and puts the reasons of those that failed into `results`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    failed = {}
    for name, model, delta in every_method():
        try:
            sharded = shard(model, "fsdp2")
            sharded(batch(0)).square().mean().backward()
            delta.save(f"{out}/{name}")
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    results[rank] = failed
    dist.destroy_process_group()
    leave()


def leave():
    """Ends a process of several, while its model is still there.

    torch's threads may still run. Without the model its reducer waits for them and holds the lock of the interpreter that they
    wait for (found hanging), and at the interpreter's end they abort it with "terminate called without an active exception".
    """
    sys.stdout.flush()
    os._exit(0)
