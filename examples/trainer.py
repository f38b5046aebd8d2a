"""Train a delta with the transformers `Trainer`. Three lines are new, marked `# 1` to `# 3`.

    python examples/trainer.py [--model FOLDER_OR_HUB_ID] [--examples N] [--epochs N] [--out FOLDER]

The Trainer's own checkpoints hold only what the delta trains; `trainer_resume.py` resumes from one.
`delta.save` writes a small folder with the delta alone, which `dk.load` reads.
"""

from tempfile import TemporaryDirectory

import torch
from common import arguments, dataset, fresh_model, report, tokenizer_of
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import deltakit as dk
from deltakit.demo.data import encode, read


def main():
    options = arguments("trainer-delta")
    tokenizer = tokenizer_of(options.model)
    train, valid = (encode(read(split)[: options.examples], tokenizer) for split in ("train", "valid"))
    model = fresh_model(options.model)

    delta = dk.attach(model, dk.LoRA(r=8), train="@head")  # 1
    print(delta)  # 2

    with TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=32,
            num_train_epochs=options.epochs,
            learning_rate=5e-3,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        collator = DataCollatorWithPadding(tokenizer)
        Trainer(model, settings, train_dataset=dataset(train), data_collator=collator).train()

    delta.save(options.out)  # 3
    report(model.cpu(), options, valid, tokenizer.pad_token_id)


if __name__ == "__main__":
    main()
