"""DDP and FSDP2 on processes of this machine: the same training as in one process, whole files, resumed at another size."""

import json
import socket

import pytest
import torch
from safetensors.torch import load_file

from support.sharded_training import losses, to_train, worker


def run(size, engine, steps, out, start=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(worker, (size, port, engine, steps, start, str(out), results), nprocs=size)
    return dict(results)


def agree(state, delta):
    torch.testing.assert_close(state, dict(delta.state_dict()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("engine", "size"), [("ddp", 2), ("fsdp2", 2), ("fsdp2", 4)])
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


def test_what_is_saved_sharded_is_what_is_saved_whole(tmp_path):
    run(2, "fsdp2", [], tmp_path / "many")
    _, delta = to_train()
    delta.save(tmp_path / "one")
    one, many = ((tmp_path / name / "delta_model.safetensors").read_bytes() for name in ("one", "many"))
    assert one == many


def test_resumed_with_another_number_of_processes(tmp_path):
    model, delta = to_train()
    losses(model, delta, range(4))
    run(2, "fsdp2", range(2), tmp_path / "first")
    results = run(4, "fsdp2", range(2, 4), tmp_path / "second", start=str(tmp_path / "first"))
    agree(results[0][1], delta)
