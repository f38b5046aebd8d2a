"""Train a delta in a plain PyTorch loop. Three lines are new, marked `# 1` to `# 3`.

python examples/plain_loop.py [--model FOLDER_OR_HUB_ID] [--examples N] [--epochs N] [--out FOLDER]
"""

import torch
from common import arguments, fresh_model, report, tokenizer_of

import deltakit as dk
from deltakit.demo.data import batches, encode, read


def main():
    options = arguments("plain-loop-delta")
    tokenizer = tokenizer_of(options.model)
    train, valid = (encode(read(split)[: options.examples], tokenizer) for split in ("train", "valid"))
    model = fresh_model(options.model)

    delta = dk.attach(model, dk.LoRA(r=8), train="@head")  # 1
    print(delta)  # 2

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    model.train()
    for epoch in range(options.epochs):
        for batch in batches(train, 32, tokenizer.pad_token_id, seed=epoch):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss {loss.item():.3f}")

    delta.save(options.out)  # 3
    report(model, options, valid, tokenizer.pad_token_id)


if __name__ == "__main__":
    main()
