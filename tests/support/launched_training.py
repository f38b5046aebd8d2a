"""What the launchers of `test_launchers.py` start: a delta trained under accelerate or torch's own engines, and its losses.

PYTHONPATH=tests python tests/support/launched_training.py accelerate|accelerate_fsdp2|ddp|fsdp1|fsdp2 FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel

import deltakit as dk
from support.sharded_training import batch, leave, losses, shard, to_train

STEPS = range(3)


def accelerator_of(engine):
    if engine == "accelerate":
        return Accelerator(cpu=True)
    # accelerate has no FSDP on the CPU: `--cpu` with `--use_fsdp` is an error, and without `--cpu` it runs DDP. What it does
    # to a model runs there all the same, if it is told that these processes have GPUs.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=True,
        )
    )


def by_accelerate(engine, out):
    accelerator = accelerator_of(engine)
    rank, size = accelerator.process_index, accelerator.num_processes
    model, delta = to_train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    found = []
    for step in STEPS:
        loss = prepared(batch(step).chunk(size)[rank]).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(accelerator.reduce(loss.detach(), "mean")))
    if accelerator.is_main_process or accelerator.is_fsdp2:
        delta.save(out)
    if accelerator.is_main_process:
        write(out, found, accelerator.distributed_type.value, size, model)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    leave()


def by_torch(engine, out):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model, delta = to_train()
    if engine == "fsdp1":
        spread = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        spread = shard(model, engine)
    found = losses(spread, delta, STEPS, rank, size)
    for loss in found:
        dist.all_reduce(loss)
    if engine == "fsdp1":
        try:
            delta.save(out / "part")
        except dk.StateError as error:
            assert "as when it was attached, found" in str(error)
        assert not (out / "part").exists()
        with FullyShardedDataParallel.summon_full_params(spread):
            if rank == 0:
                delta.save(out)
    elif rank == 0 or engine == "fsdp2":
        delta.save(out)
    if rank == 0:
        write(out, [float(loss) / size for loss in found], engine, size, model)
    dist.barrier()
    dist.destroy_process_group()
    leave()


def write(out, found, engine, size, model):
    trained = [name.replace("_fsdp_wrapped_module.", "") for name, p in model.named_parameters() if p.requires_grad]
    (out / "run.json").write_text(json.dumps({"losses": found, "engine": engine, "size": size, "trained": trained}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    start = by_accelerate if sys.argv[1].startswith("accelerate") else by_torch
    start(sys.argv[1], Path(sys.argv[2]))
