"""`accelerate launch` and `torchrun` on two processes: the losses and the delta of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from support.paths import ROOT, SUPPORT, TESTS

ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launched(engine, out, launcher=()):
    """What a run of `support/launched_training.py` wrote: its facts, and its delta's tensors."""
    command = [
        sys.executable,
        *(["-m", *launcher] if launcher else []),
        str(SUPPORT / "launched_training.py"),
        engine,
        str(out),
    ]
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads((out / "run.json").read_text()), load_file(out / "delta_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launched("accelerate", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    ("launcher", "engine", "name"),
    [
        (ACCELERATE, "accelerate", "MULTI_CPU"),
        (TORCHRUN, "accelerate_fsdp2", "FSDP"),
        pytest.param(TORCHRUN, "ddp", "ddp", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "fsdp1", "fsdp1", marks=pytest.mark.slow),
        pytest.param(TORCHRUN, "fsdp2", "fsdp2", marks=pytest.mark.slow),
    ],
    ids=["accelerate launch", "accelerate, FSDP2", "torchrun, DDP", "torchrun, FSDP1", "torchrun, FSDP2"],
)
def test_as_in_one_process(launcher, engine, name, alone, tmp_path):
    one, expected = alone
    two, found = launched(engine, tmp_path, launcher)
    assert (two["engine"], two["size"]) == (name, 2)
    assert (one["engine"], one["size"]) == ("NO", 1)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["trained"] == one["trained"]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
