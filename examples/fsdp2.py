"""Train a delta on a model that `fully_shard` (FSDP2) shards over several processes.

Two processes on one machine:

    torchrun --nproc-per-node 2 examples/fsdp2.py [--model FOLDER_OR_HUB_ID] [--examples N] [--epochs N] [--out FOLDER]

Two machines with eight GPUs each. Run this on both; HOST is the address of the first machine:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from common import arguments, fresh_model, tokenizer_of
from torch.distributed.fsdp import fully_shard

import deltakit as dk
from deltakit.demo.data import batches, encode, read
from deltakit.demo.training import accuracy


def main():
    options = arguments("fsdp2-delta")
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    tokenizer = tokenizer_of(options.model)
    train, valid = (encode(read(split)[: options.examples], tokenizer) for split in ("train", "valid"))
    model = fresh_model(options.model).to(device)

    # Attach before sharding. Attaching to a sharded model raises an error.
    delta = dk.attach(model, dk.LoRA(r=8), train="@head")
    # Shard block by block, so that only one block is gathered at a time.
    for path in dk.roles(model)["@block"]:
        fully_shard(model.get_submodule(path))
    fully_shard(model)

    optimizer = torch.optim.AdamW(delta.parameters(), lr=5e-3)
    model.train()
    for epoch in range(options.epochs):
        # All processes must take the same number of steps, or the collective calls hang.
        own = train[: len(train) // size * size][rank::size]
        for batch in batches(own, 32, tokenizer.pad_token_id, seed=epoch):
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # Every process must call save: it gathers the shards, and the first process writes the files.
    delta.save(options.out)
    if rank == 0:
        print(delta)
        alone = fresh_model(options.model)
        before = accuracy(alone, valid, tokenizer.pad_token_id)
        dk.load(options.out, alone)
        print(
            f"accuracy in one process, before: {before:.3f}, after: {accuracy(alone, valid, tokenizer.pad_token_id):.3f}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
