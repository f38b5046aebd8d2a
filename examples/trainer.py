"""Train a delta with the transformers `Trainer`. Three lines are new, marked `# 1` to `# 3`.

    python examples/trainer.py

The Trainer's checkpoints hold only what the delta trains; `trainer_resume.py` resumes from one. `delta.save` writes a small
folder with the delta alone, which `dk.load` reads.
"""

from pathlib import Path

import torch
import transformers as tf

import deltakit as dk


def fresh_model():
    # In your code: tf.AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=2)
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


# Two kinds of texts, with different words.
labels = torch.arange(256) % 2
texts = torch.randint(5, 50, (256, 9)) + 50 * labels[:, None]
data = [{"input_ids": text, "labels": label} for text, label in zip(texts, labels, strict=True)]

model = fresh_model()
delta = dk.attach(model, dk.LoRA(r=8), train="@head")  # 1
print(delta)  # 2

settings = tf.TrainingArguments(
    output_dir="trainer-checkpoints",
    per_device_train_batch_size=32,
    num_train_epochs=2,
    learning_rate=5e-3,
    save_strategy="epoch",
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
tf.Trainer(model, settings, train_dataset=data).train()

for checkpoint in sorted(Path("trainer-checkpoints").glob("checkpoint-*")):
    print(f"weights in {checkpoint.name}: {(checkpoint / 'model.safetensors').stat().st_size / 1000:,.0f} kB")
print(f"weights of the whole model: {model.get_memory_footprint() / 1000:,.0f} kB")

delta.save("trainer-delta")  # 3
other = fresh_model().eval()
dk.load("trainer-delta", other)
same = torch.equal(other(texts).logits.argmax(1), model.cpu().eval()(texts).logits.argmax(1))
print("loaded onto a fresh backbone, same predictions:", same)
