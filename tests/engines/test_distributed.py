"""DDP and FSDP2 on processes of this machine: the same training as in one process, whole files, resumed at another size."""

import json
import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

import deltakit as dk
from support.models import Transformer
from support.sharded_training import (
    batch,
    every_method,
    leave,
    losses,
    ranked,
    saver,
    stepping,
    steps,
    to_train,
    worker,
)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_processes(size, function, *arguments):
    """Runs a function in several processes at once; returns what each put into the dictionary that is the last argument.

    They are forks of one process that has imported torch: importing it takes longer than the training.
    """
    multiprocessing.set_forkserver_preload(["deltakit", "torch.distributed.fsdp"])
    results = multiprocessing.Manager().dict()
    start_processes(function, (*arguments, results), nprocs=size, start_method="forkserver")
    return dict(results)


def run(size, engine, steps, out, start=None):
    return in_processes(size, worker, size, free_port(), engine, steps, start, str(out))


def agree(state, delta):
    torch.testing.assert_close(state, dict(delta.state_dict()), rtol=1e-4, atol=1e-6)


# Four processes are in `test_resumed_with_another_number_of_processes`, too.
@pytest.mark.parametrize(
    ("engine", "size"), [("ddp", 2), ("fsdp2", 2), pytest.param("fsdp2", 4, marks=pytest.mark.slow)]
)
def test_as_in_one_process(engine, size, tmp_path):
    model, delta = to_train()
    alone = [float(loss) for loss in losses(model, delta, range(3))]
    results = run(size, engine, range(3), tmp_path / "many")
    for means, state, late in results.values():
        assert means == pytest.approx(alone, rel=1e-4)
        agree(state, delta)
        assert "attach to the plain model first" in late
    agree(load_file(tmp_path / "many" / "delta_model.safetensors"), delta)
    delta.save(tmp_path / "one")
    one, many = (json.loads((tmp_path / name / "delta_config.json").read_text()) for name in ("one", "many"))
    assert one["methods"] == many["methods"]
    assert one["backbone"]["class"] == many["backbone"]["class"] == "Transformer"
    assert one["backbone"]["fingerprint"]["structure"] == many["backbone"]["fingerprint"]["structure"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_are_chosen_as_in_one_process(engine):
    model, delta = ranked()
    alone = steps(model, delta)
    assert len(set(alone)) > 1
    for ranks, state in in_processes(2, stepping, 2, free_port(), engine).values():
        assert ranks == alone
        agree(state, delta)


def test_what_is_saved_sharded_is_what_is_saved_whole(tmp_path):
    run(2, "fsdp2", [], tmp_path / "many")
    _, delta = to_train()
    delta.save(tmp_path / "one")
    one, many = (load_file(tmp_path / name / "delta_model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_every_method_is_saved_whole(tmp_path):
    failed = in_processes(2, saver, 2, free_port(), str(tmp_path / "many"))
    assert list(failed.values()) == [{}, {}]
    for name, _, delta in every_method():
        one = load_file(delta.save(tmp_path / "one" / name) / "delta_model.safetensors")
        many = load_file(tmp_path / "many" / name / "delta_model.safetensors")
        assert one.keys() == many.keys(), name
        assert all(torch.equal(one[key], many[key]) for key in one), name


def test_resumed_with_another_number_of_processes(tmp_path):
    model, delta = to_train()
    losses(model, delta, range(4))
    run(2, "fsdp2", range(2), tmp_path / "first")
    results = run(4, "fsdp2", range(2, 4), tmp_path / "second", start=str(tmp_path / "first"))
    agree(results[0][1], delta)


def train_by_ddp(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, delta = with_trained_head()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for step in range(3):
        half = batch(step).chunk(2)[rank]
        parallel(half).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    results[rank] = {name: value.clone() for name, value in delta.state_dict().items()}
    dist.destroy_process_group()
    leave()


def with_trained_head():
    torch.manual_seed(3)
    model = Transformer()
    return model, dk.attach(model, dk.LoRA(r=3), dk.Adapter(size=2), dk.Prefix(tokens=2), dk.Compacter(), train="@head")


def test_two_processes_train_in_step_with_one():
    results = in_processes(2, train_by_ddp, free_port())
    model, delta = with_trained_head()
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for step in range(3):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in delta.state_dict().items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-6)
