"""Train a delta in an `accelerate` loop. Three lines are new, marked `# 1` to `# 3`.

Attach before `accelerator.prepare`, so that DDP or FSDP2 synchronises the delta's gradients.

    accelerate launch examples/accelerate_loop.py [--model FOLDER_OR_HUB_ID] [--examples N] [--epochs N] [--out FOLDER]
"""

import torch
from accelerate import Accelerator
from common import arguments, fresh_model, report, tokenizer_of

import deltakit as dk
from deltakit.demo.data import batches, encode, read


def main():
    options = arguments("accelerate-delta")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = tokenizer_of(options.model)
    train, valid = (encode(read(split)[: options.examples], tokenizer) for split in ("train", "valid"))
    model = fresh_model(options.model)

    delta = dk.attach(model, dk.LoRA(r=8), train="@head")  # 1
    accelerator.print(delta)  # 2

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    for epoch in range(options.epochs):
        # Each process trains on its own share of the examples.
        own = train[accelerator.process_index :: accelerator.num_processes]
        for batch in batches(own, 32, tokenizer.pad_token_id, seed=epoch):
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    # Every process must call save: with FSDP2 each holds only a shard of the delta.
    delta.save(options.out)  # 3
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        report(model.cpu(), options, valid, tokenizer.pad_token_id)
    accelerator.end_training()


if __name__ == "__main__":
    main()
