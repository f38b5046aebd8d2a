"""Train a delta on a model that `fully_shard` (FSDP2) shards over several processes.

Two processes on one machine:

    torchrun --nproc-per-node 2 examples/fsdp2.py

Two machines with eight GPUs each. Run this on both; HOST is the address of the first machine:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.fsdp import fully_shard

import deltakit as dk


def fresh_model():
    # In your code: tf.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if gpu else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
# Two kinds of texts, with different words. All processes draw the same, because of the seed.
model = fresh_model().to(device)
labels = torch.arange(256) % 2
texts = torch.randint(5, 50, (256, 9)) + 50 * labels[:, None]

# Attach before sharding. Attaching to a sharded model raises an error.
delta = dk.attach(model, dk.LoRA(r=8), train="@head")
# Shard block by block, so that only one block is gathered at a time.
for path in dk.roles(model)["@block"]:
    fully_shard(model.get_submodule(path))
fully_shard(model)

optimizer = torch.optim.AdamW(delta.parameters(), lr=2e-2)
model.train()
for _ in range(4):
    # All processes must take the same number of steps, or the collective calls hang.
    for rows in torch.arange(rank, len(texts), size).split(16):
        loss = model(texts[rows].to(device), labels=labels[rows].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

# Every process must call save: it gathers the shards, and the first process writes the files.
delta.save("fsdp2-delta")
if rank == 0:
    print(delta)
    alone = fresh_model().eval()
    dk.load("fsdp2-delta", alone)
    print(f"accuracy in one process: {(alone(texts).logits.argmax(1) == labels).float().mean():.0%}")
dist.destroy_process_group()
