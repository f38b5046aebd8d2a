"""Stop a Trainer, go on from its checkpoint, and compare with a run that never stopped. Beyond `attach`, no line is new.

    python examples/trainer_resume.py [--model FOLDER_OR_HUB_ID] [--examples N] [--epochs N] [--out FOLDER]

A checkpoint holds what the delta trains, and not the model. Attach the same delta again before you resume.
`small_checkpoints(trainer)` is optional here: with it, resuming without the delta raises an error that names the delta.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import arguments, dataset, fresh_model, report, tokenizer_of
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import deltakit as dk
from deltakit.demo.data import encode, read
from deltakit.integrations import small_checkpoints


def trainer_of(options, folder, train, tokenizer):
    model = fresh_model(options.model)
    dk.attach(model, dk.LoRA(r=8), train="@head")
    settings = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8,
        num_train_epochs=options.epochs,
        learning_rate=5e-3,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="epoch",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, settings, train_dataset=train, data_collator=collator)
    return small_checkpoints(trainer)


def main():
    options = arguments("resumed-delta")
    tokenizer = tokenizer_of(options.model)
    train, valid = (encode(read(split)[: options.examples], tokenizer) for split in ("train", "valid"))

    with TemporaryDirectory() as folder:
        first = trainer_of(options, folder, dataset(train), tokenizer)
        first.train()
        (checkpoint, *_) = sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        size = (checkpoint / "model.safetensors").stat().st_size
        print(f"the weights in {checkpoint.name}: {size / 1000:,.0f} kB")

        again = trainer_of(options, folder, dataset(train), tokenizer)
        again.train(resume_from_checkpoint=str(checkpoint))

    (one,), (other,) = dk.deltas(first.model), dk.deltas(again.model)
    same = all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    print("resumed and uninterrupted run trained the same values:", same)
    print(other)
    other.save(options.out)
    report(again.model.cpu(), options, valid, tokenizer.pad_token_id)


if __name__ == "__main__":
    main()
