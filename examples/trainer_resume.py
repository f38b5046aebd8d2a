"""Stop a Trainer, go on from its checkpoint, and compare with a run that never stopped. Beyond `attach`, no line is new.

    python examples/trainer_resume.py

A checkpoint holds what the delta trains, and not the model. Attach the same delta again before you resume.
`small_checkpoints(trainer)` is optional here: with it, resuming without the delta raises an error that names the delta.
"""

from pathlib import Path

import torch
import transformers as tf

import deltakit as dk
from deltakit.integrations import small_checkpoints

# Two kinds of texts, with different words.
labels = torch.arange(64) % 2
texts = torch.randint(5, 50, (64, 9)) + 50 * labels[:, None]
data = [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]


def new_trainer():
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    dk.attach(model, dk.LoRA(r=8), train="@head")
    settings = tf.TrainingArguments(
        output_dir="resumed-checkpoints",
        per_device_train_batch_size=8,
        num_train_epochs=2,
        learning_rate=5e-3,
        save_strategy="epoch",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return small_checkpoints(tf.Trainer(model, settings, train_dataset=data))


whole_run = new_trainer()
whole_run.train()

# As if the first run had stopped after its first epoch.
checkpoint = min(Path("resumed-checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
resumed = new_trainer()
resumed.train(resume_from_checkpoint=str(checkpoint))

(one,), (other,) = dk.deltas(whole_run.model), dk.deltas(resumed.model)
same = all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
print("resumed and uninterrupted run trained the same values:", same)
print(other)
other.save("resumed-delta")
